"""What happens to the models, told to whoever listens."""

from __future__ import annotations

import asyncio
from typing import Any

QUEUE = 1000
"""Events held for a slow listener before it loses some."""

Event = dict[str, Any]


class Events:
    """Hands each event to all listeners, and waits for none of them."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Event | None]] = set()

    def listen(self) -> asyncio.Queue[Event | None]:
        """Return a queue that gets every event from now on, until `unlisten`; None is the end of them."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(QUEUE)
        self._listeners.add(queue)
        return queue

    def unlisten(self, queue: asyncio.Queue[Event | None]) -> None:
        """Stop feeding `queue`."""
        self._listeners.discard(queue)

    def publish(self, model: str, event: str, data: Event) -> None:
        """Tell of something that happened to `model`; "*" stands for all."""
        self._tell({"model": model, "event": event, "data": data})

    def close(self) -> None:
        """Tell that no more will come."""
        self._tell(None)

    def _tell(self, message: Event | None) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(message)
