"""When does a file that people may change at any time have to be read again?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Event, Thread

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
    """Calls `look` when files changed and once more when they then stay, from `start` to `stop`; and at the beginning.

    A thread looks at the files: a dead disk may hold up that one, and a thread of its own takes a fraction of the
    processor time that handing each look to a worker would. A `look` that fails is logged, and the next one comes.
    """

    def __init__(self, paths: Sequence[Path], look: Callable[[], Awaitable[None]]) -> None:
        self._paths = tuple(paths)
        self._look = look
        self._ended = Event()
        self._asked = 0
        self._task: asyncio.Task[None] | None = None

    def start(self, seconds: float) -> None:
        """Look every so many seconds."""
        self._ended = Event()
        self._asked = 0
        given = asyncio.get_running_loop(), self._ended, seconds
        Thread(target=self._follow, args=given, name="followed file", daemon=True).start()

    async def stop(self) -> None:
        """End, also one that never began."""
        self._ended.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _follow(self, loop: asyncio.AbstractEventLoop, ended: Event, seconds: float) -> None:
        seen: tuple[Signature | None, ...] | None = None
        moving = False
        while not ended.wait(seconds):
            now = tuple(map(signature, self._paths))
            if now != seen or moving:
                try:
                    loop.call_soon_threadsafe(self._begin, ended)
                except RuntimeError:  # the loop has ended without `stop`
                    return
            moving, seen = now != seen, now

    def _begin(self, ended: Event) -> None:
        if ended.is_set():
            return
        self._asked += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._looks())

    async def _looks(self) -> None:
        while self._asked:
            self._asked -= 1
            try:
                await self._look()
            except Exception:
                log.exception("a changed file could not be taken over")
