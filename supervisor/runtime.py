"""Where do sockets and locks live, and what is left behind when a supervisor is killed?

A private folder (0700) holds one sub-folder for each running supervisor, named by its pid and locked with
flock. A sub-folder whose lock is free belongs to a dead supervisor: whatever of its children still lives may
exit by itself for as long as it might save its memory, then it is killed, and the folder is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes (sun_path on Linux; macOS has 103, checked by bind)."""

_ROOM_FOR_NAME = len("/1234567890/1234567890.sock")


class RuntimeFolderError(Exception):
    """The runtime folder cannot be used; the message says why and what to do."""


def default_root() -> Path:
    """Return the user's runtime folder, short enough for a socket's path."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        root = Path(base) / "llama-supervisor"
        if root.parent.is_dir() and len(os.fsencode(root)) + _ROOM_FOR_NAME <= MAX_SOCKET_PATH:
            return root
    return Path(tempfile.gettempdir()) / f"llama-supervisor-{os.getuid()}"


class Runtime:
    """This supervisor's runtime folder. `open` makes it, `close` removes it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        self.folder = self.root / str(os.getpid())
        self._lock: int | None = None
        self._count = 0

    def open(self) -> None:
        """Make the folder, clean up after dead supervisors, take the lock. Raises `RuntimeFolderError`."""
        if len(os.fsencode(self.folder)) + len("/12345.sock") > MAX_SOCKET_PATH:
            raise RuntimeFolderError(f"{self.root}: path too long for a Unix socket; set server.runtime_dir")
        try:
            root_lock = _lock_root(self.root)
            try:
                _make_private(self.root)
                self._clean_up()
                self.folder.mkdir(mode=0o700)
                self._lock = _try_lock(self.folder)
            finally:
                os.close(root_lock)
        except OSError as error:
            raise RuntimeFolderError(f"runtime folder {self.root}: {error.strerror or error}") from error

    def close(self) -> None:
        """Remove the folder, and the one around it when no other supervisor uses it."""
        if self._lock is None:
            return
        root_lock = _lock_root(self.root)
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
            self.root.rmdir()
        except OSError:
            pass  # not empty: another one runs
        finally:
            os.close(root_lock)

    def new_socket(self) -> Path:
        """Return a path for a child's socket that was never used before."""
        self._count += 1
        return self.folder / f"{self._count}.sock"

    def record(self, socket: Path, pid: int, patience: float) -> None:
        """Remember that `pid` belongs to `socket`, for the next supervisor should this one be killed.

        `patience`: how many seconds the next one gives it to exit by itself.
        """
        try:
            born = psutil.Process(pid).create_time()
            socket.with_suffix(".pid").write_text(f"{pid} {born} {patience}\n")
        except (psutil.Error, OSError) as error:
            log.debug("pid %d not recorded: %s", pid, error)

    def forget(self, socket: Path) -> None:
        """Remove a stopped child's socket and record."""
        socket.unlink(missing_ok=True)
        socket.with_suffix(".pid").unlink(missing_ok=True)

    def _clean_up(self) -> None:
        for folder in filter(_is_ours, self.root.iterdir()):
            lock = _try_lock(folder)
            if lock is None:
                continue  # its supervisor runs
            try:
                for record in folder.glob("*.pid"):
                    _kill_recorded(record)
                _remove(folder)
            finally:
                os.close(lock)


def _lock_root(root: Path) -> int:
    """Make `root` if need be and wait for its lock; return the descriptor that holds it."""
    while True:
        with suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
        try:
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if root.is_symlink():
                raise
            continue  # another supervisor has just removed it
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if root.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was removed while we waited for the lock


def _make_private(folder: Path) -> None:
    info = folder.stat(follow_symlinks=False)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise RuntimeFolderError(f"runtime folder {folder} belongs to somebody else; set server.runtime_dir")
    if stat.S_IMODE(info.st_mode) != 0o700:
        if not all(map(_is_ours, folder.iterdir())):
            raise RuntimeFolderError(f"runtime folder {folder} holds other files; give server.runtime_dir an empty one")
        folder.chmod(0o700)


def _is_ours(path: Path) -> bool:
    """Whether `path` looks like a supervisor's folder: somebody may have put the root where other things are."""
    return path.name.isdecimal() and path.is_dir() and not path.is_symlink()


def _remove(folder: Path) -> None:
    """Remove a dead supervisor's folder, but nothing in it that is not a supervisor's."""
    try:
        for path in [*folder.glob("*.sock"), *folder.glob("*.pid")]:
            path.unlink()
        folder.rmdir()
    except OSError as error:
        log.warning("%s was left behind by a dead supervisor and stays: %s", folder, error.strerror or error)
        return
    log.info("removed what supervisor %s left behind", folder.name)


def _try_lock(folder: Path) -> int | None:
    """Lock `folder`; return the descriptor that holds the lock, or None when another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _kill_recorded(record: Path) -> None:
    """Kill the child that `record` names, if it is still the same process when its patience is over."""
    try:
        pid, born, patience = record.read_text().split()
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(born)) < 1:
            with suppress(psutil.TimeoutExpired):
                log.info("waiting for llama-server %s, left behind by a dead supervisor", pid)
                process.wait(timeout=float(patience))
                return
            log.warning("killing llama-server %s, left behind by a dead supervisor", pid)
            process.kill()
            process.wait(timeout=5)
    except (psutil.Error, OSError, ValueError):
        pass
