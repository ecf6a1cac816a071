"""How fast may one key go? Token buckets without a clock of their own."""

from __future__ import annotations


class Bucket:
    """Holds up to a minute's units, and gets as many in each minute.

    What is taken may be more than there is: the level goes below zero, and has to be paid back by waiting. Times are
    in seconds of a clock that never goes back.
    """

    __slots__ = ("_level", "_since", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._since = now

    def wait(self, now: float) -> float:
        """Return how many seconds it takes until there is a unit; 0: there is one."""
        self._fill(now)
        return max(0.0, (1 - self._level) * 60 / self.per_minute)

    def take(self, units: int, now: float) -> None:
        """Take `units`, whether they are there or not."""
        self._fill(now)
        self._level -= units

    def resize(self, per_minute: int, now: float) -> None:
        """Change the rate; what was used stays used."""
        self._fill(now)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def _fill(self, now: float) -> None:
        if now > self._since:
            self._level = min(self.per_minute, self._level + (now - self._since) * self.per_minute / 60)
            self._since = now
