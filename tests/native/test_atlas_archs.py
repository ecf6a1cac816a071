"""What each architecture gets: the memory where keys are rotated and kept, else a reason."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Start
from tiny_models import NAMES, WITHOUT_MEMORY, make

PERFORMANCE = {"context_size": 256, "threads": 1, "parallel": 1}
REASONS = {
    "mamba": "recurrent and hybrid models keep their past in a state",
    "bert": "the model's attention is not causal",
    "gpt2": "the model's positions are not rotary",
    "qwen2vl": "M-RoPE positions",
}


SUPPORT = {"enabled": True, "reason": None, "max_context": 1 << 22, "window": 124, "memory_cells": 128}


def test_every_architecture_without_a_memory_has_its_reason() -> None:
    assert set(REASONS) == set(WITHOUT_MEMORY)


async def begin(start: Start, model: Path, enabled: str, *args: str) -> Running:
    overrides = {model.stem: {"args": list(args)}}
    sections = {"models": {"overrides": overrides}, "atlas": {"enabled": enabled}, "performance": PERFORMANCE}
    return await start({model.stem: model}, **sections)


async def support(running: Running) -> dict[str, Any]:
    _, listed = await running.json("GET", "/v1/models")
    told: dict[str, Any] = listed["data"][0]["atlas_support"]
    return told


async def reported(running: Running, before: dict[str, Any]) -> dict[str, Any]:
    """Return what the child says of its memory, a moment after it has loaded."""
    async with asyncio.timeout(30):
        while (told := await support(running)) == before:
            await asyncio.sleep(0.02)
    return told


async def check_memory(running: Running) -> None:
    before = await support(running)
    assert before["enabled"] is True
    body = {"prompt": "All that is said. " * 30, "n_predict": 40, "ignore_eos": True, "temperature": 0}
    status, answer = await running.json("POST", "/completion", body)
    assert status == 200, answer
    assert answer["tokens_predicted"] == 40
    assert answer["atlas"]["active"]
    assert answer["atlas"]["tokens_archived"] > 256
    assert answer["atlas"]["recalled_blocks"] > 0
    assert await reported(running, before) == SUPPORT


@pytest.mark.parametrize("name", NAMES)
async def test_has_the_memory(start: Start, tmp_path: Path, name: str) -> None:
    await check_memory(await begin(start, make(tmp_path / f"{name}.gguf", name), "auto"))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
async def test_sliding_window_that_is_larger_than_the_context(start: Start, tmp_path: Path, name: str) -> None:
    await check_memory(await begin(start, make(tmp_path / f"{name}.gguf", name, sliding_window=512), "auto"))


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
async def test_auto_serves_without_and_says_why(start: Start, short_tmp: Path, tmp_path: Path, name: str) -> None:
    model = make(tmp_path / f"{name}.gguf", name)
    running = await begin(start, model, "auto", *(["--embedding"] if name == "bert" else []))
    before = await support(running)
    assert before["enabled"] is False
    assert REASONS[name] in before["reason"]
    if name == "bert":
        status, answer = await running.json("POST", "/v1/embeddings", {"input": "Hello"})
    else:
        status, answer = await running.json(
            "POST", "/completion", {"prompt": "Hello", "n_predict": 4, "temperature": 0}
        )
    assert status == 200, answer
    assert "atlas" not in answer
    logs = "".join(path.read_text() for path in (short_tmp / "logs").rglob("*") if path.is_file())
    assert REASONS[name] in logs
    assert "serving without it" in logs
    told = await support(running)
    assert (told["enabled"], REASONS[name] in told["reason"]) == (False, True)


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
async def test_on_is_refused_with_the_reason(start: Start, tmp_path: Path, name: str) -> None:
    model = make(tmp_path / f"{name}.gguf", name)
    running = await begin(start, model, "on")
    status, answer = await running.json("POST", "/completion", {"prompt": "Hello", "n_predict": 4, "temperature": 0})
    assert status in (500, 502, 503)
    assert REASONS[name] in answer["error"]["message"]
