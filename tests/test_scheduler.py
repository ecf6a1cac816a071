"""The scheduler alone: events in, decisions out, time as a number."""

from __future__ import annotations

import pytest

from supervisor.entry import Entry, Priority, State, Waiter
from supervisor.errors import ModelNotFound, ModelTooLarge, NotLoaded, QueueFull, ShuttingDown, StartFailed, WaitTimeout
from supervisor.scheduler import Decision, Grant, Limits, Refuse, Scheduler, Start, Stop

BOOM = StartFailed("boom")


def scheduler(**limits: float) -> Scheduler:
    return Scheduler(Limits(**{"max_loaded": 1, "max_wait": 5.0, **limits}))


def ready(s: Scheduler, model: str, now: float = 0.0) -> None:
    s.load(model, now)
    s.ready(model, now)


def refusals(decisions: list[Decision]) -> dict[int, type]:
    return {d.ticket: type(d.error) for d in decisions if isinstance(d, Refuse)}


def test_first_request_starts_the_model_and_is_granted_when_it_is_ready():
    s = scheduler()
    assert s.request(1, "a", 0) == [Start("a")]
    assert s.request(2, "a", 0) == []
    assert s.ready("a", 1) == [Grant(1, "a"), Grant(2, "a")]
    assert s.request(3, "a", 2) == [Grant(3, "a")]
    assert s.entry("a").leases == {1, 2, 3}


def test_a_second_model_starts_beside_the_first_when_there_is_room():
    s = scheduler(max_loaded=2)
    ready(s, "a")
    assert s.request(1, "b", 1) == [Start("b")]


def test_an_idle_model_makes_room_at_once():
    s = scheduler()
    ready(s, "a")
    assert s.request(1, "b", 1) == [Stop("a", "making room for b")]
    assert s.stopped("a", 1.1) == [Start("b")]
    assert s.ready("b", 1.5) == [Grant(1, "b")]


def test_with_overlap_the_next_model_starts_while_the_one_before_exits():
    s = scheduler(overlap=1)
    ready(s, "a")
    assert s.request(1, "b", 1) == [Stop("a", "making room for b"), Start("b")]
    assert s.stopped("a", 1.1) == []
    assert s.ready("b", 1.5) == [Grant(1, "b")]


def test_overlap_is_bounded_when_children_do_not_exit():
    s = scheduler(overlap=1)
    ready(s, "a")
    s.request(1, "b", 1)
    s.ready("b", 2)
    s.release(1, 3)
    assert s.request(2, "c", 4) == [Stop("b", "making room for c")]  # a and b still exit
    assert s.request(3, "a", 5) == []
    assert s.stopped("b", 6) == [Start("c")]
    assert s.stopped("a", 7) == []  # it waits for c to become idle
    s.ready("c", 8)
    assert s.release(2, 9) == [Stop("c", "making room for a"), Start("a")]


def test_with_overlap_a_model_whose_child_still_exits_waits_for_it():
    s = scheduler(max_loaded=2, overlap=1)
    ready(s, "a")
    s.unload("a", 1)
    assert s.request(1, "a", 2) == []
    assert s.stopped("a", 3) == [Start("a")]


def test_with_overlap_a_busy_model_is_still_drained_first():
    s = scheduler(overlap=1)
    ready(s, "a")
    s.request(1, "a", 10)
    s.request(2, "b", 11)
    assert s.tick(16) == []
    assert s.entry("a").state is State.DRAINING
    assert s.release(1, 17) == [Stop("a", "drained"), Start("b")]


def test_with_overlap_a_forced_unload_lets_the_next_model_in():
    s = scheduler(overlap=1)
    ready(s, "a")
    s.request(1, "a", 1)
    s.request(2, "b", 2)
    assert s.unload("a", 3, force=True) == [Stop("a", "unloaded"), Start("b")]


def test_with_overlap_a_removed_model_lets_the_next_one_in():
    s = scheduler(overlap=1)
    s.load("a", 0)
    s.request(1, "b", 1)
    assert s.remove("a", 2, ModelNotFound("a", [], 0)) == [Stop("a", "removed"), Start("b")]


