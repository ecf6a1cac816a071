"""Which GGUF files lie in a folder, and what do their headers say?"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from supervisor.models import gguf

_MMPROJ = re.compile(r"(?:^|[-._ ])mmproj", re.IGNORECASE)
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""A link that leads nowhere, or a file that vanished while its folder was listed."""

Stamp = tuple[str, int, int, int]
"""Path, size, mtime (ns) and inode: when one of them differs, it is another file."""


@dataclass(frozen=True)
class ModelFile:
    """A file found on disk: where, how large (bytes), and what its header says or why it cannot be read.

    `folder` is relative to the models folder. `copying` marks a file that may still change: it counts when
    names are given, and is not offered.
    """

    path: Path
    folder: PurePosixPath
    size: int
    mtime_ns: int
    inode: int
    header: gguf.Header | None = None
    error: str | None = None
    copying: bool = False

    @property
    def stamp(self) -> Stamp:
        """What tells this content from any other at the same path."""
        return str(self.path), self.size, self.mtime_ns, self.inode

    @property
    def stem(self) -> str:
        """The file name without `.gguf`."""
        return self.path.stem

    @property
    def is_projector(self) -> bool:
        """Whether the file belongs to a model with eyes or ears and is none by itself."""
        by_header = self.header is not None and self.header.general_type == "mmproj"
        return by_header or _MMPROJ.search(self.stem) is not None


@dataclass
class Listing:
    """What a walk found: the files, those nearest to the root first, and what could not be read.

    `roots` are the real folders whose trees were seen: the models folder and what links in it lead to.
    """

    files: list[ModelFile] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def walk(root: Path) -> Listing:
    """Find every GGUF file below `root`. Links are followed, and each real folder is entered once."""
    listing = Listing()
    entered: set[tuple[int, int]] = set()
    folders = [root]
    links: list[Path] = []  # entered after all real folders: a file that has a real path here keeps it
    while folders or links:
        is_root = not entered or not folders
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            if folder == root and error.errno == errno.ENOENT:
                missing = f"models folder {show(root)} does not exist: create it or set models.directory"
                listing.problems.append(missing)
            elif folder == root or error.errno not in _GONE:
                listing.problems.append(f"folder {show(folder)} cannot be read: {error.strerror}")
            continue
        if is_root:
            listing.roots.append(folder.resolve())
        for name in names:
            path = folder / name
            if not _add_file(listing, root, path):
                continue
            if not path.is_symlink():
                folders.append(path)
            elif not listing.roots[0].is_relative_to(path.resolve()):  # a link to `/` would list the whole disk
                links.append(path)
    listing.files.sort(key=lambda file: (len(file.folder.parts), file.folder.as_posix(), file.path.name))
    return listing


def _add_file(listing: Listing, root: Path, path: Path) -> bool:
    """Note `path` if it is a GGUF file. Returns whether it is a folder."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in _GONE:
            listing.problems.append(f"{show(path)} cannot be read: {error.strerror}")
        return False
    if stat.S_ISREG(status.st_mode) and path.suffix.casefold() == ".gguf":
        place = PurePosixPath(path.parent.relative_to(root).as_posix())
        listing.files.append(ModelFile(path, place, status.st_size, status.st_mtime_ns, status.st_ino))
    return stat.S_ISDIR(status.st_mode)


def read(file: ModelFile) -> ModelFile:
    """Return `file` with its header, or with the reason why that is no use. Raises OSError."""
    try:
        return replace(file, header=gguf.read_header(file.path), error=None)
    except gguf.GGUFError as error:
        return replace(file, header=None, error=str(error))


def show(path: Path | str) -> str:
    """Return a path or file name as text that can be logged and put into JSON.

    Bytes that are not UTF-8 and characters that cannot be shown (line ends, controls) become %XX.
    """
    return "".join(c if c.isprintable() else quote(_as_bytes(c)) for c in str(path))


def _as_bytes(character: str) -> bytes:
    escaped = "\udc80" <= character <= "\udcff"  # how Python carries a byte that is not UTF-8
    return character.encode("utf-8", "surrogateescape" if escaped else "surrogatepass")
