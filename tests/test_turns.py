"""Do requests that come at once begin a few at a time, in their order, and does one that leaves not hold up others?"""

from __future__ import annotations

import asyncio

from supervisor.turns import Turns


async def _run(turns: Turns, count: int, cancelled: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """Let `count` tasks enter at once; return who got on, and in which turn of the event loop."""
    now, entered = 0, []

    async def one(number: int) -> None:
        await turns.enter()
        entered.append((number, now))

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        now += 1
        if now == 1:
            for number in cancelled:
                tasks[number].cancel()
        assert now < 100, "somebody is never let on"
    return entered


async def test_a_few_at_a_time_in_their_order() -> None:
    entered = await _run(Turns(4), 10)
    assert [number for number, _ in entered] == list(range(10))
    at = [now for _, now in entered]
    assert [at.count(now) for now in sorted(set(at))] == [4, 4, 2]


async def test_few_do_not_wait() -> None:
    assert await _run(Turns(4), 4) == [(number, 0) for number in range(4)]


async def test_who_leaves_takes_no_turn() -> None:
    entered = await _run(Turns(2), 8, cancelled=(2, 3, 4))
    at = [now for _, now in entered]
    assert [number for number, _ in entered] == [0, 1, 5, 6, 7]
    assert [at.count(now) for now in sorted(set(at))] == [2, 2, 1]


async def test_quiet_in_between() -> None:
    turns = Turns(2)
    for _ in range(3):
        assert [number for number, _ in await _run(turns, 5)] == list(range(5))
        for _ in range(5):
            await asyncio.sleep(0)
    assert await _run(turns, 2) == [(0, 0), (1, 0)]
