"""The memory at its limits: very long prompts, full archives, clients that leave; and the other slot goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Start
from tiny_models import make

ATLAS = {"enabled": "on", "archive_max_mb": 2}
SHORT, LONG = "The short one. " * 10, "What was told, is told again and again. " * 50


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make(tmp_path / "tiny.gguf", "llama")


async def begin(start: Start, model: Path, slots: int = 1, **atlas: Any) -> Running:
    models = {"overrides": {model.stem: {"args": ["--parallel", str(slots)]}}}
    performance = {"context_size": 256 * slots, "threads": 1}
    return await start({model.stem: model}, models=models, performance=performance, atlas=ATLAS | atlas)


async def complete(running: Running, prompt: str, slot: int = 0, tokens: int = 16) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "id_slot": slot}
    status, answer = await running.json("POST", "/completion", body | {"cache_prompt": False, "return_tokens": True})
    assert status == 200, answer
    result: dict[str, Any] = answer
    return result


async def leave(running: Running, prompt: str) -> None:
    body = {"prompt": prompt, "n_predict": 1, "id_slot": 0}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await running.json("POST", "/completion", body)


async def test_prompt_of_200_000_tokens(start: Start, tiny: Path) -> None:
    running = await begin(start, tiny)
    answer = await complete(running, "0123456789" * 20_000, tokens=1)
    assert answer["tokens_evaluated"] > 200_000
    atlas = answer["atlas"]
    assert atlas["active"]
    assert atlas["tokens_forgotten"] > 180_000
    assert atlas["memory_bytes"] < 4 << 20


async def test_client_that_leaves_in_a_long_prompt(start: Start, tiny: Path) -> None:
    running = await begin(start, tiny, slots=2)
    alone = [await complete(running, SHORT, slot) for slot in (0, 1)]
    leaving = asyncio.create_task(leave(running, "0123456789" * 60_000))
    beside = await complete(running, SHORT, 1, tokens=300)
    await leaving
    assert beside["tokens"][:16] == alone[1]["tokens"]
    after = await complete(running, SHORT)
    assert after["tokens"] == alone[0]["tokens"]
    assert after["atlas"]["active"]
    assert (await complete(running, LONG))["atlas"]["tokens_archived"] > 1024


async def test_full_archive_of_one_slot_leaves_the_other_alone(start: Start, tiny: Path) -> None:
    running = await begin(start, tiny, slots=2)
    alone = await complete(running, SHORT, 1, tokens=300)
    full, other = await asyncio.gather(complete(running, LONG * 4), complete(running, SHORT, 1, tokens=300))
    assert full["atlas"]["tokens_forgotten"] > 0
    assert full["atlas"]["active"]
    assert other["atlas"]["tokens_forgotten"] == 0
    assert other["atlas"]["tokens_archived"] > 0
    assert other["tokens"] == alone["tokens"]


async def test_slots_of_different_length_answer_as_if_alone(start: Start, smollm2: Path) -> None:
    # a trained model on texts that go on in one way: rows of a batch may differ in the last bits
    running = await begin(start, smollm2, slots=2, archive_max_mb=512)
    prompts = [SHORT, LONG]
    alone = [await complete(running, prompt, slot, tokens=48) for slot, prompt in enumerate(prompts)]
    together = await asyncio.gather(*(complete(running, prompt, slot, 48) for slot, prompt in enumerate(prompts)))
    assert [answer["content"] for answer in together] == [answer["content"] for answer in alone]
    assert [answer["atlas"]["tokens_archived"] > 256 for answer in together] == [False, True]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"window": 1024}, "do not fit"),
        ({"cells": 192, "window": 64}, "do not fit"),
        ({"cells": 4096}, "do not fit"),
    ],
)
async def test_impossible_sizes_are_refused_with_the_reason(
    start: Start, tiny: Path, values: dict[str, int], reason: str
) -> None:
    running = await begin(start, tiny, **values)
    status, answer = await running.json("POST", "/completion", {"prompt": "Hello", "n_predict": 1})
    assert status in (500, 502, 503)
    assert reason in answer["error"]["message"]
