"""Which models do these files make? Groups shards, gives ids, attaches projectors. All functions are pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from supervisor.models import gguf
from supervisor.models.folder_scan import ModelFile, Stamp, show

AUTO = "auto"
"""The name that stands for the default model; no model and no alias can take it."""
_SHARD = re.compile(r"(?P<base>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})", re.DOTALL)
_MMPROJ = re.compile(r"(?:^|[-._ ]+)mmproj")
_QUANTIZATION = re.compile(
    r"[-._ ]+(?:(?:ud|i1)[-._])?(?:[it]?q[0-9](?:_[0-9a-z]+)*|bf16|fp?(?:16|32)|mxfp4(?:_moe)?|nvfp4)$"
)
_SEPARATORS = re.compile(r"[-._ ]+")
_PROJECTOR_RANK = {"F16": 0, "Q8_0": 1, "BF16": 2, "F32": 3}
"""Which projector to take of several: F16 runs on every backend, others are larger or slower on some."""
_NO_MODEL = {
    "adapter": "a LoRA adapter, not a model: pass it with --lora in the `args` of its model",
    "imatrix": "an importance matrix for quantizing, not a model",
}


@dataclass(frozen=True)
class Model:
    """A model that can be asked for by `id`, or that is there and cannot be served (`error` says why).

    `path` is what `-m` gets: the file or its first shard. `size` (bytes) counts all shards, `mtime` (seconds)
    is that of the newest file. `header` is the first shard's, with the tensors and parameters of all.
    `fingerprint` differs once any of the files, the projector included, was replaced.
    """

    id: str
    path: Path
    files: tuple[Path, ...]
    mmproj: Path | None
    size: int
    mtime: float
    header: gguf.Header | None
    error: str | None
    aliases: tuple[str, ...] = ()
    fingerprint: tuple[Stamp, ...] = ()


@dataclass(frozen=True)
class Group:
    """The files of one model, in shard order; `count` is how many there should be."""

    stem: str
    files: tuple[ModelFile, ...]
    count: int = 1

    @property
    def folder(self) -> PurePosixPath:
        """The folder of its files, relative to the models folder."""
        return self.files[0].folder


def group_shards(files: Iterable[ModelFile]) -> list[Group]:
    """Put the shards `X-00001-of-000NN` of one folder together; any other file is a group of its own."""
    groups: list[Group] = []
    shards: dict[tuple[PurePosixPath, str, int], dict[int, ModelFile]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        if match and 1 <= (number := int(match["number"])) <= (count := int(match["count"])):
            found = shards.setdefault((file.folder, match["base"], count), {})
            if number not in found:
                found[number] = file
                continue
        groups.append(Group(file.stem, (file,)))
    for (_, base, count), found in shards.items():
        groups.append(Group(base, tuple(found[number] for number in sorted(found)), count))
    return groups


def name_groups(groups: Iterable[Group]) -> dict[str, Group]:
    """Give every group its id: the stem for the one nearest to the root, `folder/stem` for others like it."""
    named: dict[str, Group] = {}
    for group in sorted(groups, key=_nearness):
        id = show(group.stem)
        if id in named or id == AUTO:
            id = show((group.folder / group.stem).as_posix())
        free = id
        number = 2
        while free in named or free == AUTO:
            free = f"{id}~{number}"
            number += 1
        named[free] = group
    return named


def _nearness(group: Group) -> tuple[int, str, str]:
    return len(group.folder.parts), group.folder.as_posix(), group.files[0].path.name


def plain_name(stem: str) -> str:
    """Return what is left of a stem without quantization and `mmproj`, in one spelling, to compare names."""
    name = _MMPROJ.sub("", stem.casefold())
    while (shorter := _QUANTIZATION.sub("", name)) != name:
        name = shorter
    return _SEPARATORS.sub("-", name).strip("-")


def find_projector(group: Group, projectors: Iterable[ModelFile]) -> ModelFile | None:
    """Return the projector of a model, or None.

    A name that matches wins; in a sub-folder any other projector of the same folder will do.
    """
    name = plain_name(group.stem)
    found: list[tuple[bool, int, str, ModelFile]] = []
    for file in projectors:
        matches = name != "" and plain_name(file.stem) == name
        if file.folder == group.folder and (matches or file.folder.parts):
            kind = file.header.quantization if file.header else None
            rank = _PROJECTOR_RANK.get(kind or "", len(_PROJECTOR_RANK))
            found.append((not matches, rank, file.path.name, file))
    return min(found, key=lambda item: item[:3])[3] if found else None


def build_models(files: Sequence[ModelFile]) -> tuple[dict[str, Model], list[str]]:
    """Make models of files that were read. Returns the models by id, and problems with other files."""
    projectors = [file for file in files if file.is_projector and not file.copying]
    problems = [f"projector {show(file.path)} is not used: {file.error}" for file in projectors if file.error]
    usable = [file for file in projectors if not file.error]
    models: dict[str, Model] = {}
    for id, group in name_groups(group_shards(file for file in files if not file.is_projector)).items():
        if not any(file.copying for file in group.files):
            models[id] = _model(id, group, find_projector(group, usable))
    return dict(sorted(models.items())), problems


def _model(id: str, group: Group, projector: ModelFile | None) -> Model:
    files = group.files
    header = files[0].header
    if header is not None and len(files) > 1:
        headers = [file.header for file in files if file.header is not None]
        header = replace(
            header,
            tensor_count=sum(one.tensor_count for one in headers),
            parameter_count=sum(one.parameter_count for one in headers),
            layer_bytes=sum(one.layer_bytes for one in headers),
            repackable_bytes=sum(one.repackable_bytes for one in headers),
        )
    return Model(
        id=id,
        path=files[0].path,
        files=tuple(file.path for file in files),
        mmproj=projector.path if projector else None,
        size=sum(file.size for file in files),
        mtime=max(file.mtime_ns for file in files) / 1e9,
        header=header,
        error=_group_error(group, header),
        fingerprint=tuple(file.stamp for file in (*files, *([projector] if projector else []))),
    )


def _group_error(group: Group, header: gguf.Header | None) -> str | None:
    """Say why a group cannot be served, or return None. `header` counts the tensors of all shards."""
    missing = group.count - len(group.files)
    broken = next((file for file in group.files if file.error), None)
    misnamed = next((file for place, file in enumerate(group.files) if _is_misnamed(file, place, group)), None)
    error = None
    if missing:
        error = f"shards are missing: {', '.join(_missing(group, 3))}{' and more' if missing > 3 else ''}"
    elif broken:
        error = f"{show(broken.path.name)}: {broken.error}" if group.count > 1 else broken.error
    elif header is None:
        error = "its header was not read"
    elif header.general_type in _NO_MODEL:
        error = _NO_MODEL[header.general_type]
    elif misnamed and misnamed.header:
        end = f"{misnamed.header.split_no + 1:05d}-of-{misnamed.header.split_count:05d}.gguf"
        error = f"{show(misnamed.path.name)} is one of several shards: its name must end in -{end}"
    elif header.architecture is None:
        error = "the header names no architecture"
    elif not header.tensor_count:
        error = "it holds a vocabulary and no weights"
    return error


def _is_misnamed(file: ModelFile, place: int, group: Group) -> bool:
    header = file.header
    if header is None or header.split_count < 2:
        return False
    return (header.split_no, header.split_count) != (place, group.count)


def _missing(group: Group, most: int) -> list[str]:
    """Return the names of the first `most` shards that are not there."""
    there = {file.stem for file in group.files}
    stems = (f"{group.stem}-{number:05d}-of-{group.count:05d}" for number in range(1, group.count + 1))
    return [f"{show(stem)}.gguf" for stem in islice((stem for stem in stems if stem not in there), most)]
