"""What counts as hanging, with time as a number."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from supervisor import watchdog
from supervisor.watchdog import (
    ANSWER_SECONDS,
    IDLE_LOOK_SECONDS,
    LOOK_SECONDS,
    QUIET_SECONDS,
    SILENT_SECONDS,
    STUCK_SECONDS,
    SUSPECT_SECONDS,
    Effort,
    Progress,
    Verdict,
    until_hanging,
)

SLEEPS = psutil.STATUS_SLEEPING


def looks(
    verdict: Verdict, until: float, step: float = 0.75, *, status: str = SLEEPS, rate: float = 0.0
) -> float | None:
    """Look every `step` seconds at a child without a sign of life; return when it counts as hanging."""
    now = step
    while now <= until:
        if verdict.look(now, alive=False, effort=Effort(1 + rate * now, status)):
            return now
        now += step
    return None


@pytest.mark.parametrize("status", [SLEEPS, psutil.STATUS_STOPPED])
def test_a_child_that_does_nothing_hangs(status):
    verdict = Verdict(0)
    assert verdict.look(0, alive=True, effort=Effort(1, SLEEPS)) is None
    found = looks(verdict, 60, status=status)
    assert found is not None
    assert QUIET_SECONDS <= found < 5


@pytest.mark.parametrize("pause", [LOOK_SECONDS, IDLE_LOOK_SECONDS])
def test_one_that_hangs_right_after_an_answer_is_found_in_time(pause):
    verdict = Verdict(0)
    assert verdict.look(0, alive=True, effort=Effort(1, SLEEPS)) is None
    now = pause + ANSWER_SECONDS
    while not verdict.look(now, alive=False, effort=Effort(1, SLEEPS)):
        now += ANSWER_SECONDS
    assert QUIET_SECONDS <= now < 4.5


def test_one_that_works_or_reads_has_a_minute():
    for more in ({"rate": 0.5}, {"status": psutil.STATUS_DISK_SLEEP}):
        found = looks(Verdict(0), 200, **more)
        assert found is not None
        assert SILENT_SECONDS <= found < SILENT_SECONDS + 2


def test_one_in_a_debugger_never_hangs():
    assert looks(Verdict(0), 1000, status=psutil.STATUS_TRACING_STOP) is None


def test_a_sign_of_life_begins_it_anew():
    verdict = Verdict(0)
    effort = Effort(1, SLEEPS)
    for now in range(100):
        assert verdict.look(now, alive=now % 3 == 0, effort=effort) is None


def test_a_machine_that_slept_is_no_reason():
    verdict = Verdict(0)
    effort = Effort(1, SLEEPS)
    assert verdict.look(1, alive=True, effort=effort) is None
    assert verdict.look(5000, alive=False, effort=effort) is None
    assert verdict.look(5001, alive=True, effort=effort) is None


def progress(until: float, *, rate: float = 0.0, read: int = 0, waits: bool = True, status: str = SLEEPS):
    """Look every second at a child that answers /health but not the question; return when it counts as hanging."""
    one = Progress(0)
    for now in range(1, int(until)):
        effort = Effort(1 + rate * now, status, read * now)
        if one.look(now, waits=waits, asked=one.suspect, effort=effort):
            return now
    return None


def test_a_child_that_answers_but_does_not_decode_hangs():
    for rate in (0.0, 0.01):  # what /health takes
        found = progress(100, rate=rate)
        assert found is not None
        assert STUCK_SECONDS + SUSPECT_SECONDS <= found <= STUCK_SECONDS + SUSPECT_SECONDS + 2


@pytest.mark.parametrize(
    "more",
    [
        {"rate": 0.05},
        {"read": 1},
        {"waits": False},
        {"status": psutil.STATUS_TRACING_STOP},
        {"status": psutil.STATUS_DISK_SLEEP},
    ],
)
def test_one_that_computes_or_reads_or_has_nothing_to_do_does_not(more):
    assert progress(1000, **more) is None


def test_an_answered_question_begins_it_anew():
    one = Progress(0)
    for now in range(1, 1000):
        assert one.look(now, waits=True, asked=one.suspect and now % 10 > 0, effort=Effort(1, SLEEPS)) is None
        if now % 10 == 0:
            one.answered()


class Child:
    """A child that answers some questions and then hangs; it ends after `looks` looks."""

    def __init__(self, answered: int, looks: int, *, status: str = psutil.STATUS_STOPPED, stuck: bool = False) -> None:
        self.answered, self.left, self.status, self.stuck = answered, looks, status, stuck
        self.questions = 0

    async def answers(self, seconds: float) -> bool:
        self.answered -= 1
        return self.answered >= 0

    def effort(self) -> Effort | None:
        self.left -= 1
        return Effort(1, self.status) if self.left >= 0 else None

    def busy(self) -> bool:
        return True

    def waits(self) -> bool:
        return True

    async def decodes(self) -> None:
        self.questions += 1
        if self.stuck:
            await asyncio.Event().wait()


@pytest.fixture
def fast(monkeypatch):
    for name in (
        "LOOK_SECONDS",
        "IDLE_LOOK_SECONDS",
        "ANSWER_SECONDS",
        "QUIET_SECONDS",
        "SUSPECT_SECONDS",
        "STUCK_SECONDS",
    ):
        monkeypatch.setattr(watchdog, name, 0.001)


async def test_watching(fast):
    reason = await until_hanging(Child(3, 1000))
    assert reason is not None
    assert reason.startswith("stopped (SIGSTOP) for ")
    assert await until_hanging(Child(10, 5)) is None


async def test_watching_one_whose_decoding_thread_is_stuck(fast):
    stuck = Child(1000, 1000, status=SLEEPS, stuck=True)
    reason = await until_hanging(stuck)
    assert reason is not None
    assert reason.startswith("no progress with the requests in flight for ")
    assert stuck.questions == 1  # they would pile up
    slow = Child(100, 100, status=SLEEPS)
    assert await until_hanging(slow) is None
    assert slow.questions > 1
