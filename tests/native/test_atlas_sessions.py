"""Sessions through the supervisor: they outlive swaps, restarts and cut answers, and belong to one model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor import atlas_file

TEXT = (Path(__file__).parents[1] / "data" / "text.txt").read_text()
TURNS = [TEXT[:2500], "\n\nIn short, the above says that", "\n\nTo put it in another way,", "\n\nAnd so"]


def sections(**atlas: Any) -> dict[str, Any]:
    """One model at a time, one slot, 512 cells; everything else of the memory as it is by default."""
    return {
        "models": {"max_loaded_models": 1, "default_model": "a"},
        "atlas": {"enabled": "auto"} | atlas,
        "performance": {"context_size": 512, "parallel": 1, "threads": 1},
    }


async def complete(running, prompt: str, tokens: int = 32, model: str = "a", **atlas: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    status, answer = await running.json("POST", "/completion", body | {"return_tokens": True, "atlas": atlas})
    assert status == 200, answer
    result: dict[str, Any] = answer
    return result


async def until_gone(running, model: str) -> None:
    async with asyncio.timeout(60):
        while await running.state(model) != "absent":
            await asyncio.sleep(0.05)


async def swap(running) -> None:
    """Let the other model push `a` out."""
    await complete(running, "Hello", 1, "b")
    await until_gone(running, "a")


async def test_a_session_goes_on_after_swaps_and_a_restart_as_without(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, **sections())
    expected = [(await complete(running, turn, memory_file="still"))["tokens"] for turn in TURNS]

    # saved by nothing but the ends of the children
    turns = iter(TURNS)
    told = [await complete(running, next(turns), memory_file="moved", save_memory=False)]
    for turn in turns:
        await swap(running)
        if turn == TURNS[-1]:
            await running.supervisor.shutdown()
            running = await start({}, **sections())
        told.append(await complete(running, turn, memory_file="moved", save_memory=False))
    assert [answer["tokens"] for answer in told] == expected
    assert [answer["timings"]["prompt_n"] < 32 for answer in told] == [False, True, True, True]
    assert told[-1]["atlas"]["tokens_archived"] > 512


async def test_models_have_sessions_of_their_own(start, smollm2, gemma3, short_tmp):
    running = await start({"a": smollm2, "b": gemma3}, **sections())
    alone = [await complete(running, "The capital of France is", 8, model, memory_file="alone") for model in "ab"]
    for model, before in zip("ab", alone, strict=True):
        answer = await complete(running, "The capital of France is", 8, model, memory_file="same")
        assert answer["tokens"] == before["tokens"]
    more = [await complete(running, " and", 8, model, memory_file="same") for model in "ab"]
    for model, again in zip("ab", more, strict=True):
        assert (await complete(running, " and", 8, model, memory_file="alone"))["tokens"] == again["tokens"]
        _, listed = await running.json("GET", f"/v1/atlas/memory?model={model}")
        assert [(one["name"], one["compatible"]) for one in listed["files"]] == [("alone", True), ("same", True)]
        assert {path.name for path in (short_tmp / "memory" / model).glob("*.atlas")} == {"alone.atlas", "same.atlas"}


@pytest.mark.parametrize("how", ["the client leaves", "the model is unloaded"])
async def test_an_answer_that_is_cut_leaves_a_session_that_goes_on(start, smollm2, how):
    running = await start({"a": smollm2}, **sections())
    body = {"prompt": TEXT[:900], "n_predict": 100_000, "stream": True, "ignore_eos": True, "temperature": 0}
    body["atlas"] = {"memory_file": "cut"}
    async with running.http.post(running.url + "/completion", json=body) as response:
        await response.content.readline()
        if how == "the model is unloaded":
            await running.json("POST", "/models/unload", {"model": "a", "force": True})
            await until_gone(running, "a")
    answer = await complete(running, " and", memory_file="cut")
    assert answer["timings"]["cache_n"] > 100
    assert answer["timings"]["prompt_n"] < 32


async def test_a_second_signal_does_not_cut_a_save(start, smollm2, short_tmp):
    """As from `systemctl stop`, which sends SIGTERM to the supervisor and its children alike."""
    running = await start({"a": smollm2}, **sections(memory_compress_level=11, save_seconds=200))
    await complete(running, TEXT[:4000], 1, memory_file="slow", save_memory=False)
    await asyncio.sleep(5)  # children that have just loaded are treated otherwise
    os.kill(running.supervisor.fleet.children["a"].pid, signal.SIGTERM)
    await running.supervisor.shutdown()
    saved = atlas_file.read(short_tmp / "memory" / "a" / "slow.atlas")
    saved.verify()
    assert saved.header.session.n_tokens > 1024
    assert not list((short_tmp / "memory" / "a").glob("*.tmp"))


async def test_the_memory_of_requests_without_a_session_persists(start, smollm2, gemma3, short_tmp):
    own = {"overrides": {"b": {"atlas": {"memory_persist": False}}}}
    with_persist = sections(memory_persist=True)
    with_persist["models"] |= own
    running = await start({"a": smollm2, "b": gemma3}, **with_persist)
    answer = await complete(running, TURNS[0])
    await swap(running)
    again = await complete(running, TURNS[0] + answer["content"] + " And")
    assert again["timings"]["prompt_n"] < 32
    assert [path.name for path in (short_tmp / "memory").rglob("*.atlas")] == ["a_memory.atlas"]


async def test_sessions_beyond_the_limit_are_deleted_the_oldest_first(start, smollm2, short_tmp):
    running = await start({"a": smollm2}, **sections(memory_max_sessions=2))
    for name in ("one", "two", "three"):
        await complete(running, "Hello", 1, memory_file=name)
    assert {path.stem for path in (short_tmp / "memory" / "a").glob("*.atlas")} == {"two", "three"}


async def test_a_folder_that_cannot_be_made_is_told(start, smollm2, short_tmp):
    (short_tmp / "memory").write_text("no folder")
    running = await start({"a": smollm2}, **sections())
    status, answer = await running.json("POST", "/completion", {"prompt": "Hello", "n_predict": 1})
    assert status == 503
    assert "no folder for memory files" in answer["error"]["message"]
    assert "atlas.memory_directory" in answer["error"]["message"]


async def atlas(running, *words: str) -> Any:
    """Run a command of `llama-supervisor atlas` and return what it prints."""
    command = [sys.executable, "-m", "supervisor", "atlas", *words, "--url", running.url, "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return json.loads(out)


async def test_sessions_are_looked_after_from_the_shell(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, **sections())
    states = [(one["id"], one["state"]) for one in (await atlas(running, "status"))["models"]]
    assert states == [("a", "unloaded"), ("b", "unloaded")]
    assert "error" in await atlas(running, "save", "book")  # nothing runs

    await complete(running, TEXT[:600], memory_file="book", save_memory=False)
    (model,) = (await atlas(running, "status", "--model", "a"))["models"]
    assert [(slot["memory_file"], slot["saved"]) for slot in model["status"]["slots"]] == [("book", False)]
    assert await atlas(running, "list") == []
    saved = await atlas(running, "save", "book")
    assert [(row["model_id"], row["name"]) for row in await atlas(running, "list")] == [("a", "book")]
    assert (await atlas(running, "reset", "--hard"))["reset_type"] == "hard"
    assert (await atlas(running, "load", "book"))["n_tokens"] == saved["n_tokens"]
    await atlas(running, "save", "copy", "--slot", "0")

    await swap(running)
    listed = await atlas(running, "list")
    assert [(row["model_id"], row["name"], row["compatible"]) for row in listed] == [
        ("a", "book", None),
        ("a", "copy", None),
    ]
    assert await atlas(running, "rm", "book", "--model", "a") == [{"name": "book", "deleted": 1}]
    gone = await atlas(running, "prune", "--keep-count", "0")
    assert [(one["in"], one["name"]) for one in gone["sessions"]] == [("a", "copy")]
    assert await running.state("a") == "absent"
    assert await atlas(running, "list") == []
