"""When a file is read again: once it changed, once more when it stays, and never before the last one is done."""

from __future__ import annotations

import asyncio

from supervisor.followed_file import Follower

POLL = 0.01


class Looks:
    """Counts the looks, each of which takes until `go` is set."""

    def __init__(self) -> None:
        self.number = 0
        self.go = asyncio.Event()
        self.go.set()
        self.fails = False

    async def __call__(self) -> None:
        await self.go.wait()
        self.number += 1
        if self.fails:
            raise ValueError("the test asked for it")

    async def reach(self, number: int) -> None:
        """Wait for the look of that number, and then whether more come."""
        async with asyncio.timeout(10):
            while self.number < number:
                await asyncio.sleep(POLL)
        await asyncio.sleep(10 * POLL)
        assert self.number == number


async def test_a_change_is_looked_at_twice(tmp_path):
    path, looks = tmp_path / "file", Looks()
    follower = Follower([path], looks)
    follower.start(POLL)
    try:
        await looks.reach(2)  # what changed before it began
        path.write_text("a")
        async with asyncio.timeout(10):
            while looks.number < 4:
                await asyncio.sleep(POLL)
    finally:
        await follower.stop()
    before = looks.number
    path.unlink()
    await asyncio.sleep(10 * POLL)
    assert looks.number == before


async def test_a_look_that_takes_long_loses_nothing(tmp_path):
    path, looks = tmp_path / "file", Looks()
    looks.go.clear()
    follower = Follower([path], looks)
    follower.start(POLL)
    try:
        await asyncio.sleep(10 * POLL)  # the first two are asked for, and one has begun
        looks.go.set()
        await looks.reach(2)
    finally:
        await follower.stop()


async def test_one_that_fails_is_told_and_the_next_one_comes(tmp_path, caplog):
    looks = Looks()
    looks.fails = True
    follower = Follower([tmp_path / "file"], looks)
    follower.start(POLL)
    try:
        await looks.reach(2)
    finally:
        await follower.stop()
    assert caplog.text.count("a changed file could not be taken over") == 2


async def test_it_ends_in_the_middle_of_a_look(tmp_path):
    looks = Looks()
    looks.go.clear()
    follower = Follower([tmp_path / "file"], looks)
    follower.start(POLL)
    await asyncio.sleep(5 * POLL)
    await asyncio.wait_for(follower.stop(), 10)
    assert looks.number == 0
