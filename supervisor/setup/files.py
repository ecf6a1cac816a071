"""How does a file appear whole or not at all, and how do two processes keep out of each other's way?"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

CHUNK = 1 << 20
"""Bytes read or written at once."""


def cache_root() -> Path:
    """Return the user's cache folder of this program (it may not exist yet)."""
    return Path(platformdirs.user_cache_dir("llama-supervisor", appauthor=False))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a small file so that a reader sees the old or the new content, also after a power cut.

    `mode` is that of the file, less the umask. Where we may, it belongs to whom the old one belonged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            with suppress(FileNotFoundError, PermissionError):
                old = path.stat()
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_atomic(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, replacing an older link in one step."""
    part = link.with_name(f".{link.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which stays behind as an empty file.

    `waiting` is called once when another process holds the lock. The system frees the lock when the holder
    dies, so there are no stale locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Like `file_lock`, but yield False at once when another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        held = False
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
