"""Which files does the system read before somebody needs them?"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic

import psutil

from supervisor.models.model_files import Model

log = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
"""How long what was asked for is taken to be there."""


def will_need(path: Path) -> None:
    """Let the system read a file into its page cache, in its own time. Raises `OSError`."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


class ReadAhead:
    """Lets the files of the model that comes next be read while it has to wait for room, so that it loads faster."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}  # by model, on the monotonic clock

    async def model(self, model: Model) -> None:
        """Ask for the files of `model`, if they fit into the memory that is free, and not again within a minute."""
        now = monotonic()
        if now - self._asked.get(model.id, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._asked[model.id] = now
        files = [*model.files, model.mmproj] if model.mmproj is not None else model.files
        if await asyncio.to_thread(_ask, files, model.size):
            log.debug("model %s waits for room: its files are read meanwhile", model.id)


def _ask(files: Iterable[Path], size: int) -> bool:
    if size > psutil.virtual_memory().available:  # it would only push out others' pages
        return False
    for path in files:
        with suppress(OSError):
            will_need(path)
    return True
