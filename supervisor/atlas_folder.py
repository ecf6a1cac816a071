"""Where are the memory files of a model, which are there, and how are they deleted?

Each model has a folder of its own, so that its session names are its own. A file and its backups are deleted under the
lock that the children take: `.<name>.lock` beside them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import platformdirs

from supervisor import atlas_file
from supervisor.errors import BadRequest, SupervisorError

LONGEST_NAME = 160
"""Characters of a folder's name; file systems take 255 bytes."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
SUFFIX = ".atlas"


class MemoryNotFound(SupervisorError):
    """There is no memory file of that name (404)."""

    status = 404
    type = "atlas_memory_error"


class MemoryInUse(SupervisorError):
    """Another process reads or writes the file (409)."""

    status = 409
    type = "atlas_memory_error"


class WrongName(BadRequest):
    """Not the name of a session (400)."""

    type = "atlas_parameter_error"


def default_root() -> Path:
    """Return the folder of all memory files when `atlas.memory_directory` names none."""
    return Path(platformdirs.user_state_dir("llama-supervisor")) / "atlas"


def folder_name(model: str) -> str:
    """Return the name of a model's folder: its id, with all but letters, digits, `-_~` and inner dots as %XX."""
    name = quote(model, safe="", errors="surrogateescape")
    name = name.replace(".", "%2E", 1) if name.startswith(".") else name
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(model.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{name[: LONGEST_NAME - 18]}%-{digest}"  # no other name has a % before a -


def folder_of(root: Path | None, model: str) -> Path:
    """Return the folder of a model's memory files; `root` is `atlas.memory_directory`."""
    return (root or default_root()) / folder_name(model)


def make(folder: Path) -> None:
    """Make a model's folder, private as its files hold what was said. Raises OSError."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def session_name(name: str, param: str = "file") -> str:
    """Return the name of a session without `.atlas`. Raises `WrongName`."""
    if not _NAME.fullmatch(name):
        rule = "must be a name of 1 to 128 letters, digits, '.', '_' and '-' that does not start with '.'"
        raise WrongName(f"{param}: {rule}", param=param)
    return name.removesuffix(SUFFIX) if len(name) > len(SUFFIX) else name


def listing(folder: Path) -> list[dict[str, Any]]:
    """Return what the memory files of a folder say of themselves, as a child lists them."""
    found = []
    for path in atlas_file.find(folder):
        with suppress(FileNotFoundError):  # deleted meanwhile
            found.append(describe(path))
    return found


def info(folder: Path, name: str) -> dict[str, Any]:
    """Return what one memory file says of itself, and its backups. Raises `MemoryNotFound` or `WrongName`."""
    path = folder / (session_name(name) + SUFFIX)
    try:
        found = describe(path)
    except FileNotFoundError:
        raise MemoryNotFound(f"there is no memory file {path.name}") from None
    return found | {"backups": [backup.name for backup in atlas_file.backups(path)]}


def describe(path: Path) -> dict[str, Any]:
    """Return what a memory file says of itself; only a running child knows whether it fits.

    Raises FileNotFoundError.
    """
    size = path.stat().st_size
    try:
        header = atlas_file.read(path).header
    except FileNotFoundError:
        raise
    except (atlas_file.CorruptMemory, OSError) as error:
        return {"file": path.name, "bytes": size, "compatible": False, "reason": str(error)}
    session = header.session
    return {
        "file": path.name,
        "name": session.name,
        "n_tokens": session.n_tokens,
        "n_archived": session.n_archived,
        "created": session.created,
        "saved": session.saved,
        "model": str(header.model.get("description", "unknown")),
        "cells": header.params.get("cells"),
        "window": header.params.get("window"),
        "bytes": size,
        "raw": sum(frame.raw for frame in header.frames),
        "frames": len(header.frames),
        "compatible": None,
        "reason": "the model is not running, so it was not compared",
    }


@dataclass(frozen=True)
class Stored:
    """A memory file among others: `saved` in Unix seconds, `bytes` without its backups."""

    name: str
    saved: float
    bytes: int


def expendable(
    files: Iterable[Stored],
    now: float,
    *,
    older_than: float | None = None,
    keep_count: int | None = None,
    max_bytes: int | None = None,
) -> list[Stored]:
    """Return which files go, the newest first, so that the others pass every limit that is given.

    `older_than`: seconds since they were saved; `keep_count`: how many stay; `max_bytes`: how large they are together.
    """
    gone = []
    total = 0
    for place, file in enumerate(sorted(files, key=lambda file: (-file.saved, file.name))):
        total += file.bytes
        old = older_than is not None and now - file.saved > older_than
        if old or (keep_count is not None and place >= keep_count) or (max_bytes is not None and total > max_bytes):
            gone.append(file)
    return gone


def remove(folder: Path, name: str) -> int:
    """Delete a memory file and its backups; return how many files that were.

    Raises `MemoryNotFound`, `MemoryInUse`, `WrongName`, and `SupervisorError` when the disk refuses.
    """
    name = session_name(name)
    path = folder / (name + SUFFIX)
    if not path.exists() and not atlas_file.backups(path):
        raise MemoryNotFound(f"there is no memory file {path.name}")
    try:
        with _locked(folder / f".{name}.lock"):
            files = [file for file in (*atlas_file.backups(path), path) if file.exists()]
            for file in files:
                file.unlink()
    except OSError as error:
        raise SupervisorError(f"{path.name} cannot be deleted: {error.strerror or error}") from error
    return len(files)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a memory file, which goes with it. Raises `MemoryInUse`."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MemoryInUse("the memory file is in use by another process") from None
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
