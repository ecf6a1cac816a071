"""A child dies before it has answered: which requests are sent to a fresh one?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_gate import CHAT, Front

pytest_plugins = ["test_gate"]


async def ask(front: Front, short_tmp: Path, path: str, method: str = "POST", **more: Any) -> tuple[int, Any, int]:
    """Ask a model whose child dies over it the first time; return status, answer, and how often one was started."""
    body = {"model": "one", "die_once": str(short_tmp / "died")} | more
    status, answer, _ = await front.ask(method, path, None, body)
    entry = front.supervisor.fleet.scheduler.entry("one")
    assert not entry.leases
    return status, answer, entry.starts


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize", "/completion"])
async def test_what_only_computes_is_asked_again(open_front, short_tmp, path):
    status, answer, starts = await ask(open_front, short_tmp, path)
    assert (status, answer["target"], starts) == (200, path, 2)
    text = (await open_front.ask("GET", "/metrics"))[1]
    assert 'llama_supervisor_retries_total{model="one"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/props", {}),
        ("/slots/0?action=save", {}),
        ("/lora-adapters", {}),
        ("/tools", {}),
        ("/v1/atlas/memory/save", {}),
        (CHAT, {"atlas": {"session": "s"}}),
    ],
)
async def test_what_may_have_changed_something_is_not(open_front, short_tmp, path, more):
    status, answer, starts = await ask(open_front, short_tmp, path, **more)
    assert (status, answer["error"]["code"], starts) == (502, "upstream_failed", 1)


async def test_it_is_asked_again_only_once(open_front):
    status, answer, starts = await ask(open_front, Path("/proc/nowhere"), CHAT)  # it dies each time
    assert (status, answer["error"]["code"], starts) == (502, "upstream_failed", 2)


async def test_an_answer_that_has_begun_is_not_asked_again(open_front):
    body = {"model": "one", "say": ["data: 1\n\n"], "type": "text/event-stream", "hang": True}
    async with open_front.http.post(open_front.supervisor.urls[0] + CHAT, json=body) as response:
        assert await response.content.readline() == b"data: 1\n"
        open_front.supervisor.fleet.children["one"].kill()
        assert b'"upstream_failed"' in await response.content.read()
    assert open_front.supervisor.fleet.scheduler.entry("one").starts == 1


async def test_a_forced_unload_is_no_reason_to_ask_again(open_front):
    body = {"model": "one", "say": [], "hang": True, "type": "application/json"}
    fleet = open_front.supervisor.fleet
    asking = asyncio.create_task(open_front.ask("POST", CHAT, None, body))
    async with asyncio.timeout(10):
        while not fleet.scheduler.entry("one").leases:
            await asyncio.sleep(0.01)
    fleet.unload("one", force=True)
    try:
        assert (await asking)[0] == 502
    except aiohttp.ClientError:
        pass  # its answer had begun, and was cut
    assert fleet.scheduler.entry("one").starts == 1