def test_the_oldest_waiter_takes_the_place_that_another_one_made():
    s = scheduler(max_loaded=2, overlap=1)
    ready(s, "a")
    ready(s, "b", 1)
    s.request(1, "a", 2)
    s.request(2, "b", 2)
    s.unload("a", 3)  # it drains
    assert s.request(3, "c", 4) == []
    assert s.release(2, 5) == []
    assert s.request(4, "d", 6) == [Stop("b", "making room for d"), Start("c")]


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_place_that_is_on_its_way_costs_no_idle_model(overlap: int):
    s = scheduler(max_loaded=2, overlap=overlap)
    ready(s, "a")
    ready(s, "b", 1)
    s.request(1, "a", 2)
    s.unload("a", 3)  # it drains
    assert s.request(2, "c", 4) == []
    assert s.entry("b").state is State.READY


def test_the_least_recently_used_idle_model_goes():
    s = scheduler(max_loaded=2)
    ready(s, "a")
    ready(s, "b")
    s.request(1, "a", 5)
    s.release(1, 6)
    assert s.request(2, "c", 7) == [Stop("b", "making room for c")]


def test_a_busy_model_is_drained_only_after_max_wait_and_its_answers_finish():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 10)
    assert s.request(2, "b", 11) == []
    assert s.request(3, "a", 12) == [Grant(3, "a")]  # it may jump ahead until then
    assert s.next_tick(12) == 16
    assert s.tick(15.9) == []
    assert s.tick(16) == []  # it drains: nothing is stopped while answers run
    assert s.entry("a").state is State.DRAINING
    assert s.request(4, "a", 17) == []  # it waits its turn
    assert s.next_tick(17) != 17
    assert s.release(1, 18) == []
    assert s.release(3, 19) == [Stop("a", "drained")]
    assert s.stopped("a", 19.1) == [Start("b")]
    assert s.ready("b", 19.6) == [Grant(2, "b")]
    s.release(2, 20)
    assert s.entry("a").waiters == {4: Waiter(17, 17)}


def test_the_swapped_out_model_comes_back_for_its_waiters():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 10)
    s.request(2, "b", 11)
    s.tick(16)
    s.request(3, "a", 17)
    s.release(1, 18)
    s.stopped("a", 18)
    s.ready("b", 19)
    assert s.release(2, 20) == [Stop("b", "making room for a")]
    assert s.stopped("b", 20) == [Start("a")]


def test_a_model_that_just_came_is_not_drained_before_it_had_its_time():
    s = scheduler()
    s.request(1, "a", 0)
    s.request(2, "b", 0)
    s.ready("a", 8)
    assert s.entry("a").leases == {1}
    assert s.tick(12.9) == []
    assert s.entry("a").state is State.READY
    s.tick(13)
    assert s.entry("a").state is State.DRAINING


def test_pinned_models_are_never_victims():
    s = scheduler(max_loaded=2)
    ready(s, "a")
    ready(s, "b", 1)
    s.entry("a").pinned = True
    assert s.request(1, "c", 5) == [Stop("b", "making room for c")]


def test_a_request_that_can_never_be_served_is_refused_at_once():
    s = scheduler()
    ready(s, "a")
    s.entry("a").pinned = True
    assert refusals(s.request(1, "b", 1)) == {1: NotLoaded}
    assert not list(s.tickets())


def test_a_leaving_model_does_not_hide_that_all_others_are_pinned():
    s = scheduler(max_loaded=1, overlap=1)
    ready(s, "a")
    s.request(1, "b", 1)
    s.entry("b").pinned = True
    s.ready("b", 2)
    assert refusals(s.request(2, "c", 3)) == {2: NotLoaded}


def test_one_stop_makes_room_for_one_start():
    s = scheduler(max_loaded=2)
    ready(s, "a")
    ready(s, "b", 1)
    assert s.request(1, "c", 2) == [Stop("a", "making room for c")]
    assert s.request(2, "c", 2) == []
    assert s.request(3, "d", 3) == [Stop("b", "making room for d")]
    assert s.stopped("b", 4) == [Start("c")]  # the older waiter first
    assert s.stopped("a", 5) == [Start("d")]


def test_cancel_takes_a_waiter_out():
    s = scheduler()
    s.request(1, "a", 0)
    s.cancel(1, 0.1)
    assert s.ready("a", 1) == []
    assert not list(s.tickets())


def test_the_queue_is_bounded():
    s = scheduler(queue_limit=2)
    s.request(1, "a", 0)
    s.request(2, "a", 0)
    assert refusals(s.request(3, "a", 0)) == {3: QueueFull}


