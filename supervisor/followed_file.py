"""When does a file that people may change at any time have to be read again?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

log = logging.getLogger(__name__)

Signature = tuple[int, ...]


def signature(path: Path) -> Signature | None:
    """Return what changes when a file does; None when there is none."""
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,) if not isinstance(error, FileNotFoundError) else None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Follower:
    """Calls `look` every so many seconds, from `start` to `stop`. One that fails is logged, and the next one comes."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._task: asyncio.Task[None] | None = None

    def start(self, seconds: float) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._follow(seconds))

    async def stop(self) -> None:
        """End, also one that never began."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._look()
            except Exception:
                log.exception("a changed file could not be taken over")
