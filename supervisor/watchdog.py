"""Does a running child still do anything? One that hangs is found in under 5 s, one that only works hard is left alone.

A sign of life is an answer to /health on a connection of its own, or a byte on any other. A child without one that
takes no CPU time either hangs: it was stopped, or deadlocked, or lost its socket. One that computes or waits for the
disk hangs after a minute without a sign of life, and one that a debugger looks at never.

/health is answered by a thread of its own, also when the one that decodes is stuck. So when requests are in flight and
none gets a byte, the child is asked something that only the decoding thread answers, between two batches. One that does
not, and computes and reads next to nothing meanwhile, hangs too; a long prompt takes CPU time.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, Protocol

import psutil

LOOK_SECONDS: Final = 1.0
"""Pause after an answer before the next question, while somebody waits for one."""

IDLE_LOOK_SECONDS: Final = 2.0
"""The same while nobody does: it is then found in 4.3 s."""

ANSWER_SECONDS: Final = 0.75
"""How long an answer may take before the child is asked again."""

QUIET_SECONDS: Final = 3.0
"""How long a child may give no sign of life and take no CPU time."""

LONGEST_STEP: Final = 1.9
"""Most seconds that count between two looks: far more pass where the machine slept, and say nothing of the child."""

SILENT_SECONDS: Final = 60.0
"""How long it may give no sign of life though it works."""


SUSPECT_SECONDS: Final = 5.0
"""How long requests may be in flight without a byte before the decoding thread is asked."""

STUCK_SECONDS: Final = 30.0
"""How long it may leave the question unanswered while the child does next to nothing."""

IDLE_SHARE: Final = 0.02
"""Share of one core that a child which does next to nothing takes at most: it still answers /health."""

IDLE_CPU: Final = 0.05
"""CPU seconds that do not count, for times are told in steps of 0.01 s."""


class Effort(NamedTuple):
    """What the system tells of a process: CPU time in seconds, psutil's word for what it does, bytes read from disk."""

    cpu: float
    status: str
    read: int = 0


class Watched(Protocol):
    """What is needed of a child."""

    async def answers(self, seconds: float) -> bool:
        """Tell whether it shows life within so many seconds."""

    def effort(self) -> Effort | None:
        """Return what it does; None when it does not run, or is being stopped."""

    def busy(self) -> bool:
        """Tell whether requests are in flight."""

    def waits(self) -> bool:
        """Tell whether requests are in flight and none has got a byte since the last time."""

    async def decodes(self) -> None:
        """Return when its decoding thread has answered a question, or it cannot be asked."""


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


class Progress:
    """What follows from looks at a child that answers /health; times in seconds on one clock."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._waiting = self._stuck = 0.0
        self._began = Effort(0.0, "")

    def look(self, now: float, *, waits: bool, asked: bool, effort: Effort) -> str | None:
        """Take a look into account; return why the child counts as hanging, None when it does not.

        `waits`: as `Watched.waits`; `asked`: its decoding thread has been asked and has not answered.
        """
        passed = min(now - self._last, LONGEST_STEP)
        self._last = now
        self._waiting = self._waiting + passed if waits or asked else 0.0
        works = effort.cpu - self._began.cpu > IDLE_CPU + IDLE_SHARE * self._stuck or effort.read != self._began.read
        if not asked or works or effort.status in (psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP):
            self._stuck, self._began = 0.0, effort
            return None
        self._stuck += passed
        if self._stuck < STUCK_SECONDS:
            return None
        return f"no progress with the requests in flight for {self._waiting:.1f} s"

    def answered(self) -> None:
        """The decoding thread has answered: whoever waits does so for something else."""
        self._waiting = 0.0

    @property
    def suspect(self) -> bool:
        """Whether the decoding thread is to be asked."""
        return self._waiting >= SUSPECT_SECONDS


async def until_hanging(child: Watched) -> str | None:
    """Return why a child counts as hanging, as soon as it does; None when it has ended before."""
    loop = asyncio.get_running_loop()
    verdict, progress = Verdict(loop.time()), Progress(loop.time())
    question: asyncio.Task[None] | None = None
    try:
        while True:
            asked = loop.time()
            alive = await child.answers(ANSWER_SECONDS)
            effort = child.effort()
            if effort is None:
                return None
            if question is not None and question.done():
                question = None
                progress.answered()
            waits = child.waits()
            reason = verdict.look(loop.time(), alive=alive, effort=effort) or progress.look(
                loop.time(), waits=waits, asked=question is not None, effort=effort
            )
            if reason:
                return reason
            if question is None and progress.suspect:
                question = asyncio.create_task(child.decodes())
            pause = LOOK_SECONDS if child.busy() else IDLE_LOOK_SECONDS
            await asyncio.sleep(pause if alive else asked + ANSWER_SECONDS - loop.time())
    finally:
        if question is not None:
            question.cancel()