def test_a_waiter_does_not_wait_for_ever():
    s = scheduler(queue_timeout=60)
    s.request(1, "a", 0)
    s.request(2, "a", 30)
    assert s.next_tick(1) == 60
    assert refusals(s.tick(60)) == {1: WaitTimeout}
    assert s.next_tick(60) == 90


def test_a_failed_start_refuses_its_waiters_and_backs_off():
    s = scheduler()
    s.request(1, "a", 0)
    assert refusals(s.failed("a", BOOM, 0.5)) == {1: StartFailed}
    [refused] = s.request(2, "a", 1)
    assert isinstance(refused, Refuse)
    assert refused.error.retry_after == 1
    assert "boom" in refused.error.message
    assert s.request(3, "a", 1.5) == [Start("a")]
    s.failed("a", BOOM, 2)
    assert s.entry("a").retry_at == 4  # 1 s, then 2 s


def test_backoff_is_bounded_and_ends_with_an_explicit_load():
    s = scheduler()
    now = 0.0
    for _ in range(20):
        s.load("a", now)
        s.failed("a", BOOM, now)
    assert s.entry("a").retry_at == now + 60
    assert s.load("a", now + 1) == [Start("a")]


def test_a_crash_restarts_at_the_next_request():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 1)
    assert s.failed("a", BOOM, 2) == []
    assert s.request(2, "a", 2) == [Start("a")]
    s.release(1, 2, ok=False)
    s.ready("a", 3)
    s.failed("a", BOOM, 4)  # a second crash without an answer in between
    assert s.entry("a").retry_at == 5


def test_an_answer_forgives_earlier_failures():
    s = scheduler()
    ready(s, "a")
    s.entry("a").failures = 3
    s.request(1, "a", 1)
    s.release(1, 2, ok=True)
    assert s.entry("a").failures == 0


def test_requests_that_must_not_start_a_model():
    s = scheduler()
    assert refusals(s.request(1, "a", 0, start=False)) == {1: NotLoaded}
    s.load("a", 0)
    assert s.request(2, "a", 0, start=False) == []  # it is on its way
    assert s.ready("a", 1) == [Grant(2, "a")]


def test_requests_that_must_not_start_a_model_do_not_bring_back_one_that_goes():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 1)
    s.unload("a", 2)
    assert refusals(s.request(2, "a", 3, start=False)) == {2: NotLoaded}
    assert s.release(1, 4) == [Stop("a", "drained")]
    assert refusals(s.request(3, "a", 5, start=False)) == {3: NotLoaded}
    s.request(4, "a", 6)
    assert s.request(5, "a", 7, start=False) == []  # it comes back for another
    assert s.stopped("a", 8) == [Start("a")]


def test_unload_drains_within_a_bound():
    s = scheduler(drain=30)
    ready(s, "a")
    s.request(1, "a", 1)
    assert s.unload("a", 2) == []
    assert s.entry("a").state is State.DRAINING
    assert s.next_tick(3) == 32
    assert s.tick(32) == [Stop("a", "drain time over")]


def test_forced_unload_cuts():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 1)
    assert s.unload("a", 2, force=True) == [Stop("a", "unloaded")]
    s.stopped("a", 2.1)
    assert s.release(1, 2.2, ok=False) == []
    assert s.entry("a").state is State.ABSENT


def test_unload_of_a_starting_model_refuses_its_waiters():
    s = scheduler()
    s.request(1, "a", 0)
    decisions = s.unload("a", 1)
    assert refusals(decisions) == {1: NotLoaded}
    assert decisions[-1] == Stop("a", "unloaded")
    assert s.ready("a", 1.1) == []  # it came too late
    assert s.request(2, "a", 1.15) == []  # nothing is granted on a child that is being stopped
    assert s.entry("a").state is State.STOPPING
    assert s.stopped("a", 1.2) == [Start("a")]


def test_a_replaced_file_is_swapped_in_after_the_leases_end():
    s = scheduler()
    ready(s, "a")
    s.request(1, "a", 1)
    assert s.restart("a", 2) == []
    assert s.request(2, "a", 3) == []
    assert s.release(1, 4) == [Stop("a", "drained")]
    assert s.stopped("a", 5) == [Start("a")]
    assert s.ready("a", 6) == [Grant(2, "a")]


def test_a_pinned_model_that_is_replaced_comes_back_by_itself():
    s = scheduler()
    ready(s, "a")
    s.entry("a").pinned = True
    assert s.restart("a", 2) == [Stop("a", "replaced")]
    assert s.stopped("a", 3) == [Start("a")]


