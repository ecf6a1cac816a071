"""The memory through HTTP: what a request may ask for, settings, metrics, owners, and saving without being asked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from typing import Any

import aiohttp
import pytest
from test_atlas_memory import TEXT, complete, restart, sections

FIELDS = {
    "enabled", "memory_file", "tokens_seen", "tokens_archived", "tokens_forgotten", "window_size", "window_fill_ratio",
    "memory_cells", "memory_utilization", "memory_bytes", "blend_ratio", "refreshes", "recalled_blocks", "omega_loss",
    "cached_tokens", "score_ms", "write_ms", "slide_ms", "overhead_ratio", "active",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "memory"
    made.mkdir()
    return made


async def until_exists(path) -> None:
    async with asyncio.timeout(60):
        while not path.exists():
            await asyncio.sleep(0.05)


async def until_deferred(running, number: int) -> None:
    """Wait until the child has so many tasks in its line."""
    async with asyncio.timeout(60):
        while True:
            async with running.http.get(running.url + "/metrics?model=small") as response:
                found = re.search(r"^llamacpp:requests_deferred(?:{.*})? (\d+)", await response.text(), re.MULTILINE)
            if found and int(found[1]) == number:
                return
            await asyncio.sleep(0.05)


async def test_the_answer_says_what_the_memory_did(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    _, answer = await complete(running, TEXT[:1800], tokens=24)
    atlas = answer["atlas"]
    assert set(atlas) == FIELDS
    assert atlas["enabled"] and atlas["active"] and atlas["memory_file"] is None
    assert atlas["tokens_seen"] == answer["tokens_evaluated"] + answer["tokens_predicted"] - 1
    assert 0 < atlas["tokens_archived"] < atlas["tokens_seen"]
    assert (atlas["window_size"], atlas["memory_cells"], atlas["blend_ratio"]) == (252, 256, 1.0)
    assert 0.8 < atlas["window_fill_ratio"] <= 1
    assert 0.9 < atlas["memory_utilization"] <= 1
    assert atlas["memory_bytes"] > 20_000 * atlas["tokens_seen"]
    assert 0 < atlas["omega_loss"] < 1
    assert 0 < atlas["overhead_ratio"] < 1
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, "stream": True}
    async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.content if line.startswith(b"data: {")]
    assert set(json.loads(lines[-1][6:])["atlas"]) == FIELDS


async def test_window_and_blend_of_a_request(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    text = TEXT[:1200]
    _, wide = await complete(running, text, tokens=16)
    _, narrow = await complete(running, text, tokens=16, window_size=64)
    assert narrow["atlas"]["window_size"] == 64
    assert narrow["atlas"]["tokens_archived"] > wide["atlas"]["tokens_archived"] == 0
    _, wide_again = await complete(running, text, tokens=1)
    assert wide_again["atlas"]["window_size"] == 252
    _, natural = await complete(running, TEXT[:1800], tokens=24)
    _, blind = await complete(running, TEXT[:1800], tokens=24, blend_ratio=0.0)
    assert blind["atlas"]["blend_ratio"] == 0
    assert blind["tokens"] != natural["tokens"]
    for atlas, param in [
        ({"window_size": 63}, "atlas.window_size"),
        ({"window_size": 253}, "atlas.window_size"),
        ({"window_size": 100.5}, "atlas.window_size"),
        ({"window_size": "100"}, "atlas.window_size"),
        ({"blend_ratio": -0.1}, "atlas.blend_ratio"),
        ({"blend_ratio": 1.1}, "atlas.blend_ratio"),
        ({"blend_ratio": None}, "atlas.blend_ratio"),
    ]:
        status, answer = await complete(running, "Hi", tokens=1, **atlas)
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "atlas_parameter_error", param)


async def blocks(running, path: str, body: dict) -> list[dict]:
    """Ask with and without a stream, and return the answers' blocks, which have the same place in both."""
    found = []
    for stream in (False, True):
        async with running.http.post(running.url + path, json={**body, "stream": stream}) as response:
            lines = (await response.text()).splitlines()
        assert response.status == 200, lines
        events = (
            [json.loads(line[6:]) for line in lines if line.startswith("data: {")] if stream else [json.loads(lines[0])]
        )
        holders = [event.get("response", event) for event in events]
        found += [holder["atlas"] for holder in holders if "atlas" in holder]
    assert len(found) == 2
    return found


