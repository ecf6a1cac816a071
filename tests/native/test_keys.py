"""API keys and the memory: a key reaches its own sessions and no others, whatever it sends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_access import World

from supervisor import atlas_folder

ROUTES = "/v1/atlas/memory"


@pytest.fixture
async def world(start, smollm2, short_tmp: Path) -> Any:
    found = World(short_tmp / "keys.json")
    for name in ("ada", "bob"):
        found.put(name)
    found.put("adas", owner="ada")
    found.running = await start(
        {"small": smollm2},
        atlas={"enabled": "on"},
        performance={"context_size": 1024, "parallel": 2, "threads": 1},
        api={"keys_file": found.path, "require_keys": True},
    )
    return found


async def ask(world: Any, key: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {world.secrets[key]}", "X-Atlas-Owner": "ada"}
    return await world.running.json(method, path, body, headers=headers)


async def read(world: Any, key: str, prompt: str) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": 4, "temperature": 0, "ignore_eos": True, "atlas": {"memory_file": "book"}}
    status, answer = await ask(world, key, "POST", "/completion", body)
    assert status == 200, answer
    return dict(answer)


async def files(world: Any, key: str) -> list[str]:
    _, answer = await ask(world, key, "GET", ROUTES)
    return [one["file"] for one in answer["files"]]


async def stop(world: Any) -> None:
    world.running.supervisor.fleet.unload("small")
    async with asyncio.timeout(60):
        while "small" in world.running.supervisor.fleet.children:
            await asyncio.sleep(0.05)


async def test_a_key_reaches_only_its_own_sessions(world, short_tmp):
    text = "The secret word of Ada is heliotrope, and nobody else may know that word."
    await read(world, "ada", text)
    assert (await read(world, "bob", text))["timings"]["cache_n"] == 0
    assert (await read(world, "adas", text))["timings"]["cache_n"] > 0  # the session of its owner
    folder = short_tmp / "memory" / atlas_folder.folder_name("small")
    stored = {str(path.relative_to(folder)) for path in folder.rglob("*.atlas")}
    assert stored == {"ada/book.atlas", "bob/book.atlas"}

    for running in (True, False):
        if not running:
            await stop(world)
        for key in ("ada", "adas", "bob"):
            assert await files(world, key) == ["book.atlas"]
        status, answer = await ask(world, "bob", "GET", f"{ROUTES}/info?file=book.atlas")
        assert (status, answer["n_tokens"] > 0) == (200, True)
        assert (await ask(world, "bob", "GET", f"{ROUTES}/info?file=../ada/book"))[0] == 400
    assert world.running.supervisor.fleet.children == {}

    assert (await ask(world, "bob", "DELETE", f"{ROUTES}?file=book"))[0] == 200
    assert (await ask(world, "bob", "DELETE", f"{ROUTES}?file=book"))[0] == 404
    assert [await files(world, key) for key in ("bob", "adas")] == [[], ["book.atlas"]]
    again = await read(world, "adas", text)
    assert again["timings"]["cache_n"] > 0  # from the file, by the key that stays
    assert await files(world, "bob") == []