def test_a_removed_file_ends_its_waiters():
    s = scheduler()
    s.request(1, "a", 0)
    decisions = s.remove("a", 1, ModelNotFound("a", [], 0))
    assert refusals(decisions) == {1: ModelNotFound}
    assert decisions[-1] == Stop("a", "removed")


def test_idle_models_are_unloaded_in_time():
    s = scheduler()
    ready(s, "a")
    s.entry("a").idle_unload = 10
    s.request(1, "a", 1)
    assert s.next_tick(2) is None
    s.release(1, 5)
    assert s.next_tick(6) == 15
    assert s.tick(14) == []
    assert s.tick(15) == [Stop("a", "idle")]


def test_shutdown_refuses_waiters_drains_the_rest_and_starts_nothing():
    s = scheduler(max_loaded=3, drain=30)
    ready(s, "a")
    ready(s, "b")
    s.request(1, "a", 1)
    s.request(2, "c", 1)
    decisions = s.shutdown(2)
    assert refusals(decisions) == {2: ShuttingDown}
    assert [d for d in decisions if isinstance(d, Stop)] == [Stop("b", "shutdown"), Stop("c", "shutdown")]
    assert refusals(s.request(3, "a", 3)) == {3: ShuttingDown}
    assert s.tick(32) == [Stop("a", "drain time over")]
    assert s.stopped("a", 33) == []
    assert s.load("a", 34) == []


@pytest.mark.parametrize("ticket", [7, 8])
def test_unknown_tickets_are_ignored(ticket: int):
    s = scheduler()
    assert s.cancel(ticket, 0) == []
    assert s.release(ticket, 0) == []


def test_chance_makes_pauses_longer_and_an_answer_forgets_them():
    s = Scheduler(Limits(max_loaded=1), lambda: 1.0)
    for pause in (1.25, 2.5, 5.0):
        s.load("a", 0)
        s.failed("a", BOOM, 10)
        assert s.entry("a").retry_at == 10 + pause
    assert s.request(1, "a", 15) == [Start("a")]
    s.ready("a", 16)
    s.release(1, 17)
    s.failed("a", BOOM, 18)
    assert s.entry("a").retry_at == 18  # as the first time
    for _ in range(20):
        s.load("a", 20)
        s.failed("a", BOOM, 20)
    assert s.entry("a").retry_at == 20 + 60 * 1.25


# Whose turn it is


def test_a_child_gets_as_many_requests_as_it_may_have_and_the_others_in_their_turn():
    s = scheduler(max_in_flight=2)
    for ticket in (1, 2, 3, 4):
        s.request(ticket, "a", 0)
    assert s.ready("a", 1) == [Grant(1, "a"), Grant(2, "a")]
    assert s.request(5, "a", 2) == []
    assert s.release(2, 3) == [Grant(3, "a")]
    assert s.cancel(4, 4) == []
    assert s.release(1, 5) == [Grant(5, "a")]
    assert s.entry("a").leases == {3, 5}


def test_what_computes_nothing_does_not_wait_for_those_that_do():
    s = scheduler(max_in_flight=1)
    s.request(1, "a", 0)
    s.request(2, "a", 0)
    s.request(3, "a", 0, counts=False)
    assert s.ready("a", 1) == [Grant(1, "a"), Grant(3, "a")]
    assert s.request(4, "a", 2, counts=False) == [Grant(4, "a")]
    assert s.release(4, 3) == []
    assert s.release(1, 3) == [Grant(2, "a")]
    assert s.request(5, "a", 4) == []  # 3 goes on, and is none of those that count


def test_a_higher_limit_lets_waiters_in_at_once():
    s = scheduler(max_in_flight=1)
    ready(s, "a")
    s.request(1, "a", 1)
    s.request(2, "a", 1)
    assert s.set_limits(Limits(max_loaded=1, max_in_flight=2), 2) == [Grant(2, "a")]


def test_the_queue_of_a_ready_model_is_bounded_in_length_and_time():
    s = scheduler(max_in_flight=1, queue_limit=1, queue_timeout=60)
    ready(s, "a")
    s.request(1, "a", 1)
    s.request(2, "a", 2)
    assert refusals(s.request(3, "a", 3)) == {3: QueueFull}
    assert s.next_tick(3) == 62
    assert refusals(s.tick(62)) == {2: WaitTimeout}
    assert (s.entry("a").turned_away, s.entry("a").timed_out) == (1, 1)


