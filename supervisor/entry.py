"""What does the scheduler know of one model, and in which order do requests wait for it?

Only `scheduler.py` changes what is here. All times are in seconds, on the clock of the scheduler's caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import inf
from typing import NamedTuple

from supervisor.errors import SupervisorError
from supervisor.residency import Memory


class State(StrEnum):
    """Where a model's child is in its life; all changes happen in `Scheduler`."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


STAYING = frozenset({State.STARTING, State.READY})
"""States of a child that nobody asked to go."""

COUNTED = STAYING | {State.DRAINING}
"""States in which a child has one of the `max_loaded` places."""

OCCUPYING = COUNTED | {State.STOPPING}
"""States in which a child holds memory."""


class Priority(IntEnum):
    """How urgent a request is. A step is worth some seconds of waiting, so nobody is overtaken for longer."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


class Waiter(NamedTuple):
    """A request in the queue: who has the lowest rank is next.

    `rank` is `since`, moved by the seconds that its priority is worth. `counts`: it is one of the `max_in_flight`.
    """

    since: float
    rank: float
    priority: Priority = Priority.NORMAL
    counts: bool = True


@dataclass(slots=True)
class Entry:
    """What the scheduler knows of one model."""

    model: str
    state: State = State.ABSENT
    pinned: bool = False
    idle_unload: float = 0.0  # seconds; 0: never
    wanted: bool = False  # asked to be loaded, whether or not a request waits
    leases: set[int] = field(default_factory=set)
    aside: set[int] = field(default_factory=set)  # those leases that are not of the `max_in_flight`
    waiters: dict[int, Waiter] = field(default_factory=dict)  # by ticket, the oldest first
    last_used: float = -inf
    ready_at: float = -inf
    made_way_at: float = -inf  # it went for another, and has its turn after those that waited then
    drain_until: float = inf  # a draining child is cut then
    failures: int = 0  # in a row
    retry_at: float = -inf
    restarts: int = 0  # it died after it was ready; this and the next six count since the supervisor began
    starts: int = 0
    start_failures: int = 0
    made_room: int = 0
    idled_out: int = 0
    turned_away: int = 0  # its queue was full
    timed_out: int = 0
    error: SupervisorError | None = None
    needs: Memory = field(default_factory=dict)  # bytes by pool, of its child or, when it has none, of the next one
    cost: float = 1.0  # seconds to load it

    def oldest(self) -> float:
        """Return since when the oldest waiter waits; infinite when none does."""
        return next((waiter.since for waiter in self.waiters.values()), inf)

    def turn(self) -> tuple[float, float]:
        """Return what sorts the models that want to start: the rank of the next waiter first."""
        rank = min((waiter.rank for waiter in self.waiters.values()), default=inf)
        return max(rank, self.made_way_at), self.made_way_at

    def queue(self) -> list[tuple[int, Waiter]]:
        """Return the waiters with their tickets, the next one first."""
        return sorted(self.waiters.items(), key=lambda item: item[1].rank)

    def position(self, rank: float) -> int:
        """Return the place in the queue of one who comes now with `rank`, from 1."""
        return 1 + sum(waiter.rank <= rank for waiter in self.waiters.values())

    def in_flight(self) -> int:
        """Return how many of the `max_in_flight` requests its child has."""
        return len(self.leases) - len(self.aside)
