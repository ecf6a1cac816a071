"""Who runs, who waits, who goes? A pure state machine: events in, decisions out.

It does no I/O and has no clock: every event carries `now` (seconds, monotonic) and returns the list of
decisions that it leads to, in the order they must be carried out. `fleet.py` is its only caller, always from
the event loop's thread. The rules:

- A request for a ready model is granted at once while its child has fewer than `max_in_flight`. Otherwise it waits,
  and its model is started when there is room.
- Who waits for the longest is next, and a step of priority is worth `priority_seconds` of waiting: so nobody is
  overtaken by those that come more than two steps later.
- There is room by number and by memory: `Limits.max_loaded` places, and in each pool of `Limits.budget` (the machine's
  memory, each GPU's) the bytes that a child needs beside those of all children that have not exited yet.
- Room is made by stopping idle models, those of least value first (`residency.value`); pinned ones never, and none in
  vain. Whose turn is first starts first: nobody takes the room that another one waits for.
- A model that can never fit, or not beside the pinned ones, is refused at once.
- A child that was told to stop gives its place up at once: `Limits.overlap` says how many may load while it exits.
- When busy models are in the way, the oldest waiter looks on for `max_wait` seconds; then those of them that have been
  ready for `min_residency` take no new requests, finish their running ones and make way. Running answers are never cut
  for this. Who still waits for them has the next turn after those that they made way for.
- A model that fails to start backs off: 1 s, 2 s, 4 s ... 60 s, and up to a quarter more by chance, so that many do
  not try at once; the first request after the pause tries, and an answer ends it. A crash after it was ready costs
  nothing the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

from supervisor.entry import COUNTED, OCCUPYING, STAYING, Entry, Priority, State, Waiter
from supervisor.errors import NotLoaded, QueueFull, ShuttingDown, StartFailed, SupervisorError, WaitTimeout
from supervisor.residency import Memory, excess, excess_error, fewest, fits, value

MAX_BACKOFF = 60.0
"""Longest pause in seconds between two starts of a model that keeps failing."""


MAX_JITTER = 0.25
"""Share of a pause that chance adds at most."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a child for `model`; answer with `ready` or `failed`."""

    model: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the child of `model`, cutting what still runs; answer with `stopped`."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Grant:
    """The request `ticket` may use its model now; answer with `release`."""

    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request `ticket` ends with `error`."""

    ticket: int
    error: SupervisorError


Decision = Start | Stop | Grant | Refuse


@dataclass(frozen=True)
class Limits:
    """The settings that the scheduler goes by; all times in seconds.

    `overlap` is how many children more than `max_loaded` there may be while some, told to stop, still exit. It
    saves a swap the time of an exit. It must be 0 where a start needs the memory of the child before it at once, as on
    a GPU. `budget` has the bytes of each pool that the children may take together, those that exit included.
    """

    max_loaded: int = 3
    overlap: int = 0
    max_wait: float = 5.0
    min_residency: float = 5.0
    max_in_flight: int = 64
    priority_seconds: float = 30.0
    queue_limit: int = 256
    queue_timeout: float = 600.0
    drain: float = 30.0
    budget: Memory = field(default_factory=dict)


class Scheduler:
    """The state of all models and their queues. See the module's docstring for the rules."""

    def __init__(self, limits: Limits, chance: Callable[[], float] = lambda: 0.0) -> None:
        """`chance` returns a random number from 0 to 1."""
        self.limits = limits
        self._chance = chance
        self.entries: dict[str, Entry] = {}
        self.closing = False
        self._tickets: dict[int, Entry] = {}  # waiting or granted

    # Events from requests

    def request(
        self,
        ticket: int,
        model: str,
        now: float,
        *,
        start: bool = True,
        priority: Priority = Priority.NORMAL,
        counts: bool = True,
    ) -> list[Decision]:
        """A request wants `model`. With `start=False` it may wait for a start but not cause one.

        With `counts=False` it is none of the `max_in_flight`, and no busy model keeps it waiting.
        """
        entry = self.entry(model)
        if self.closing:
            return [Refuse(ticket, ShuttingDown("the supervisor is shutting down", retry_after=5))]
        waiter = Waiter(now, now - priority * self.limits.priority_seconds, priority, counts)
        if entry.state is State.READY and self._has_room(entry, waiter):
            self._tickets[ticket] = entry
            self._lend(entry, ticket, waiter)
            entry.last_used = now
            return [Grant(ticket, model)]
        if entry.state is State.FAILED and now < entry.retry_at:
            assert entry.error is not None
            return [Refuse(ticket, _again(entry.error, entry.retry_at - now))]
        returns = entry.state in (State.DRAINING, State.STOPPING) and (entry.waiters or entry.wanted)
        if not start and entry.state not in STAYING and not returns:
            return [Refuse(ticket, NotLoaded(f"model {model!r} is not loaded", param="model"))]
        if len(entry.waiters) >= self.limits.queue_limit:
            entry.turned_away += 1
            full = QueueFull(model, entry.position(waiter.rank), len(entry.waiters), max(1.0, self.limits.max_wait))
            return [Refuse(ticket, full)]
        self._tickets[ticket] = entry
        entry.waiters[ticket] = waiter
        return self._schedule(now)

    def cancel(self, ticket: int, now: float) -> list[Decision]:
        """A waiting request's client has left. Unknown and granted tickets are ignored."""
        entry = self._tickets.get(ticket)
        if entry is None or ticket not in entry.waiters:
            return []
        del self._tickets[ticket]
        del entry.waiters[ticket]
        return self._schedule(now)

    def release(self, ticket: int, now: float, *, ok: bool = True) -> list[Decision]:
        """A granted request has ended; `ok` says that its child answered it."""
        entry = self._tickets.pop(ticket, None)
        if entry is None or ticket not in entry.leases:
            return []
        entry.leases.discard(ticket)
        entry.aside.discard(ticket)
        entry.last_used = now
        if ok and entry.state is State.READY:
            entry.failures = 0
        if not entry.leases and entry.state is State.DRAINING:
            return self._stop(entry, "drained") + self._schedule(now)
        granted = self._grant(entry)
        return granted + self._schedule(now) if self._anyone_waits() else granted

    # Events from people and files

    def load(self, model: str, now: float) -> list[Decision]:
        """Somebody wants `model` loaded; this ends a back-off."""
        entry = self.entry(model)
        if self.closing or entry.state in (State.STARTING, State.READY):
            return []
        entry.wanted = True
        entry.retry_at = now
        return self._schedule(now)

    def unload(self, model: str, now: float, *, force: bool = False) -> list[Decision]:
        """Somebody wants `model` gone: its waiters are refused, its running requests finish unless `force`."""
        entry = self.entry(model)
        entry.wanted = False
        refused = self._refuse_all(
            entry, NotLoaded(f"model {model!r} was unloaded while the request waited", param="model")
        )
        retired = self._retire(entry, now, "unloaded", force=force, bound=self.limits.drain)
        return refused + retired + self._schedule(now)

    def restart(self, model: str, now: float) -> list[Decision]:
        """The model's file or settings changed: running requests finish, later ones get a new child."""
        entry = self.entry(model)
        entry.retry_at = -inf
        if entry.state in OCCUPYING and (entry.pinned or entry.wanted):
            entry.wanted = True
        return self._retire(entry, now, "replaced") + self._schedule(now)

    def set_limits(self, limits: Limits, now: float) -> list[Decision]:
        """Go by other limits. Of models that are too many now those go that would make room for another."""
        self.limits = limits
        decisions: list[Decision] = []
        while not self._all_fit(self._in(STAYING)):
            candidates = [e for e in self._in(frozenset({State.READY})) if not e.pinned]
            if not candidates:
                break
            victim = min(candidates, key=lambda e: (bool(e.leases), self._value(e, now)))
            decisions += self._retire(victim, now, "fewer models may run")
        for entry in self.entries.values():
            decisions += self._grant(entry)
        return decisions + self.tick(now)

    def measured(self, model: str, needs: Memory, now: float) -> list[Decision]:
        """The child of `model` takes other bytes than was thought. Idle models go where all take too much now."""
        self.entry(model).needs = needs
        decisions: list[Decision] = []
        while not fits(self._in(STAYING), self.limits.budget) and (idle := self._idle()):
            victim = min(idle, key=lambda e: self._value(e, now))
            victim.made_room += 1
            decisions += self._stop(victim, f"model {model} takes more memory than was thought")
        return decisions + self._schedule(now)

    def remove(self, model: str, now: float, error: SupervisorError) -> list[Decision]:
        """The model's file is gone: waiters get `error`, running requests finish."""
        entry = self.entry(model)
        entry.wanted = False
        return self._refuse_all(entry, error) + self._retire(entry, now, "removed") + self._schedule(now)

    def shutdown(self, now: float) -> list[Decision]:
        """No new work; running requests may finish within the drain time."""
        self.closing = True
        decisions: list[Decision] = []
        for entry in self.entries.values():
            entry.wanted = False
            error = ShuttingDown("the supervisor is shutting down", retry_after=5)
            decisions += self._refuse_all(entry, error)
            decisions += self._retire(entry, now, "shutdown", bound=self.limits.drain)
        return decisions

    # Events from children

    def ready(self, model: str, now: float) -> list[Decision]:
        """The child of `model` can serve."""
        entry = self.entry(model)
        if entry.state is not State.STARTING:
            return []  # it was told to stop meanwhile
        entry.state = State.READY
        entry.ready_at = entry.last_used = now
        entry.wanted = False
        entry.error = None
        return self._grant(entry) + self._schedule(now)

    def failed(self, model: str, error: SupervisorError, now: float) -> list[Decision]:
        """The child of `model` did not become ready, or died."""
        entry = self.entry(model)
        was = entry.state
        if was is State.STOPPING:
            return []  # `stopped` follows
        entry.state = State.FAILED
        entry.drain_until = inf
        entry.wanted = False
        entry.error = error
        entry.failures += 1
        steps = entry.failures - 1 if was is State.STARTING else entry.failures - 2
        pause = min(MAX_BACKOFF, 2.0**steps) * (1 + MAX_JITTER * self._chance()) if steps >= 0 else 0.0
        entry.retry_at = now + pause
        if was is State.STARTING:
            entry.start_failures += 1
            return self._refuse_all(entry, _again(error, entry.retry_at - now)) + self._schedule(now)
        entry.restarts += 1
        return self._schedule(now)

    def stopped(self, model: str, now: float) -> list[Decision]:
        """The child of `model` is gone, as `Stop` asked."""
        entry = self.entry(model)
        entry.state = State.ABSENT
        entry.drain_until = inf
        return self._schedule(now)

    # Time

    def tick(self, now: float) -> list[Decision]:
        """Do what is due by now; call it at `next_tick`."""
        decisions: list[Decision] = []
        for entry in self.entries.values():
            decisions += self._time_out(entry, now)
            if entry.state is State.DRAINING and now >= entry.drain_until:
                decisions += self._stop(entry, "drain time over")
            elif self._idle_until(entry) <= now:
                entry.idled_out += 1
                decisions += self._stop(entry, "idle")
        return decisions + self._schedule(now)

    def next_tick(self, now: float) -> float | None:
        """Return when `tick` must be called next, or None when nothing is due."""
        due = inf
        for entry in self.entries.values():
            if entry.waiters:
                due = min(due, entry.oldest() + self.limits.queue_timeout)
                if entry.state is State.FAILED and now < entry.retry_at:
                    due = min(due, entry.retry_at)
            if entry.state is State.DRAINING:
                due = min(due, entry.drain_until)
            due = min(due, self._idle_until(entry))
        due = min([due, *(self._room_at(entry, before, now)[0] for entry, before in self._queue(now))])
        return None if due == inf else max(now, due)

    def is_calm(self) -> bool:
        """Whether nothing is ever due as things stand; a cheap look for the way of every request."""
        draining = State.DRAINING
        for entry in self.entries.values():
            if entry.waiters or entry.idle_unload or entry.state is draining:
                return False
        return True

    # Views

    def overdue(self, now: float) -> list[str]:
        """Return what should have happened by now and did not; empty as long as events and ticks come as they must."""
        found = []
        first = next(iter(self._due(now)), None) if not self.closing else None
        for entry in self.entries.values():
            if entry.oldest() + self.limits.queue_timeout <= now:
                found.append(
                    f"a request for model {entry.model!r} waits for longer than inference.queue_timeout_seconds"
                )
            if entry.state is State.DRAINING and entry.drain_until <= now:
                found.append(f"model {entry.model!r} still drains though its time is over")
            if entry is first and self._can_start(entry):
                found.append(f"model {entry.model!r} could start and does not")
        return found

    def entry(self, model: str) -> Entry:
        """Return what is known of `model`, making a blank entry the first time."""
        entry = self.entries.get(model)
        if entry is None:
            entry = self.entries[model] = Entry(model)
        return entry

    def running(self) -> list[str]:
        """Return the models that can be used now, the first loaded first."""
        ready = (entry for entry in self.entries.values() if entry.state is State.READY)
        return [entry.model for entry in sorted(ready, key=lambda entry: entry.ready_at)]

    def taken(self) -> dict[str, int]:
        """Return the bytes that all children take, by pool of the budget."""
        there = self._in(OCCUPYING)
        return {pool: sum(e.needs.get(pool, 0) for e in there) for pool in self.limits.budget}

    # The rules

    def _schedule(self, now: float) -> list[Decision]:
        """Start what is wanted, by rank, making room where the rules allow it."""
        if self.closing:
            return []
        decisions: list[Decision] = []
        for entry in self._due(now):
            if error := self._never(entry):
                entry.wanted = False
                decisions += self._refuse_all(entry, error)
        for entry, before in self._queue(now):
            decisions += self._make_room(entry, before, now)
        for entry in self._due(now):
            if not self._can_start(entry):
                break  # nobody takes the room that it waits for
            entry.state = State.STARTING
            entry.made_way_at = -inf
            entry.starts += 1
            decisions.append(Start(entry.model))
        return decisions

    def _due(self, now: float) -> list[Entry]:
        """Return what is to be started, in this order."""
        return sorted((e for e in self.entries.values() if self._wants_start(e, now)), key=Entry.turn)

    def _queue(self, now: float) -> Iterator[tuple[Entry, list[Entry]]]:
        """Iterate over what is to be started and has no room yet, each with what starts before it."""
        before: list[Entry] = []
        for entry in self._due(now):
            if not self._all_fit([*self._in(STAYING), *before, entry]):
                yield entry, before
            before.append(entry)

    def _never(self, entry: Entry) -> SupervisorError | None:
        """Return why `entry` cannot be started however long it waits, None when it can."""
        if over := excess([entry], self.limits.budget):
            return excess_error(entry.model, over, entry.needs, self.limits.budget)
        pinned = [e for e in self._in(STAYING) if e.pinned]
        if len(pinned) >= self.limits.max_loaded:
            told = f"model {entry.model!r} cannot be loaded: all {self.limits.max_loaded} running are pinned"
            return NotLoaded(told, param="model")
        if excess([entry, *pinned], self.limits.budget):
            names = ", ".join(e.model for e in pinned)
            told = f"model {entry.model!r} cannot be loaded: the memory is taken by pinned models ({names})"
            return NotLoaded(told, param="model")
        return None

    def _make_room(self, entry: Entry, before: list[Entry], now: float) -> list[Decision]:
        """Let models go so that `entry` can start, or nothing when too few may go yet."""
        when, victims = self._room_at(entry, before, now)
        if when > now:
            return []
        decisions: list[Decision] = []
        for victim in victims:
            victim.made_room += 1
            victim.made_way_at = now
            decisions += self._retire(victim, now, f"making room for {entry.model}")
        return decisions

    def _room_at(self, entry: Entry, before: list[Entry], now: float) -> tuple[float, list[Entry]]:
        """Return when there can be room for `entry` beside what starts `before` it, and who must go for it then."""
        idle = sorted(self._idle(), key=lambda e: self._value(e, now))
        busy = [e for e in self._in(frozenset({State.READY})) if e.leases and not e.pinned]
        late = [(max(now, self._patience_ends(entry, e)), self._value(e, now), e) for e in busy]
        order = [(now, e) for e in idle] + [(when, e) for when, _, e in sorted(late, key=lambda one: one[:2])]
        staying = [*self._in(STAYING), *before, entry]

        def enough(going: list[Entry]) -> bool:
            names = {e.model for e in going}
            return self._all_fit([e for e in staying if e.model not in names])

        going: list[Entry] = []
        for when, victim in order:
            going.append(victim)
            if enough(going):
                return when, fewest(going, enough)
        return inf, []

    def _retire(
        self, entry: Entry, now: float, reason: str, *, force: bool = False, bound: float = inf
    ) -> list[Decision]:
        """Stop a child after its running requests, at most `bound` seconds from now; at once with `force`."""
        if entry.state is State.STARTING or (entry.state is State.READY and not entry.leases):
            return self._stop(entry, reason)
        if entry.state in (State.READY, State.DRAINING):
            if force:
                return self._stop(entry, reason)
            entry.state = State.DRAINING
            entry.drain_until = min(entry.drain_until, now + bound)
        elif entry.state is State.FAILED:
            entry.state = State.ABSENT
        return []

    def _stop(self, entry: Entry, reason: str) -> list[Decision]:
        entry.state = State.STOPPING
        return [Stop(entry.model, reason)]

    def _wants_start(self, entry: Entry, now: float) -> bool:
        if entry.state is State.ABSENT or (entry.state is State.FAILED and now >= entry.retry_at):
            return bool(entry.waiters) or entry.wanted
        return False

    def _patience_ends(self, waiting: Entry, busy: Entry) -> float:
        """Return when `busy` may be drained for `waiting`: one has waited, the other served, for long enough."""
        if not waiting.waiters:
            return inf
        return max(waiting.turn()[0] + self.limits.max_wait, busy.ready_at + self.limits.min_residency)

    def _all_fit(self, entries: list[Entry]) -> bool:
        """Tell whether so many and so large children may run."""
        return len(entries) <= self.limits.max_loaded and fits(entries, self.limits.budget)

    def _can_start(self, entry: Entry) -> bool:
        """Tell whether there is room for `entry` now, beside children that drain or exit."""
        there = self._in(OCCUPYING)
        counted = sum(e.state in COUNTED for e in there)
        most = self.limits.max_loaded
        by_number = counted < most and len(there) < most + self.limits.overlap
        return by_number and fits([*there, entry], self.limits.budget)

    def _idle(self) -> list[Entry]:
        """Return the models that can be stopped at once."""
        return [e for e in self.entries.values() if e.state is State.READY and not e.leases and not e.pinned]

    def _value(self, entry: Entry, now: float) -> float:
        """Return what it is worth to keep the model."""
        return value(entry.cost, now - entry.last_used, entry.idle_unload)

    def _in(self, states: frozenset[State]) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state in states]

    def _idle_until(self, entry: Entry) -> float:
        if entry.state is not State.READY or entry.leases or entry.pinned or entry.idle_unload <= 0:
            return inf
        return entry.last_used + entry.idle_unload

    def _anyone_waits(self) -> bool:
        return any(entry.waiters or entry.wanted for entry in self.entries.values())

    def _has_room(self, entry: Entry, waiter: Waiter) -> bool:
        return not waiter.counts or entry.in_flight() < self.limits.max_in_flight

    def _lend(self, entry: Entry, ticket: int, waiter: Waiter) -> None:
        entry.leases.add(ticket)
        if not waiter.counts:
            entry.aside.add(ticket)

    def _grant(self, entry: Entry) -> list[Decision]:
        """Give waiters a lease, by rank, as far as the child is ready and may have more."""
        granted: list[Decision] = []
        if entry.state is not State.READY or not entry.waiters:
            return granted
        for ticket, waiter in entry.queue():
            if self._has_room(entry, waiter):
                del entry.waiters[ticket]
                self._lend(entry, ticket, waiter)
                granted.append(Grant(ticket, entry.model))
        return granted

    def _time_out(self, entry: Entry, now: float) -> list[Decision]:
        """Refuse those who have waited for too long."""
        refused: list[Decision] = []
        for ticket, waiter in list(entry.waiters.items()):
            if now < waiter.since + self.limits.queue_timeout:
                break
            place, length = entry.position(waiter.rank) - 1, len(entry.waiters)
            self._forget(entry, ticket)
            entry.timed_out += 1
            error = WaitTimeout(entry.model, place, length, now - waiter.since, self.limits.max_wait)
            refused.append(Refuse(ticket, error))
        return refused

    def _refuse_all(self, entry: Entry, error: SupervisorError) -> list[Decision]:
        refused: list[Decision] = [Refuse(ticket, error) for ticket in entry.waiters]
        for ticket in list(entry.waiters):
            self._forget(entry, ticket)
        return refused

    def _forget(self, entry: Entry, ticket: int) -> None:
        del entry.waiters[ticket]
        del self._tickets[ticket]

    def tickets(self) -> Iterator[int]:
        """Iterate over all requests that wait or hold a lease."""
        return iter(self._tickets)


def _again(error: SupervisorError, wait: float) -> SupervisorError:
    """Return `error` with the time in seconds after which a new try makes sense."""
    message = f"{error.message}" if wait <= 0 else f"{error.message}\n(next try in {wait:.0f} s)"
    return StartFailed(message, param=error.param, retry_after=max(1.0, wait))