def test_who_is_refused_learns_the_place_in_the_queue():
    s = scheduler(queue_limit=2, queue_timeout=60)
    s.request(1, "a", 0)
    s.request(2, "a", 10, priority=Priority.LOW)
    for priority, place in ((Priority.NORMAL, 2), (Priority.LOW, 3), (Priority.HIGH, 1)):
        [refused] = s.request(3, "a", 11, priority=priority)
        assert isinstance(refused, Refuse)
        assert isinstance(refused.error, QueueFull)
        assert (refused.error.position, refused.error.length) == (place, 2)
        assert refused.error.retry_after == 5
    [refused] = s.tick(60)
    assert isinstance(refused, Refuse)
    assert isinstance(refused.error, WaitTimeout)
    assert (refused.error.position, refused.error.length) == (1, 2)
    assert refused.error.body()["error"]["queue_position"] == 1


def test_priorities_order_a_queue_but_a_step_is_worth_only_some_seconds():
    s = scheduler(max_in_flight=1, priority_seconds=30)
    ready(s, "a")
    s.request(1, "a", 0)
    for ticket, now, priority in (
        (2, 1, Priority.LOW),
        (3, 2, Priority.NORMAL),
        (4, 3, Priority.HIGH),
        (5, 31, Priority.HIGH),
        (6, 33, Priority.HIGH),
        (7, 62, Priority.HIGH),
    ):
        assert s.request(ticket, "a", now, priority=priority) == []
    order = []
    for _ in range(6):
        [ticket] = s.entry("a").leases
        [granted] = s.release(ticket, 63)
        assert isinstance(granted, Grant)
        order.append(granted.ticket)
    assert order == [4, 5, 3, 6, 2, 7]


def test_a_model_with_an_urgent_waiter_starts_first_and_an_unhurried_one_later():
    s = scheduler(max_loaded=1, min_residency=0)
    ready(s, "a")
    s.request(1, "a", 100)
    s.request(2, "b", 101, priority=Priority.LOW)
    s.request(3, "c", 102, priority=Priority.HIGH)  # has waited for 30 s already, as it were
    assert s.entry("a").state is State.DRAINING
    assert s.release(1, 103) == [Stop("a", "drained")]
    assert s.stopped("a", 104) == [Start("c")]
    s.ready("c", 105)
    assert s.next_tick(105) == 101 + 30 + 5
    assert s.tick(135) == []
    assert s.entry("c").state is State.READY


def test_a_busy_model_that_has_just_loaded_stays_for_its_residency():
    s = scheduler(max_wait=2, min_residency=20)
    s.request(1, "a", 0)
    s.request(2, "b", 0)
    s.ready("a", 10)
    assert s.next_tick(10) == 30
    s.tick(29.9)
    assert s.request(3, "a", 29.9) == [Grant(3, "a")]
    s.tick(30)
    assert s.entry("a").state is State.DRAINING


def test_an_idle_model_need_not_stay_for_its_residency():
    s = scheduler(min_residency=20)
    s.request(1, "a", 0)
    s.request(2, "b", 0)
    s.ready("a", 10)
    assert s.release(1, 11) == [Stop("a", "making room for b")]


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("max_wait", [0.0, 5.0])
def test_who_waits_for_a_model_that_made_way_comes_after_those_that_it_made_way_for(max_wait, priority):
    """Else it would leave, only to come back at once."""
    s = scheduler(max_in_flight=1, max_wait=max_wait)
    ready(s, "a")
    s.request(1, "a", 10)
    s.request(2, "a", 10)  # waits for longer than the one below
    s.request(3, "b", 10)
    s.tick(10 + max_wait)
    assert s.entry("a").state is State.DRAINING
    s.request(4, "a", 11 + max_wait, priority=priority)
    assert s.release(1, 16) == [Stop("a", "drained")]
    assert s.stopped("a", 17) == [Start("b")]
    s.ready("b", 18)
    assert s.release(3, 19) == [Stop("b", "making room for a")]
    assert s.stopped("b", 20) == [Start("a")]
    assert s.entry("a").made_way_at < 0


def test_models_that_all_have_long_queues_take_turns():
    s = scheduler(max_in_flight=1, max_wait=5, min_residency=10)
    for ticket in range(300):
        s.request(ticket, "abc"[ticket % 3], 0)
    turns, now = [], 0.0
    for _ in range(12):
        [running] = [e for e in s.entries.values() if e.state is State.STARTING]
        turns.append(running.model)
        s.ready(running.model, now)
        for _ in range(11):
            now += 1
            s.tick(now)
            [ticket] = running.leases
            s.release(ticket, now)
            if running.state is State.STOPPING:
                break
        s.stopped(running.model, now)
    assert "".join(turns) == "abc" * 4


