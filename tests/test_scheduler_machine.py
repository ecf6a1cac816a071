"""The scheduler alone, under random events: the rules that must always hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor.errors import ModelNotFound, StartFailed
from supervisor.scheduler import (
    COUNTED,
    OCCUPYING,
    STAYING,
    Decision,
    Grant,
    Limits,
    Refuse,
    Scheduler,
    Start,
    State,
    Stop,
)

BOOM = StartFailed("boom")


class Machine(RuleBasedStateMachine):
    """Random events against the rules that must always hold."""

    models = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.s = Scheduler(Limits())
        self.pinned: set[str] = set()
        self.now = 0.0
        self.next_ticket = 1
        self.waiting: dict[int, str] = {}
        self.leases: dict[int, str] = {}
        self.children: Counter[str] = Counter()
        self.stopping: set[str] = set()

    @initialize(overlap=st.integers(0, 2), pinned=st.sets(models))
    def set_up(self, overlap: int, pinned: set[str]) -> None:
        self.s = Scheduler(Limits(max_loaded=2, overlap=overlap, max_wait=5, queue_limit=8, queue_timeout=50, drain=20))
        self.pinned = pinned
        self.allowed = {"counted": 2, "occupied": 2 + overlap}

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
                    assert self.s.entry(model).state is State.READY, "leases only on ready children"
                    assert self.waiting.pop(ticket) == model
                    self.leases[ticket] = model
                case Refuse(ticket):
                    assert self.waiting.pop(ticket, None) is not None

    @rule(model=models, start=st.booleans())
    def request(self, model: str, start: bool) -> None:
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.waiting[ticket] = model
        self.carry_out(self.s.request(ticket, model, self.now, start=start))

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

    @rule(most=st.integers(1, 3))
    def other_limits(self, most: int) -> None:
        self.carry_out(self.s.set_limits(replace(self.s.limits, max_loaded=most), self.now))

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
    def no_room_is_wasted(self) -> None:
        entries, limits = self.s.entries.values(), self.s.limits
        wanting = sum(e.state is State.ABSENT and (bool(e.waiters) or e.wanted) for e in entries)
        if not wanting:
            return
        full = sum(e.state in OCCUPYING for e in entries) >= limits.max_loaded + limits.overlap
        assert full or sum(e.state in COUNTED for e in entries) >= limits.max_loaded, "who could start does not wait"
        idle = any(e.state is State.READY and not e.leases and not e.pinned for e in entries)
        staying = sum(e.state in STAYING for e in entries)
        assert not idle or wanting <= limits.max_loaded - staying, "an idle model makes room"

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
        for entry in self.s.entries.values():
            if entry.waiters:
                assert entry.state is not State.READY, "who could run does not wait"

    def teardown(self) -> None:
        """Whatever happened: when all answers end and children obey, every waiter is served or refused."""
        for _ in range(200):
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


Machine.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
