"""The long-context memory on the real server: prompts and answers beyond the context, many turns, several slots."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = {"atlas": {"enabled": "on", "archive_max_mb": 512}, "performance": {"context_size": 512, "threads": 1}}


def slots(count: int) -> dict[str, object]:
    """Return the section that gives the model `count` slots."""
    return {"overrides": {"small": {"args": ["--parallel", str(count)]}}}


async def complete(running, prompt: str, tokens: int = 16):
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    return await running.json("POST", "/completion", body)


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs" / "design.md").read_text() + (ROOT / "docs" / "atlas.md").read_text()


async def test_prompt_beyond_the_context_and_the_next_turn(start, smollm2, text):
    running = await start({"small": smollm2}, models=slots(1), **SECTIONS)
    status, answer = await complete(running, text[:6000])
    assert status == 200
    assert answer["timings"]["prompt_n"] > 1024
    atlas = answer["atlas"]
    assert atlas["active"]
    assert atlas["tokens_archived"] > 512
    assert atlas["refreshes"] > 10

    # the next turn reads only what is new, although most of the first has left the context
    status, next_answer = await complete(running, text[:6000] + answer["content"] + " And then")
    assert status == 200
    assert next_answer["timings"]["prompt_n"] < 32
    assert next_answer["timings"]["cache_n"] >= answer["timings"]["prompt_n"]

    # a prompt that departs before the window starts over
    status, other = await complete(running, text[:600] + " something else " + text[3000:5000])
    assert status == 200
    assert other["timings"]["cache_n"] == 0


async def test_answer_goes_on_past_the_context(start, smollm2):
    running = await start({"small": smollm2}, models=slots(1), **SECTIONS)
    status, answer = await complete(running, "Once upon a time", tokens=700)
    assert status == 200
    assert answer["tokens_predicted"] == 700
    assert not answer["truncated"]
    assert answer["atlas"]["tokens_archived"] > 0


async def test_slots_do_not_disturb_each_other(start, smollm2, text):
    sections = SECTIONS | {"performance": {"context_size": 1024, "threads": 1}}
    running = await start({"small": smollm2}, models=slots(2), **sections)
    prompts = [text[:4000], text[4000:8000]]
    together = await asyncio.gather(*(complete(running, prompt) for prompt in prompts))
    assert [status for status, _ in together] == [200, 200]
    assert all(answer["atlas"]["tokens_archived"] > 0 and answer["atlas"]["active"] for _, answer in together)


async def test_without_memory_a_long_prompt_is_refused(start, smollm2, text):
    running = await start({"small": smollm2}, models=slots(1), performance={"context_size": 512, "threads": 1})
    status, answer = await complete(running, text[:6000])
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"cells": 512}, "do not fit"), ({"cells": 256, "window": 300}, "do not fit"), ({"archive_max_mb": 1}, "archive")],
)
async def test_impossible_parameters_are_refused_with_the_reason(start, smollm2, values, reason):
    atlas = {"enabled": "on"} | values
    running = await start({"small": smollm2}, models=slots(1), atlas=atlas, performance={"context_size": 512})
    status, answer = await complete(running, "Hello")
    assert status in (500, 502, 503)
    assert reason in answer["error"]["message"]