def test_the_queue_is_told_in_its_order():
    entry = Entry("a")
    entry.waiters = {1: Waiter(0, 0), 2: Waiter(1, 31, Priority.LOW), 3: Waiter(2, -28, Priority.HIGH)}
    assert [ticket for ticket, _ in entry.queue()] == [3, 1, 2]
    assert [entry.position(rank) for rank in (-40, -28, 0, 100)] == [1, 2, 3, 4]


def sized(needs: dict[str, int], budget: int, **limits: float) -> Scheduler:
    s = Scheduler(Limits(**{"max_loaded": 9, "max_wait": 5.0, **limits}, budget={"ram": budget}))
    for model, number in needs.items():
        s.entry(model).needs = {"ram": number}
    return s


def test_two_models_that_do_not_fit_together_swap_once_the_first_has_exited():
    s = sized({"a": 6, "b": 5}, 10, overlap=1)
    ready(s, "a")
    assert s.request(1, "b", 1) == [Stop("a", "making room for b")]
    assert s.taken() == {"ram": 6}
    assert s.stopped("a", 2) == [Start("b")]


def test_with_overlap_a_model_that_fits_beside_one_that_exits_need_not_wait():
    s = sized({"a": 5, "b": 5}, 10, overlap=1, max_loaded=1)
    ready(s, "a")
    assert s.request(1, "b", 1) == [Stop("a", "making room for b"), Start("b")]


def test_what_can_never_fit_is_refused_at_once_and_nothing_goes_for_it():
    s = sized({"a": 6, "b": 11}, 10)
    ready(s, "a")
    assert refusals(s.request(1, "b", 1)) == {1: ModelTooLarge}
    assert s.entry("a").state is State.READY


def test_what_does_not_fit_beside_pinned_models_is_refused():
    s = sized({"a": 6, "b": 5}, 10)
    s.entry("a").pinned = True
    ready(s, "a")
    assert refusals(s.request(1, "b", 1)) == {1: NotLoaded}


def test_only_as_many_go_as_must_and_those_of_least_value():
    s = sized({"a": 1, "b": 4, "c": 4, "d": 5}, 10)
    for now, model in enumerate("abc"):
        ready(s, model, now)
    assert s.request(1, "d", 10) == [Stop("b", "making room for d")]
    s = sized({"a": 4, "b": 4, "d": 4}, 10)
    ready(s, "a", 0)
    ready(s, "b", 5)
    s.entry("a").cost = 30.0
    assert s.request(1, "d", 10) == [Stop("b", "making room for d")]


def test_no_idle_model_goes_in_vain():
    s = sized({"a": 5, "b": 5, "c": 9}, 10)
    ready(s, "a")
    ready(s, "b")
    s.request(1, "a", 1)
    assert s.request(2, "c", 2) == []
    assert s.entry("b").state is State.READY
    assert s.next_tick(2) == 7
    assert s.tick(7) == [Stop("b", "making room for c")]
    assert s.entry("a").state is State.DRAINING


def test_nobody_takes_the_room_that_another_one_waits_for():
    s = sized({"a": 5, "b": 8, "c": 1}, 10)
    ready(s, "a")
    s.request(1, "a", 1)
    s.request(2, "b", 2)
    assert s.request(3, "c", 3) == []
    assert s.release(1, 4) == [Stop("a", "making room for b")]
    assert s.stopped("a", 5) == [Start("b"), Start("c")]


def test_a_child_that_grew_lets_idle_ones_go():
    s = sized({"a": 4, "b": 4}, 10)
    ready(s, "a")
    ready(s, "b")
    s.request(1, "b", 1)
    assert s.measured("b", {"ram": 6}, 2) == []
    assert s.measured("b", {"ram": 7}, 3) == [Stop("a", "model b takes more memory than was thought")]
    assert s.measured("b", {"ram": 70}, 4) == []


def test_a_lower_budget_lets_models_go():
    s = sized({"a": 4, "b": 4}, 10)
    ready(s, "a")
    ready(s, "b", 1)
    assert s.set_limits(Limits(max_loaded=9, budget={"ram": 7}), 2) == [Stop("a", "fewer models may run")]