async def test_sessions_in_other_dialects(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    greedy = {"temperature": 0, "top_k": 1}
    body = {"input": "Hi", "max_output_tokens": 4, **greedy, "atlas": {"memory_file": "responses", "append": True}}
    first, second = await blocks(running, "/v1/responses", body)
    assert (first["memory_file"], second["memory_file"]) == ("responses", "responses")
    assert set(first) - {"saved"} == FIELDS and first["tokens_seen"] < second["tokens_seen"]
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        **greedy,
        "atlas": {"memory_file": "messages", "append": True},
    }
    first, second = await blocks(running, "/v1/messages", body)
    assert (first["memory_file"], second["memory_file"]) == ("messages", "messages")
    assert set(first) - {"saved"} == FIELDS and first["tokens_seen"] < second["tokens_seen"]
    assert {file.name for file in folder.rglob("*.atlas")} >= {"responses.atlas", "messages.atlas"}
    for path in ("/v1/responses", "/v1/messages"):
        wrong = {
            "input": "Hi",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
            "atlas": {"file": "x"},
        }
        async with running.http.post(running.url + path, json=wrong) as response:
            answer = await response.json()
        assert response.status == 400 and "atlas" in answer["error"]["message"]


async def test_config(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, "Hi", tokens=1)
    status, config = await running.json("GET", "/v1/atlas/config")
    assert status == 200
    assert (config["window_size"], config["blend_ratio"], config["refresh"]) == (252, 1.0, 1)
    assert config["limits"]["window_size"] == [64, 252]
    change = {"window_size": 128, "blend_ratio": 0.5, "refresh": 4, "auto_save_interval": 10}
    status, config = await running.json("POST", "/v1/atlas/config", change | {"model": "small"})
    assert status == 200
    assert {key: config[key] for key in change} == change
    _, answer = await complete(running, TEXT[:1800], tokens=24)
    assert (answer["atlas"]["window_size"], answer["atlas"]["blend_ratio"]) == (128, 0.5)
    assert answer["atlas"]["active"]
    for wrong in [{"refresh": 0}, {"refresh": 257}, {"blend_ratio": "1"}, {"window_size": 4096}, {"windows": 1}]:
        status, answer = await running.json("POST", "/v1/atlas/config", {"blend_ratio": 0.9, "model": "small"} | wrong)
        assert status == 400
        assert answer["error"]["param"] == next(iter(wrong))
    assert (await running.json("GET", "/v1/atlas/config"))[1] == config  # nothing of them was taken
    async with running.http.post(running.url + "/v1/atlas/config", data=b'{"model": "small"') as response:
        assert response.status == 400


