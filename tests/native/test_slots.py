"""Prompts survive a swap: on the real llama-server, whose `cache_n` says how many tokens it did not read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_life import until_gone

STORY = "".join(f"Fact {number}: the quick brown fox jumps over a lazy dog. " for number in range(11))
QUESTION = [{"role": "user", "content": STORY + "Say hello."}]
ONE = {"max_loaded_models": 1}
SMALL = {"context_size": 1024, "threads": 2}


async def say(running, model: str, messages: list[dict[str, str]]):
    """Return the answer's text and how many tokens of the prompt were cached."""
    status, answer = await running.chat(model, messages=messages, max_tokens=8, seed=1)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["timings"]["cache_n"]


def next_turn(text: str) -> list[dict[str, str]]:
    return [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "And now goodbye."}]


def files(running) -> list[Path]:
    return sorted(path for path in (running.models.parent / "slots").rglob("*") if path.is_file())


async def swap(running, model: str = "a", other: str = "b") -> None:
    await running.chat(other, max_tokens=1)
    await until_gone(running, model)


async def unload(running, model: str, **more: bool) -> None:
    await running.json("POST", "/models/unload", {"model": model} | more)
    await until_gone(running, model)


async def metric(running, name: str) -> float:
    async with running.http.get(running.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llama_supervisor_slot_cache_{name}"))


async def test_a_conversation_goes_on_after_a_swap_as_without_one(start, smollm2, gemma3, short_tmp):
    running = await start({"a": smollm2, "b": gemma3}, models=ONE, performance=SMALL)
    text, cached = await say(running, "a", QUESTION)
    assert cached == 0
    await swap(running)
    (path,) = files(running)
    assert path.suffix == ".slot"
    assert path.stat().st_mode & 0o777 == 0o600
    assert await metric(running, "bytes") == path.stat().st_size
    with_swap, cached = await say(running, "a", next_turn(text))
    assert cached > 128
    assert await metric(running, "saved_total") == await metric(running, "restored_total") == 1
    assert await metric(running, "failures_total") == 0

    other = await start(
        {}, models=ONE | {"slot_cache": False}, performance=SMALL, server={"runtime_dir": short_tmp / "2"}
    )
    assert (await say(other, "a", QUESTION))[0] == text
    without, cached = await say(other, "a", next_turn(text))
    assert cached > 128
    assert with_swap == without


async def test_it_outlives_the_supervisor_and_an_idle_start(start, smollm2):
    running = await start({"a": smollm2}, performance=SMALL)
    text, _ = await say(running, "a", QUESTION)
    await running.supervisor.shutdown()
    again = await start({}, performance=SMALL)
    await again.json("POST", "/models/load", {"model": "a"})
    assert (await again.chat("a", max_tokens=1))[0] == 200  # another prompt
    await unload(again, "a")
    assert (await say(again, "a", next_turn(text)))[1] > 128


async def test_a_model_that_slides_is_read_again_unless_it_keeps_all(start, smollm2, gemma3):
    full = {"a": {"args": ["--swa-full"]}}
    running = await start({"a": gemma3, "b": gemma3}, models=ONE | {"overrides": full}, performance=SMALL)
    await say(running, "a", QUESTION)
    await swap(running)
    await say(running, "b", QUESTION)
    await swap(running, "b", "a")
    assert len(files(running)) == 1
    assert (await say(running, "a", QUESTION))[1] > 128


@pytest.mark.parametrize("own", [{"slot_cache": False}, {"slot_cache_max_mb": 1}])
async def test_a_model_may_keep_none(start, smollm2, own):
    running = await start({"a": smollm2}, models={"overrides": {"a": own}}, performance=SMALL)
    await say(running, "a", QUESTION)
    await unload(running, "a")
    assert files(running) == []
    assert (await say(running, "a", QUESTION))[1] == 0


async def test_a_stop_by_force_saves_nothing(start, smollm2):
    running = await start({"a": smollm2}, performance=SMALL)
    await say(running, "a", QUESTION)
    await unload(running, "a", force=True)
    assert files(running) == []


@pytest.mark.parametrize("how", ["cut", "forged"])
async def test_a_broken_file_means_a_clean_start(start, smollm2, how):
    running = await start({"a": smollm2}, performance=SMALL)
    text, _ = await say(running, "a", QUESTION)
    await unload(running, "a")
    (path,) = files(running)
    if how == "cut":
        os.truncate(path, 1000)
    else:  # only llama-server finds out
        path.write_bytes(b"?" * path.stat().st_size)
        stem = path.stem.rpartition("-")[0]
        path.rename(path.with_name(f"{stem}-{path.stat().st_mtime_ns}.slot"))
    assert (await say(running, "a", QUESTION)) == (text, 0)
    assert await metric(running, "failures_total") == (how == "forged")
    assert await metric(running, "restored_total") == 0
    await unload(running, "a")
    assert (await say(running, "a", next_turn(text)))[1] > 128


async def test_other_settings_get_nothing(start, smollm2):
    running = await start({"a": smollm2}, performance=SMALL)
    await say(running, "a", QUESTION)
    await unload(running, "a")
    await running.json("POST", "/models/load", {"model": "a", "parameters": {"context_size": 2048}})
    assert (await say(running, "a", QUESTION))[1] == 0


async def test_a_replaced_model_gets_nothing(start, smollm2):
    running = await start({"a": smollm2}, performance=SMALL)
    await say(running, "a", QUESTION)
    await unload(running, "a")
    (running.models / "a.gguf").unlink()
    (running.models / "a.gguf").write_bytes(smollm2.read_bytes())
    await running.supervisor.catalog.rescan()
    assert (await say(running, "a", QUESTION))[1] == 0


async def test_a_full_disk_costs_nothing_but_the_prompt(start, smollm2, native_server, short_tmp, caplog):
    wrapper = short_tmp / "small-disk"
    wrapper.write_text(f'#!/bin/sh\ntrap "" XFSZ\nulimit -f 2048\nexec "{native_server}" "$@"\n')
    wrapper.chmod(0o755)
    running = await start({"a": smollm2}, server={"llama_server": wrapper}, performance=SMALL)
    text, _ = await say(running, "a", QUESTION)
    await unload(running, "a")
    assert files(running) == []
    assert await metric(running, "failures_total") == 1
    assert "cannot save its prompts" in caplog.text
    assert (await say(running, "a", QUESTION)) == (text, 0)


async def test_a_folder_that_cannot_be_had_costs_nothing_but_the_prompt(start, smollm2, short_tmp, caplog):
    (short_tmp / "file").write_text("")
    models = {"slot_cache_directory": short_tmp / "file"}
    running = await start({"a": smollm2}, models=models, performance=SMALL)
    await say(running, "a", QUESTION)
    await unload(running, "a")
    assert (await say(running, "a", QUESTION))[1] == 0
    assert "no prompts are kept over swaps" in caplog.text


async def test_the_folder_is_ours_alone(start, smollm2, short_tmp):
    own = {"b": {"args": ["--slot-save-path", str(short_tmp)]}}
    running = await start({"a": smollm2, "b": smollm2}, models={"overrides": own}, performance=SMALL)
    body = {"model": "a", "filename": "x"}
    status, answer = await running.json("POST", "/slots/0?action=save", body)
    assert (status, answer["error"]["type"]) == (501, "not_supported_error")
    assert await running.state("a") == "absent"
    await say(running, "b", QUESTION)
    status, answer = await running.json("POST", "/slots/0?action=save", body | {"model": "b"})
    assert (status, answer["filename"]) == (200, "x")
    await unload(running, "b")
    assert files(running) == []
