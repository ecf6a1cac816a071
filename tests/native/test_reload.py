"""The configuration changes while real models answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from test_life import begin_stream, child_pid, stream


async def test_only_the_model_with_other_settings_starts_anew_and_no_stream_is_cut(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3})
    live = running.supervisor.live
    for model in ("a", "b"):
        await running.chat(model, max_tokens=1)
    long = await begin_stream(running, model="a")
    finite = asyncio.create_task(stream(running, 60, model="b"))
    while not running.supervisor.fleet.scheduler.entry("b").leases:
        await asyncio.sleep(0.01)
    before = {model: child_pid(running, model) for model in ("a", "b")}
    config = live.settings.config
    overrides = {"b": {"context_size": 1024}}
    models = type(config.models).model_validate(config.models.model_dump() | {"overrides": overrides})
    live._load = lambda: replace(live.settings, config=config.model_copy(update={"models": models}))
    status, outcome = await running.json("POST", "/api/v1/config/reload")
    assert (status, outcome["restarted"]) == (200, ["b"])
    status, _ = await running.chat("b", max_tokens=1)
    assert status == 200
    assert (await finite)[-1] == b"[DONE]"
    assert child_pid(running, "b") != before["b"]
    assert child_pid(running, "a") == before["a"]
    _, props = await running.json("GET", "/props?model=b")
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert await long.content.readline()
    long.close()