async def test_metrics(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    _, answer = await complete(running, TEXT[:1800], memory_file="book")
    status, metrics = await running.json("GET", "/v1/atlas/metrics")
    assert status == 200
    assert (metrics["requests_total"], metrics["saves_total"], metrics["sessions"]) == (1, 1, 1)
    assert metrics["tokens_total"] == answer["atlas"]["tokens_seen"]
    assert metrics["saved_bytes_total"] == answer["atlas"]["saved"]["bytes"]
    async with running.http.get(running.url + "/metrics") as response:
        assert '\nllamacpp:atlas_saves_total{model="small"} 1.0\n' in await response.text()
    for path in ("/v1/atlas/metrics?format=prometheus", "/metrics?model=small"):
        async with running.http.get(running.url + path) as response:
            text = await response.text()
        assert "# TYPE llamacpp:atlas_saves_total counter\nllamacpp:atlas_saves_total 1\n" in text
    async with running.http.get(running.url + "/v1/atlas/metrics/stream") as response:
        assert response.content_type == "text/event-stream"
        for _ in range(2):
            line = await response.content.readline()
            assert json.loads(line.removeprefix(b"data: ")) == metrics
            await response.content.readline()
    status, answer = await running.json("GET", "/v1/atlas/metrics?format=xml")
    assert (status, answer["error"]["param"]) == (400, "format")


async def test_owners_see_only_their_own(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, slots=2))
    await running.chat(max_tokens=1)
    child = aiohttp.UnixConnector(str(running.supervisor.fleet.children["small"].socket))
    async with aiohttp.ClientSession("http://child", connector=child) as http:

        async def ask(owner, method, path, body=None):
            headers = {"x-atlas-OWNER": owner} if owner else {}
            async with http.request(method, path, json=body, headers=headers) as response:
                return response.status, await response.json(content_type=None)

        async def read(owner, prompt, **atlas):
            body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "atlas": {"memory_file": "book"} | atlas}
            return await ask(owner, "POST", "/completion", body)

        for owner in ("ada", "bob", ""):
            status, answer = await read(owner, f"I am {owner} and")
            assert status == 200
            assert answer["atlas"]["memory_file"] == answer["atlas"]["saved"]["file"] == "book"
            assert answer["timings"]["cache_n"] == 0
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.atlas")) == [
            "ada/book.atlas", "bob/book.atlas", "book.atlas",
        ]  # fmt: skip
        assert (folder / "ada").stat().st_mode & 0o777 == 0o700
        _, files = await ask("ada", "GET", "/v1/atlas/memory")
        assert [one["file"] for one in files["files"]] == ["book.atlas"]
        _, files = await ask("eve", "GET", "/v1/atlas/memory")
        assert files == {"files": []}
        _, status_of = await ask("bob", "GET", "/v1/atlas/status")
        assert [slot["memory_file"] for slot in status_of["slots"]] == ["book"]
        slot = status_of["slots"][0]["slot"]
        _, other = await ask("", "GET", "/v1/atlas/status")
        assert len(other["slots"]) == 2
        for method, path, body in [
            ("POST", "/v1/atlas/memory/save", {"filename": "stolen", "slot": slot}),
            ("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard", "slot": slot}),
            ("DELETE", "/v1/atlas/memory?file=book", None),
        ]:
            assert (await ask("eve", method, path, body))[0] == 404
        assert (await ask("ada", "DELETE", "/v1/atlas/memory?file=book"))[0] == 200
        assert (folder / "bob" / "book.atlas").exists()
        for wrong in ("../bob", "Ada", "a" * 33, "a/b"):
            assert (await read(wrong, "I am"))[0] == 400


async def test_what_changed_is_saved_by_a_signal_and_by_the_clock(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, "--atlas-auto-save-interval", "1000000"))
    await complete(running, "Once upon a time", memory_file="one", save_memory=False)
    assert not (folder / "one.atlas").exists()
    os.kill(running.supervisor.fleet.children["small"].pid, signal.SIGUSR1)
    await until_exists(folder / "one.atlas")

    await running.json("POST", "/v1/atlas/config", {"auto_save_interval": 1})
    await complete(running, "Once upon a time", memory_file="two", save_memory=False)
    await until_exists(folder / "two.atlas")

    # also while an answer goes on
    story = {"prompt": "Once upon a time", "n_predict": 100_000, "ignore_eos": True, "stream": True, "temperature": 0}
    body = story | {"atlas": {"memory_file": "three", "save_memory": False}}
    async with running.http.post(running.url + "/completion", json=body) as response:
        await until_exists(folder / "three.atlas")
        line = await response.content.readline()
        while not line.startswith(b"data: "):
            line = await response.content.readline()
    _, metrics = await running.json("GET", "/v1/atlas/metrics")
    assert metrics["save_errors_total"] == 0


