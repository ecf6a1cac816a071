"""Requests that wait for a busy model: their order, their bounds, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_supervisor import as_json, run
from prometheus_client.parser import text_string_to_metric_families
from test_gate import CHAT, Front, error

from supervisor.entry import Entry

pytest_plugins = ["test_gate"]

Ask = Callable[..., "asyncio.Task[tuple[int, Any, Any]]"]


def entry_of(front: Front) -> Entry:
    return front.supervisor.fleet.scheduler.entry("one")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def change(front: Front, **inference: float) -> None:
    """Let other settings hold from now on."""
    config = front.supervisor.config
    changed = config.inference.model_copy(update=inference)
    front.supervisor.fleet.apply_settings(config.model_copy(update={"inference": changed}))


@pytest.fixture
async def busy(begin) -> AsyncIterator[tuple[Front, Ask, asyncio.Task[Any]]]:
    """A supervisor whose model has the one request that it may have, how to ask more, and that request."""
    front = await begin({"max_in_flight": 1, "queue_limit": 3}, require_keys=False)
    tasks: list[asyncio.Task[Any]] = []

    def ask(priority: str | None = None, path: str = CHAT, **more: Any) -> asyncio.Task[Any]:
        headers = {"X_Priority": priority} if priority else {}
        tasks.append(asyncio.create_task(front.ask("POST", path, None, {"model": "one"} | more, **headers)))
        return tasks[-1]

    first = ask(hang=True, say=["x"])
    await until(lambda: entry_of(front).leases)
    yield front, ask, first
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: not list(front.supervisor.fleet.scheduler.tickets()))


async def test_waiters_are_served_by_priority(busy):
    front, ask, first = busy
    done: list[str] = []
    for number, priority in enumerate(("low", None, "HIGH"), 1):
        ask(priority).add_done_callback(lambda _, name=priority: done.append(name))
        await until(lambda n=number: len(entry_of(front).waiters) == n)
    _, status, _ = await front.ask("GET", "/api/v1/status")
    queue = status["models"][0]["queue"]
    assert [(one["position"], one["priority"]) for one in queue] == [(1, "high"), (2, "normal"), (3, "low")]
    assert all(one["waited_seconds"] >= 0 for one in queue)
    first.cancel()
    await until(lambda: len(done) == 3)
    assert done == ["HIGH", None, "low"]


@pytest.mark.parametrize(("priority", "place"), [(None, 3), ("high", 1), ("low", 4)])
async def test_a_full_queue_is_a_429_with_the_place(busy, priority, place):
    front, ask, _ = busy
    for one in (None, None, "low"):
        ask(one)
    await until(lambda: len(entry_of(front).waiters) == 3)
    status, answer, headers = await ask(priority)
    assert (status, *error(answer)) == (429, "rate_limit_error", "queue_full")
    assert (answer["error"]["queue_position"], answer["error"]["queue_length"]) == (place, 3)
    assert headers["X-Queue-Position"] == str(place)
    assert int(headers["Retry-After"]) >= 1
    assert f"number {place}" in answer["error"]["message"]
    _, answer, headers = await ask(priority, "/v1/messages")
    assert answer["error"]["type"] == "rate_limit_error"
    assert headers["X-Queue-Position"] == str(place)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families((await front.ask("GET", "/metrics"))[1])
        for sample in family.samples
    }
    assert found["llama_supervisor_requests_waiting", "one"] == 3
    assert found["llama_supervisor_queue_oldest_seconds", "one"] > 0
    assert found["llama_supervisor_queue_refusals_total", "one", "full"] == 2


async def test_who_waited_for_too_long_gets_a_503_with_the_place(busy):
    front, ask, _ = busy
    change(front, queue_timeout_seconds=0.2)
    status, answer, headers = await ask()
    assert (status, *error(answer)) == (503, "unavailable_error", "wait_timeout")
    assert (headers["X-Queue-Position"], answer["error"]["queue_position"]) == ("1", 1)
    assert int(headers["Retry-After"]) >= 1
    assert entry_of(front).timed_out == 1


async def test_a_client_that_leaves_is_gone_from_the_queue(busy):
    front, ask, first = busy
    gone, stays = ask(), ask()
    await until(lambda: len(entry_of(front).waiters) == 2)
    gone.cancel()
    await until(lambda: len(entry_of(front).waiters) == 1)
    assert entry_of(front).leases  # nothing else has ended meanwhile
    first.cancel()
    assert (await stays)[0] == 200


@pytest.mark.parametrize("path", ["/tokenize", "/props", "/v1/messages/count_tokens", "/slots/0"])
async def test_what_takes_no_slot_does_not_wait(busy, path):
    _, ask, first = busy
    assert (await ask(None, path))[0] == 200
    assert not first.done()


async def test_a_higher_limit_holds_at_once(busy):
    front, ask, _ = busy
    waiting = ask()
    await until(lambda: entry_of(front).waiters)
    change(front, max_in_flight=2)
    assert (await waiting)[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/inference"])
@pytest.mark.parametrize("priority", ["urgent", "1", ""])
async def test_a_priority_that_is_none_is_a_400(open_front, path, priority):
    body = {"model": "one", "prompt": "Hi"}
    status, answer, _ = await open_front.ask("POST", path, None, body, X_Priority=priority)
    assert (status, answer["error"]["param"]) == (400, "X-Priority")
    assert "low, normal, high" in answer["error"]["message"]
    assert not open_front.supervisor.fleet.children


@pytest.mark.parametrize(
    ("own", "asked", "seen"),
    [
        (None, None, "normal"),
        (None, "low", "low"),
        (None, "high", None),
        ("high", None, "high"),
        ("high", "normal", "normal"),
        ("low", None, "low"),
        ("low", "normal", None),
    ],
)
async def test_a_key_has_a_priority_and_may_ask_for_less(begin, own, asked, seen):
    front = await begin({"max_in_flight": 1})
    key = await front.key("a", priority=own)
    headers = {"X_Priority": asked} if asked else {}
    first = asyncio.create_task(front.ask("POST", CHAT, key, {"model": "one", "hang": True, "say": ["x"]}))
    await until(lambda: entry_of(front).leases)
    second = asyncio.create_task(front.ask("POST", CHAT, key, {"model": "one"}, **headers))
    await until(lambda: entry_of(front).waiters or second.done())
    if seen is None:
        status, answer, _ = await second
        assert (status, *error(answer)) == (403, "permission_error", "priority_not_allowed")
    else:
        [waiter] = entry_of(front).waiters.values()
        assert waiter.priority.name.lower() == seen
    first.cancel()
    await asyncio.gather(second, return_exceptions=True)


def test_a_key_is_made_with_a_priority(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_SUPERVISOR_API__KEYS_FILE", str(tmp_path / "keys.json"))
    assert as_json(run("key", "add", "batch", "--priority", "low", "--json"))["priority"] == "low"
    assert as_json(run("key", "add", "more", "--like", "batch", "--json"))["priority"] == "low"
    assert as_json(run("key", "add", "plain", "--json"))["priority"] is None
    assert run("key", "add", "x", "--priority", "urgent").exit_code == 2
    listed = run("key", "list").stdout.splitlines()
    column = listed[0].index("PRIORITY")
    assert [line[column:].split()[0] for line in listed[1:]] == ["low", "low", "normal"]
