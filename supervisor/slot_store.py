"""Which prompts of stopped children are on disk, and which stay? Files only; `slot_cache.py` fills and uses them.

Each models folder has a folder of its own, locked by the one supervisor that uses it, and in there each model has one.
What llama-server writes becomes `<key>-<tokens>-<bytes>-<mtime>.slot` when it is complete: the name says for
which child it is and how the file must look, so that one that was cut, changed or left half-written counts for nothing.
They hold what was said, so the folders are 0700 and the files 0600. Those from before the machine's last start go:
they are not brought to the disk by force, so they may have holes after a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import platformdirs
import psutil

from supervisor.atlas_folder import folder_name

log = logging.getLogger(__name__)

SUFFIX: Final = ".slot"
USED: Final = ".used"
"""Restored into a child that still runs: should it die of it, the file is not used again."""

PART: Final = ".part"
"""Being written."""

_NAME = re.compile(r"(?P<key>[0-9a-f]{24})-(?P<tokens>\d+)-(?P<bytes>\d+)-(?P<mtime>\d+)\.(slot|used)")
_NO_MATTER = frozenset(["--host", "--alias", "--slot-save-path"])
"""Flags of a child that have a value and nothing to do with what is in its KV cache."""


@dataclass(frozen=True)
class Saved:
    """A saved prompt: for which child, of how many tokens, in how many bytes. `mtime` in ns, of the file."""

    path: Path
    key: str
    tokens: int
    bytes: int
    mtime: int

    def intact(self) -> bool:
        """Whether the file is as it was when it was complete."""
        try:
            info = self.path.stat(follow_symlinks=False)
        except OSError:
            return False
        return (info.st_size, info.st_mtime_ns) == (self.bytes, self.mtime)


def default_root() -> Path:
    """Return the folder of all saved prompts when `models.slot_cache_directory` names none.

    State, not cache: a service has write access to the former.
    """
    return Path(platformdirs.user_state_dir("llama-supervisor")) / "slots"


def key_of(command: Sequence[str], environ: Mapping[str, str], files: Iterable[Path]) -> str:
    """Return what two children have in common when one can go on from the other's KV cache.

    `command` starts with the binary; `files` are those of the model. Raises OSError when one cannot be looked at.
    """
    kept = [word for word, before in zip(command, ["", *command], strict=False) if not {word, before} & _NO_MATTER]
    stamps = []
    for path in (Path(command[0]), *files):
        info = path.stat()
        stamps.append((str(path), info.st_size, info.st_mtime_ns, info.st_ino))
    digest = hashlib.sha256(repr((kept, sorted(environ.items()), stamps)).encode("utf-8", "surrogateescape"))
    return _boot() + digest.hexdigest()[:16]


def _boot() -> str:
    """Return what tells this start of the machine from others, as 8 hexadecimal digits."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = str(int(psutil.boot_time()))
    return hashlib.sha256(name.encode()).hexdigest()[:8]


class SlotStore:
    """The saved prompts of one supervisor's models. `open` it before use; a model is for one thread at a time."""

    def __init__(self, root: Path | None, models: Path) -> None:
        """`models` is the models folder, which names the one in `root`."""
        name = hashlib.sha256(os.fsencode(models.absolute())).hexdigest()[:16]
        self.folder = (root or default_root()) / name
        self._lock: int | None = None
        self._numbers = itertools.count(1)

    def open(self) -> None:
        """Take the folder and clear it up. Raises OSError when it cannot be made or another supervisor has it."""
        self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        self._lock = descriptor
        boot = _boot()
        for path in self._files():
            saved = parse(path)
            if saved is None or path.suffix != SUFFIX or not saved.key.startswith(boot) or not saved.intact():
                _remove(path)
        self._tidy()

    @property
    def is_open(self) -> bool:
        """Whether the folder is ours."""
        return self._lock is not None

    def close(self) -> None:
        """Let go of the folder; what is in it stays."""
        if self._lock is not None:
            self._tidy()
            os.close(self._lock)
            self._lock = None

    def make(self, model: str) -> Path:
        """Return the folder of a model, made if need be. Raises OSError."""
        folder = self.folder / folder_name(model)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def find(self, model: str, key: str) -> list[Saved]:
        """Return what a new child of `model` can go on from, the newest first; what it cannot use is removed."""
        found = []
        for path in self._files(model):
            saved = parse(path)
            if saved is not None and path.suffix == SUFFIX and saved.key == key and saved.intact():
                found.append(saved)
            else:
                _remove(path)
        return sorted(found, key=lambda saved: saved.mtime, reverse=True)

    def part(self, model: str) -> Path:
        """Make an empty file for a child to write to, and return it. Raises OSError."""
        path = self.make(model) / f"{next(self._numbers)}{PART}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return path

    def complete(self, part: Path, key: str, tokens: int, size: int, older: Saved | None = None) -> None:
        """A child has written `size` bytes to `part`: from now on it counts, in place of `older`.

        Raises OSError when the file is not so large: its end did not fit on the disk.
        """
        info = part.stat(follow_symlinks=False)
        if info.st_size != size:
            raise OSError(errno.ENOSPC, f"{info.st_size} bytes were written of {size}")
        part.rename(part.with_name(f"{key}-{tokens}-{size}-{info.st_mtime_ns}{SUFFIX}"))
        if older is not None:
            _remove(older.path)

    def take(self, saved: Saved) -> Saved:
        """Mark as used by a child, until `put_back`. Raises OSError."""
        return _moved(saved, USED)

    def put_back(self, saved: Saved) -> Saved:
        """The child that used it ends well and has nothing newer in its place. Raises OSError."""
        return _moved(saved, SUFFIX)

    def evict(self, model: str, most: int, most_of_all: int) -> None:
        """Remove the oldest files that do not fit into `most` bytes for `model`, and `most_of_all` for all models."""
        for paths, limit in ((self._files(model), most), (self._files(), most_of_all)):
            found = sorted(filter(None, map(parse, paths)), key=lambda saved: saved.mtime, reverse=True)
            total = 0
            for saved in found:
                total += saved.bytes
                if total > limit:
                    total -= saved.bytes
                    _remove(saved.path)

    def forget(self, model: str) -> None:
        """Remove all files of a model."""
        for path in self._files(model):
            _remove(path)

    def total(self) -> int:
        """Return the bytes of all files."""
        return sum(saved.bytes for saved in map(parse, self._files()) if saved is not None)

    def _files(self, model: str | None = None) -> Iterator[Path]:
        """Iterate over the files of a model, or of all."""
        if not self.is_open:
            return
        folders = [self.folder / folder_name(model)] if model is not None else _listed(self.folder)
        for folder in folders:
            if folder.is_dir() and not folder.is_symlink():
                yield from _listed(folder)

    def _tidy(self) -> None:
        """Remove the folders that are empty."""
        for folder in _listed(self.folder):
            with suppress(OSError):
                folder.rmdir()


def parse(path: Path) -> Saved | None:
    """Return what the name of a file says, None when it is not the name of a complete one."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return Saved(path, match["key"], int(match["tokens"]), int(match["bytes"]), int(match["mtime"]))


def _moved(saved: Saved, suffix: str) -> Saved:
    return replace(saved, path=saved.path.rename(saved.path.with_suffix(suffix)))


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _remove(path: Path) -> None:
    """Remove a file; folders and what is not ours to remove stay."""
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.debug("%s stays: %s", path, error.strerror or error)
