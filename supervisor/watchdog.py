"""Does a running child still do anything? One that hangs is found in under 5 s, one that only works hard is left alone.

A sign of life is an answer to /health on a connection of its own, or a byte on any other. A child without one that
takes no CPU time either hangs: it was stopped, or deadlocked, or lost its socket. One that computes or waits for the
disk hangs after a minute without a sign of life, and one that a debugger looks at never.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, Protocol

import psutil

LOOK_SECONDS: Final = 1.0
"""Pause after an answer before the next question."""

ANSWER_SECONDS: Final = 0.75
"""How long an answer may take before the child is asked again."""

QUIET_SECONDS: Final = 3.0
"""How long a child may give no sign of life and take no CPU time."""

LONGEST_STEP: Final = 1.9
"""Most seconds that count between two looks; more than pass between any two on a machine that is awake."""

SILENT_SECONDS: Final = 60.0
"""How long it may give no sign of life though it works."""


class Effort(NamedTuple):
    """What the system tells of a process: CPU time in seconds, and psutil's word for what it does."""

    cpu: float
    status: str


class Watched(Protocol):
    """What is needed of a child."""

    async def answers(self, seconds: float) -> bool:
        """Tell whether it shows life within so many seconds."""

    def effort(self) -> Effort | None:
        """Return what it does; None when it does not run, or is being stopped."""


class Verdict:
    """What follows from looks at a child; times in seconds on one clock."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._silent = self._quiet = 0.0
        self._cpu = -1.0

    def look(self, now: float, *, alive: bool, effort: Effort) -> str | None:
        """Take a look into account; return why the child counts as hanging, None when it does not.

        A long time between two looks says more about us (the machine slept) than about the child, so it counts little.
        """
        passed = min(now - self._last, LONGEST_STEP)
        works = effort.cpu != self._cpu or effort.status == psutil.STATUS_DISK_SLEEP
        self._last, self._cpu = now, effort.cpu
        if alive or effort.status == psutil.STATUS_TRACING_STOP:
            self._silent = self._quiet = 0.0
            return None
        self._silent += passed
        self._quiet = 0.0 if works else self._quiet + passed
        if self._quiet < QUIET_SECONDS and self._silent < SILENT_SECONDS:
            return None
        what = "stopped (SIGSTOP)" if effort.status == psutil.STATUS_STOPPED else "no sign of life"
        return f"{what} for {self._silent:.1f} s"


async def until_hanging(child: Watched) -> str | None:
    """Return why a child counts as hanging, as soon as it does; None when it has ended before."""
    loop = asyncio.get_running_loop()
    verdict = Verdict(loop.time())
    while True:
        asked = loop.time()
        alive = await child.answers(ANSWER_SECONDS)
        effort = child.effort()
        if effort is None:
            return None
        if reason := verdict.look(loop.time(), alive=alive, effort=effort):
            return reason
        await asyncio.sleep(LOOK_SECONDS if alive else asked + ANSWER_SECONDS - loop.time())
