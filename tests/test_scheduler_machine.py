"""The scheduler alone, under random events: the rules that must always hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor.entry import COUNTED, OCCUPYING, STAYING, Entry, Priority, State, Waiter
from supervisor.errors import ModelNotFound, StartFailed
from supervisor.residency import excess, fits
from supervisor.scheduler import Decision, Grant, Limits, Refuse, Scheduler, Start, Stop

BOOM = StartFailed("boom")


class Machine(RuleBasedStateMachine):
    """Random events against the rules that must always hold."""

    models = st.sampled_from(["a", "b", "c", "d"])
    sizes = st.fixed_dictionaries({"ram": st.integers(0, 6), "gpu0": st.integers(0, 3)})
    budgets = st.just({}) | st.fixed_dictionaries({"ram": st.integers(4, 12), "gpu0": st.integers(3, 6)})

    def __init__(self) -> None:
        super().__init__()
        self.s = Scheduler(Limits())
        self.pinned: set[str] = set()
        self.now = 0.0
        self.next_ticket = 1
        self.waiting: dict[int, str] = {}
        self.asked: dict[int, Waiter] = {}
        self.leases: dict[int, str] = {}
        self.children: Counter[str] = Counter()
        self.stopping: set[str] = set()
        self.draining: set[str] = set()
        self.there: set[tuple[str, int]] = set()  # children after the event before, by model and number

    @initialize(
        overlap=st.integers(0, 2),
        pinned=st.sets(models, max_size=3),
        max_in_flight=st.integers(1, 4),
        max_wait=st.sampled_from([0, 5]),
        min_residency=st.sampled_from([0, 3, 12]),
        most=st.integers(1, 4),
        budget=budgets,
        costs=st.lists(st.floats(0.1, 100), min_size=4, max_size=4),
    )
    def set_up(
        self,
        overlap: int,
        pinned: set[str],
        max_in_flight: int,
        max_wait: float,
        min_residency: float,
        most: int,
        budget: dict[str, int],
        costs: list[float],
    ) -> None:
        self.s = Scheduler(
            Limits(
                max_loaded=most,
                overlap=overlap,
                max_wait=max_wait,
                min_residency=min_residency,
                max_in_flight=max_in_flight,
                priority_seconds=10,
                queue_limit=8,
                queue_timeout=50,
                drain=20,
                budget=budget,
            )
        )
        self.pinned = pinned
        self.allowed = {"counted": most, "occupied": most + overlap}
        for model, cost in zip("abcd", costs, strict=True):
            self.s.entry(model).cost = cost

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(model):
                    assert self.children[model] == 0, "one child for each model"
                    self.children[model] += 1
                    self.s.entry(model).pinned = model in self.pinned
                case Stop(model):
                    assert self.children[model] == 1, "only what runs is stopped"
                    assert model not in self.stopping
                    self.stopping.add(model)
                case Grant(ticket, model):
                    state = self.s.entry(model).state  # it may begin to drain at the same moment
                    assert state is State.READY or (state is State.DRAINING and model not in self.draining)
                    assert self.children[model] == 1
                    assert model not in self.stopping, "leases only on ready children"
                    assert self.waiting.pop(ticket) == model
                    self.leases[ticket] = model
                    self.check_turn(ticket, model)
                case Refuse(ticket):
                    assert self.waiting.pop(ticket, None) is not None
        self.draining = {e.model for e in self.s.entries.values() if e.state is State.DRAINING}

    def check_turn(self, ticket: int, model: str) -> None:
        """A request overtakes those of its model that are less urgent and came a little earlier, and nobody else."""
        granted = self.asked[ticket]
        if not granted.counts:
            return
        for waiter in self.s.entry(model).waiters.values():
            if waiter.counts:
                assert granted.since - waiter.since <= 10 * max(0, granted.priority - waiter.priority)

    @rule(model=models, start=st.booleans(), priority=st.sampled_from(Priority), counts=st.booleans(), needs=sizes)
    def request(self, model: str, start: bool, priority: Priority, counts: bool, needs: dict[str, int]) -> None:
        """A model that does not run may have other settings each time."""
        entry = self.s.entry(model)
        if entry.state not in OCCUPYING and not entry.waiters and not entry.wanted:
            entry.needs = needs
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.waiting[ticket] = model
        self.asked[ticket] = Waiter(self.now, 0.0, priority, counts)
        self.carry_out(self.s.request(ticket, model, self.now, start=start, priority=priority, counts=counts))

    @precondition(lambda self: any(self.children.values()))
    @rule(data=st.data(), needs=sizes)
    def measured(self, data: st.DataObject, needs: dict[str, int]) -> None:
        model = data.draw(st.sampled_from(sorted(m for m, n in self.children.items() if n)))
        self.carry_out(self.s.measured(model, needs, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        self.carry_out(self.s.cancel(ticket, self.now))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), ok=st.booleans())
    def release(self, data: st.DataObject, ok: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[ticket]
        self.carry_out(self.s.release(ticket, self.now, ok=ok))

    @rule(model=models, event=st.sampled_from(["load", "unload", "force", "restart", "remove"]))
    def people(self, model: str, event: str) -> None:
        match event:
            case "load":
                self.carry_out(self.s.load(model, self.now))
            case "unload" | "force":
                self.carry_out(self.s.unload(model, self.now, force=event == "force"))
            case "restart":
                self.carry_out(self.s.restart(model, self.now))
            case "remove":
                self.carry_out(self.s.remove(model, self.now, ModelNotFound(model, [], 0)))

    @precondition(lambda self: any(self.children.values()))
    @rule(data=st.data(), ready=st.booleans())
    def child(self, data: st.DataObject, ready: bool) -> None:
        model = data.draw(st.sampled_from(sorted(m for m, n in self.children.items() if n)))
        if model in self.stopping:
            self.stopping.discard(model)
            self.children[model] = 0
            self.carry_out(self.s.stopped(model, self.now))
        elif ready and self.s.entry(model).state is State.STARTING:
            self.carry_out(self.s.ready(model, self.now))
        else:
            self.children[model] = 0
            self.carry_out(self.s.failed(model, BOOM, self.now))

    @rule(most=st.integers(1, 3), in_flight=st.integers(1, 4), budget=budgets)
    def other_limits(self, most: int, in_flight: int, budget: dict[str, int]) -> None:
        limits = replace(self.s.limits, max_loaded=most, max_in_flight=in_flight, budget=budget)
        self.carry_out(self.s.set_limits(limits, self.now))

    @rule(seconds=st.floats(0.01, 30))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(1000):
            due = self.s.next_tick(self.now)
            if due is None or due > end:
                break
            assert due >= self.now
            self.now = due
            before = self.s.next_tick(self.now)
            self.carry_out(self.s.tick(self.now))
            after = self.s.next_tick(self.now)
            assert after is None or after > self.now or after != before, "a tick that is due must change something"
        else:
            raise AssertionError("ticks without end")
        self.now = end

    @invariant()
    def budget_holds(self) -> None:
        """Where the limit was lowered, no more start until those that are too many have gone."""
        occupied = [e for e in self.s.entries.values() if e.state in OCCUPYING]
        most = self.s.limits.max_loaded
        found = {"counted": sum(e.state in COUNTED for e in occupied), "occupied": len(occupied)}
        limits = {"counted": most, "occupied": most + self.s.limits.overlap}
        for name, number in found.items():
            assert number <= max(self.allowed[name], limits[name])
            self.allowed[name] = max(number, limits[name])
        assert {e.model for e in occupied} == {m for m, n in self.children.items() if n}

    @invariant()
    def budget_in_bytes_holds(self) -> None:
        """Where the budget was lowered or a child grew, nothing starts until the children that are there fit again."""
        occupied = [e for e in self.s.entries.values() if e.state in OCCUPYING]
        there = {(e.model, e.starts) for e in occupied}
        assert fits(occupied, self.s.limits.budget) or there <= self.there, "a start went over the budget"
        self.there = there

    @invariant()
    def no_room_is_wasted(self) -> None:
        entries, limits = self.s.entries.values(), self.s.limits
        wanting = [e for e in entries if e.state is State.ABSENT and (bool(e.waiters) or e.wanted)]
        if not wanting:
            return
        occupied = [e for e in entries if e.state in OCCUPYING]
        first = min(wanting, key=Entry.turn)
        full = len(occupied) >= limits.max_loaded + limits.overlap
        full = full or sum(e.state in COUNTED for e in entries) >= limits.max_loaded
        assert full or not fits([*occupied, first], limits.budget), "who could start does not wait"
        staying = [e for e in entries if e.state in STAYING]
        left = [e for e in staying if e.pinned or e.leases or e.state is not State.READY]
        idle = len(staying) - len(left)
        room = len(left) + len(wanting) <= limits.max_loaded and fits([*left, *wanting], limits.budget)
        enough = len(staying) + len(wanting) <= limits.max_loaded and fits([*staying, *wanting], limits.budget)
        assert not (idle and room) or enough, "idle models make room"

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        for entry in self.s.entries.values():
            if entry.state is State.ABSENT and entry.waiters and not self.s.closing:
                assert not excess([entry], self.s.limits.budget)

    @invariant()
    def nobody_waits_past_the_bound(self) -> None:
        """No busy model that has been there for long enough is in the way of one whose waiter has had `max_wait`."""
        limits = self.s.limits
        ready = [e for e in self.s.entries.values() if e.state is State.READY and not e.pinned]
        latest = self.now - limits.min_residency
        enough = [e for e in ready if not e.leases or e.ready_at <= latest]
        if not enough:
            return
        absent = [e for e in self.s.entries.values() if e.state is State.ABSENT and e.waiters]
        late = [e for e in absent if self.due(e) <= self.now]
        if not late:
            return
        first = min(late, key=Entry.turn)
        staying = [e for e in self.s.entries.values() if e.state in STAYING]
        left = [e for e in staying if e not in enough]
        possible = len(left) < limits.max_loaded and fits([*left, first], limits.budget)
        there = len(staying) < limits.max_loaded and fits([*staying, first], limits.budget)
        assert there or not possible, "somebody has waited long enough, and nobody makes way"
        if not limits.budget:
            assert len(late) <= max(0, limits.max_loaded - len(staying)), "all of them have"

    def due(self, entry: Entry) -> float:
        """Return when a busy model must make way for `entry`."""
        rank = min(w.since - 10 * w.priority for w in entry.waiters.values())
        return max(rank, entry.made_way_at) + self.s.limits.max_wait

    @invariant()
    def no_child_has_too_many_requests(self) -> None:
        """Where the limit was lowered, or a child died, those from before count too."""
        for entry in self.s.entries.values():
            assert entry.aside <= entry.leases
            assert entry.aside == {ticket for ticket in entry.leases if not self.asked[ticket].counts}
            if entry.state is State.READY and entry.waiters:
                assert all(waiter.counts for waiter in entry.waiters.values())
                assert entry.in_flight() >= self.s.limits.max_in_flight, "who could run does not wait"

    @invariant()
    def nothing_is_overdue(self) -> None:
        assert self.s.overdue(self.now) == []

    @invariant()
    def calm_means_that_nothing_is_due(self) -> None:
        if self.s.is_calm():
            assert self.s.next_tick(self.now) is None

    @invariant()
    def nobody_is_forgotten(self) -> None:
        waiting = {t: e.model for e in self.s.entries.values() for t in e.waiters}
        assert waiting == self.waiting
        assert set(self.s.tickets()) == set(self.waiting) | set(self.leases)

    def teardown(self) -> None:
        """Whatever happened: when all answers end and children obey, every waiter is served or refused."""
        for _ in range(400):
            for ticket in list(self.leases):
                del self.leases[ticket]
                self.carry_out(self.s.release(ticket, self.now))
            for model in [m for m, n in self.children.items() if n]:
                if model in self.stopping:
                    self.stopping.discard(model)
                    self.children[model] = 0
                    self.carry_out(self.s.stopped(model, self.now))
                elif self.s.entry(model).state is State.STARTING:
                    self.carry_out(self.s.ready(model, self.now))
            due = self.s.next_tick(self.now)
            self.now = self.now + 0.5 if due is None else max(due, self.now)
            self.carry_out(self.s.tick(self.now))
            if not self.waiting and not self.leases:
                break
        assert not self.waiting
        assert not list(self.s.tickets())
        for entry in self.s.entries.values():
            assert (entry.leases, entry.aside, entry.waiters, entry.in_flight()) == (set(), set(), {}, 0)


Machine.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
