"""How many requests begin in one turn of the event loop? A few: then what has begun gets on before more begin.

When many clients come at once, the loop would take them all through the same step before any of them takes the next:
32 streams that begin together all get their first token when the last one does, and streams that run wait as long.
"""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 4


class Turns:
    """Lets `per_turn` callers of `enter` on in each turn of the event loop, in the order in which they came."""

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._due = False  # `_next` will be called

    async def enter(self) -> None:
        """Return at once for the first few of a turn, for the others in one of the next turns."""
        loop = asyncio.get_running_loop()
        if not self._due:
            self._due = True
            loop.call_soon(self._next)
        if self._left:
            self._left -= 1
            return
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _next(self) -> None:
        self._left = self._per_turn
        while self._waiting and self._left:
            waiter = self._waiting.popleft()
            if not waiter.done():  # its client has not left
                waiter.set_result(None)
                self._left -= 1
        self._due = self._left < self._per_turn
        if self._due:
            asyncio.get_running_loop().call_soon(self._next)