async def test_what_a_killed_child_left_is_swept_away(start, smollm2, folder):
    (folder / "half.atlas.tmp").write_bytes(b"ATLASMEM")
    (folder / "ada").mkdir()
    (folder / "ada" / "half.atlas.tmp").write_bytes(b"ATLASMEM")
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, "Hello", memory_file="other")
    assert sorted(path.name for path in folder.rglob("*") if not path.name.startswith(".")) == ["ada", "other.atlas"]


async def test_limits_delete_what_was_not_used_for_the_longest_time(start, smollm2, folder):
    limit = ["--atlas-memory-max-sessions", "2", "--atlas-memory-max-mb", "100"]
    running = await start({"small": smollm2}, **sections(folder, *limit))
    for name in ("one", "two"):
        await complete(running, "Once upon a time", memory_file=name)
    await complete(running, " and", memory_file="one", save_memory=False)  # so it is the other that was not used
    await complete(running, "Once upon a time", memory_file="three")
    assert sorted(path.name for path in folder.glob("*.atlas")) == ["one.atlas", "three.atlas"]
    await restart(running)


async def test_a_session_above_the_limit_is_not_saved(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, "--atlas-memory-max-mb", "4"))
    _, answer = await complete(running, TEXT[:1800], memory_file="large")
    assert "MiB" in answer["atlas"]["saved"]["error"]
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
    status, answer = await complete(running, "Hello", memory_file="small")
    assert status == 503
    assert "cannot be saved" in answer["error"]["message"]
    await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"})
    status, answer = await complete(running, "Hello", memory_file="small")
    assert status == 200
    assert answer["atlas"]["saved"]["bytes"] < 4 << 20


async def test_what_needs_a_slot_stands_in_line_for_it(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, "Once upon a time", memory_file="book")
    story = {"prompt": "Hello", "n_predict": 100_000, "ignore_eos": True, "stream": True, "temperature": 0}
    told: list[str] = []

    async def ask(method: str, path: str, body: dict[str, Any] | None) -> None:
        status, answer = await running.json(method, path, body)
        assert status == 200, answer
        told.append(path)

    wanted = [
        ("POST", "/v1/atlas/memory/load", {"filename": "book"}),
        ("POST", "/v1/atlas/memory/save", {"filename": "copy", "slot": 0}),
        ("POST", "/completion", {"prompt": "Hello", "n_predict": 1, "atlas": {"memory_file": "book"}}),
    ]
    async with running.http.post(running.url + "/completion", json=story) as response:
        await response.content.readline()  # the only slot is busy
        tasks = []
        for number, one in enumerate(wanted):
            tasks.append(asyncio.create_task(ask(*one)))
            await until_deferred(running, number + 1)
        assert told == []
        async with asyncio.timeout(60):  # one that leaves is waited for by nobody
            gone = asyncio.create_task(running.json("POST", "/v1/atlas/memory/load", {"filename": "book"}))
            await until_deferred(running, len(wanted) + 1)
            gone.cancel()
            await until_deferred(running, len(wanted))
        status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "no-such"})
        assert status == 404  # at once
        status, answer = await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard", "slot": 0})
        assert (status, answer["error"]["message"]) == (409, "the slot is busy")
    await asyncio.gather(*tasks)
    assert told == [path for _, path, _ in wanted]
    assert (folder / "copy.atlas").exists()


async def test_many_sessions_at_once_over_two_slots(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, slots=2))

    async def talk(i: int):
        prompt = f"The number of the house is {i * 37}. " * 3
        first_status, first = await complete(running, prompt, memory_file=f"s-{i}")
        second_status, second = await complete(running, " The number is", memory_file=f"s-{i}")
        assert (first_status, second_status) == (200, 200)
        return first["atlas"]["tokens_seen"], second["atlas"]["tokens_seen"], second["timings"]["cache_n"]

    told = await asyncio.gather(*(talk(i) for i in range(6)))
    for first, second, cached in told:
        assert second > first > 0
        assert cached > 0
    assert len(list(folder.glob("s-*.atlas"))) == 6
    _, metrics = await running.json("GET", "/v1/atlas/metrics")
    assert metrics["load_errors_total"] == metrics["save_errors_total"] == 0
