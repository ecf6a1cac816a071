"""The memory budget against real children: how much they take, who makes room, what is refused."""

from __future__ import annotations

import asyncio

import pytest

from supervisor.sizing import peak_memory

PROMPT = [1000 + number for number in range(600)]
"""More than one batch of 512 tokens, so that all of a child's buffers are used."""


async def work(running, model: str) -> int:
    """Let a model read a prompt and answer; return the peak of its memory."""
    body = {"model": model, "prompt": PROMPT, "n_predict": 4, "temperature": 0}
    status, answer = await running.json("POST", "/completion", body)
    assert status == 200, answer
    peak = peak_memory(running.supervisor.fleet.children[model].pid)
    assert peak is not None
    return peak


@pytest.mark.parametrize("context", [2048, 8192])
async def test_the_estimate_is_within_15_percent_of_the_peak(start, smollm2, gemma3, context):
    running = await start({"a": smollm2, "b": gemma3}, performance={"context_size": context})
    for model in "ab":
        peak = await work(running, model)
        predicted = running.supervisor.fleet.sizing.sizes[model].predicted["ram"]
        assert predicted == pytest.approx(peak, rel=0.15)
    _, status = await running.json("GET", "/api/v1/status")
    assert status["memory"]["counted_bytes"]["ram"] <= status["memory"]["budget_bytes"]["ram"]


async def test_two_models_that_do_not_fit_together_take_turns(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, server={"memory_budget": "500 MiB"})
    for model, other in ("ab", "ba", "ab"):
        assert (await running.chat(model))[0] == 200
        assert await running.state(model) == "ready"
        assert await running.state(other) == "absent"
    async with running.http.get(running.url + "/metrics") as response:
        text = await response.text()
    assert 'llama_supervisor_evictions_total{model="a",reason="room"} 1.0' in text
    assert 'llama_supervisor_memory_budget_bytes{pool="ram"} 5.24288e+08' in text


async def test_what_cannot_fit_is_refused_at_once_and_a_higher_budget_lets_it_in(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, server={"memory_budget": "300 MiB"})
    assert (await running.chat("a"))[0] == 200
    async with asyncio.timeout(5):
        async with running.http.post(running.url + "/v1/chat/completions", json={"model": "b"}) as response:
            assert response.status == 507 and "Retry-After" not in response.headers
            error = (await response.json())["error"]
        assert error["code"] == "model_too_large" and "more than the budget of 300 MiB" in error["message"]
        assert (await running.json("POST", "/models/load", {"model": "b"}))[0] == 507
    assert await running.state("a") == "ready"
    config = running.supervisor.config
    more = config.model_copy(update={"server": config.server.model_copy(update={"memory_budget": "2 GiB"})})
    assert running.supervisor.fleet.apply_settings(more) == []
    assert (await running.chat("b"))[0] == 200
    assert await running.state("a") == "ready"
