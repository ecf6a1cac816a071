"""Which changes does our llama-server carry, and how do they get into a source tree?"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import supervisor
from supervisor.setup.fetch import SetupError

FILES = "files"
"""Folder of whole files that are copied over the tree."""


@dataclass(frozen=True)
class PatchSeries:
    """The patches of one folder, in order, and the whole files beside them."""

    folder: Path

    @cached_property
    def patches(self) -> list[Path]:
        """The patch files in the order of application; raises SetupError when one is missing."""
        lines = (self.folder / "series").read_text().splitlines()
        names = [line.split("#", 1)[0].strip() for line in lines]
        patches = [self.folder / name for name in names if name]
        if missing := [patch.name for patch in patches if not patch.is_file()]:
            raise SetupError(f"{self.folder / 'series'} names patches that are not there: {', '.join(missing)}")
        return patches

    @cached_property
    def files(self) -> list[Path]:
        """The whole files, as paths relative to `files/` and so to the tree, sorted."""
        root = self.folder / FILES
        found = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return sorted(path.relative_to(root) for path in found)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and contents of everything that changes the tree, in hex."""
        parts = [(path.name, path) for path in self.patches]
        parts += [(f"{FILES}/{path.as_posix()}", self.folder / FILES / path) for path in self.files]
        digest = hashlib.sha256()
        for name, path in parts:
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """What the patched server reports as its series: the number of patches and a part of the digest."""
        return f"llama-supervisor-{len(self.patches)}-{self.digest[:8]}"

    def apply(self, tree: Path) -> None:
        """Apply all patches to `tree`, then copy the whole files over it.

        Raises SetupError when any hunk does not apply exactly; the tree is half changed then, so throw it away.
        """
        for patch in self.patches:
            _apply(patch, tree)
        for path in self.files:
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / FILES / path, target)


def patches_folder() -> Path:
    """Return the folder of the patches: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(supervisor.__file__).parent
    for folder in (package / "patches", package.parent / "patches"):
        if (folder / "series").is_file():
            return folder
    raise SetupError("the patches are missing from this installation: install llama-supervisor again")


def patch_series(folder: Path | None = None) -> str:
    """Return the label of the present patch series, such as `llama-supervisor-1-0a1b2c3d`."""
    return PatchSeries(folder or patches_folder()).label


def _apply(patch: Path, tree: Path) -> None:
    """Apply one unified diff with `a/` and `b/` prefixes, with neither fuzz nor offset."""
    import patch_ng  # noqa: PLC0415 - needed for builds only

    source, root = patch.absolute(), tree.absolute()

    with _Complaints() as complaints, contextlib.chdir(tree):
        parsed = patch_ng.fromfile(str(source))
        # patch-ng applies new, deleted and renamed files first and forgets them: keep the list for the check.
        items = list(parsed.items) if parsed else []
        # It takes a file that has the change already, and bad names, with no more than a warning: here they count.
        applied = bool(parsed) and not complaints and parsed.apply(strip=0)
    if not applied or complaints or not items or not all(_is_in(item, root) for item in items):
        detail = "; ".join(complaints[:4]) or "not a unified diff"
        raise SetupError(
            f"patch {patch.name} does not apply to this llama.cpp ({detail}): "
            "give an untouched tree of the pinned build"
        )


def _is_in(item: object, tree: Path) -> bool:
    """Return whether all hunks of a patched file are really in the tree: new text at the new line numbers."""
    target: bytes = item.target  # type: ignore[attr-defined]
    if target == b"/dev/null":
        return True
    lines = (tree / target.decode().removeprefix("b/")).read_bytes().splitlines()
    for hunk in item.hunks:  # type: ignore[attr-defined]
        wanted = [line[1:].rstrip(b"\r\n") for line in hunk.text if line[:1] in (b" ", b"+")]
        start = max(hunk.starttgt - 1, 0)
        if lines[start : start + len(wanted)] != wanted:
            return False
    return True


class _Complaints(logging.Handler):
    """Collects what patch-ng logs as warnings and errors; a context manager that yields the list."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def __enter__(self) -> list[str]:
        logging.getLogger("patch_ng").addHandler(self)
        return self._lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("patch_ng").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's text as one line."""
        self._lines.append(" ".join(record.getMessage().split()))
