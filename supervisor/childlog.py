"""Where does a child's log go? Into a file that is rotated by size, and its last lines stay in memory."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

log = logging.getLogger(__name__)

TAIL_LINES = 1000
"""Lines kept in memory for `logs` and for error messages."""

FOLLOW_QUEUE = 10_000
"""Lines held for a slow reader of `logs -f` before it loses some."""

_SECRET = re.compile(
    r"(?i)\b((?:[\w-]*api[-_]?key|(?:hf|access|auth)[-_]token|[\w-]*secret|[\w-]*password|authorization|bearer)"
    r"(?:['\"]?\s*[:=]\s*|\s+)(?:bearer\s+)?['\"]?)([^\s'\"]{4,})"
)


def mask(line: str) -> str:
    """Return `line` with what looks like a secret replaced by stars."""
    return _SECRET.sub(r"\1****", line)


def file_name(model: str) -> str:
    """Return a safe file name for the log of `model`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", model).lstrip(".")[:120] + ".log"


class ChildLog:
    """The log of one model, over all its children."""

    def __init__(self, path: Path | None, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._followers: set[asyncio.Queue[str | None]] = set()
        self._broken = False

    def write(self, data: bytes) -> None:
        """Add complete lines. A disk that refuses them is reported once; the lines stay in memory."""
        lines = [mask(line) for line in data.decode("utf-8", "replace").splitlines()]
        for masked in lines:
            self.lines.append(masked)
            self._tell(masked)
        self._write_file("".join(line + "\n" for line in lines))

    def close(self) -> None:
        """Let everyone who follows the log come to the end of it."""
        self._tell(None)

    def tail(self, count: int) -> list[str]:
        """Return the last `count` lines."""
        return list(self.lines)[-count:] if count > 0 else []

    async def follow(self, count: int = 0) -> AsyncIterator[str]:
        """Yield the last `count` lines and then those that come, none lost between, until `close`."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(FOLLOW_QUEUE)
        self._followers.add(queue)
        try:
            for line in self.tail(count):
                yield line
            while (new := await queue.get()) is not None:
                yield new
        finally:
            self._followers.discard(queue)

    def _tell(self, line: str | None) -> None:
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(line)

    def _write_file(self, text: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                size = file.tell()
            if size > self.max_bytes:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._broken = False
        except OSError as error:
            if not self._broken:
                log.warning("log %s cannot be written: %s", self.path, error.strerror or error)
            self._broken = True
