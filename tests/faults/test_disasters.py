"""Children that die at the worst moment or at once, disks that are full, clocks that jump, and clients that dawdle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.append(str(Path(__file__).parents[1] / "native"))
from test_life import STORY, begin_stream, child_pid, kill_when_busy, until

LONG = "The quick brown fox jumps over the lazy dog. " * 100


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "stopped (SIGSTOP)")],
    ids=["SIGKILL", "SIGSTOP"],
)
async def test_a_child_that_is_lost_while_it_loads_is_given_up(start, smollm2, number, words):
    running = await start({"a": smollm2})
    answer = asyncio.create_task(running.chat("a", max_tokens=1))
    await until(lambda: "a" in running.supervisor.fleet.children and child_pid(running, "a"))
    os.kill(child_pid(running, "a"), number)
    status, body = await answer
    assert (status, body["error"]["code"]) == (503, "model_start_failed")
    assert words in body["error"]["message"]
    assert (await running.json("POST", "/models/load", {"model": "a"}))[0] == 200  # does not wait for the pause
    assert (await running.chat("a", max_tokens=1))[0] == 200


LOST = {signal.SIGKILL: "upstream_failed", signal.SIGSTOP: "upstream_hung"}


@pytest.mark.parametrize("number", LOST, ids=lambda number: number.name)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_child_that_is_lost_over_a_prompt(start, smollm2, number, stream):
    """llama-server begins a stream before it reads the prompt, so it ends with an error; the other is asked anew."""
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    body = {"model": "a", "prompt": LONG, "n_predict": 2, "stream": stream}
    asking = asyncio.create_task(running.http.post(running.url + "/completion", json=body))
    pid = await kill_when_busy(running, "a", number)
    async with await asking as response:
        text = await response.text()
    assert response.status == 200
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    if stream:
        assert last["error"]["code"] == LOST[number]
    else:
        assert last["tokens_predicted"] == 2
    assert (await running.chat("a", max_tokens=1))[0] == 200
    assert child_pid(running, "a") != pid


async def test_a_server_that_exits_at_once(start, smollm2, short_tmp):
    binary = short_tmp / "server"
    binary.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 3\n")
    binary.chmod(0o755)
    running = await start({"a": smollm2, "b": smollm2}, server={"llama_server": binary})
    status, body = await running.chat("a")
    assert (status, body["error"]["code"]) == (503, "model_start_failed")
    assert "exited with code 3 while loading" in body["error"]["message"]
    assert "no such thing" in body["error"]["message"]
    running.supervisor.fleet.scheduler.entry("a").retry_at += 3600
    async with running.http.post(running.url + "/completion", json={"model": "a"}) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
    assert running.supervisor.fleet.scheduler.entry("a").starts == 1  # the pause holds
    assert (await running.json("GET", "/readyz"))[0] == 200
    assert running.supervisor.fleet.children == {}


async def test_a_full_disk_for_logs_costs_the_file_and_nothing_else(start, smollm2, short_tmp, caplog):
    folder = short_tmp / "logs"
    folder.mkdir()
    (folder / "a.log").symlink_to("/dev/full")
    running = await start({"a": smollm2})
    assert (await running.chat("a", max_tokens=2))[0] == 200
    assert caplog.text.count("cannot be written: No space left on device") == 1
    async with running.http.get(running.url + "/api/v1/models/a/logs") as response:
        assert len((await response.text()).splitlines()) > 3


async def test_a_full_disk_for_slots_is_an_error_of_that_request_only(start, smollm2, short_tmp):
    folder = short_tmp / "slots"
    folder.mkdir()
    (folder / "full").symlink_to("/dev/full")
    args = {"overrides": {"a": {"args": ["--slot-save-path", f"{folder}/"]}}}
    running = await start({"a": smollm2}, models=args)
    await running.chat("a", max_tokens=2, id_slot=0)
    pid = child_pid(running, "a")
    status, body = await running.json("POST", "/slots/0?action=save&model=a", {"filename": "full"})
    assert status >= 400, body
    assert (await running.json("POST", "/slots/0?action=save&model=a", {"filename": "good"}))[0] == 200
    assert (await running.chat("a", max_tokens=2))[0] == 200
    assert child_pid(running, "a") == pid


@pytest.mark.parametrize("years", [-20, 20])
async def test_a_clock_that_jumps_changes_nothing(start, smollm2, monkeypatch, years):
    """The wall clock is set while one model streams, another waits for its place, and both have a time to idle."""
    running = await start({"a": smollm2, "b": smollm2}, models={"max_loaded_models": 1, "idle_unload_seconds": 3600})
    response = await begin_stream(running, tokens=60, model="a")
    waiting = asyncio.create_task(running.chat("b", max_tokens=1))
    scheduler = running.supervisor.fleet.scheduler
    await until(lambda: scheduler.entry("b").waiters)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * 31_557_600)
    text = await response.text()
    assert text.rstrip().endswith("[DONE]")
    assert (await waiting)[0] == 200
    await running.supervisor.catalog.rescan()
    assert (await running.json("GET", "/readyz"))[0] == 200
    assert await running.state("b") == "ready"
    assert [scheduler.entry(name).restarts + scheduler.entry(name).timed_out for name in "ab"] == [0, 0]


async def test_a_client_that_leaves_the_queue_is_never_asked_for(start, smollm2):
    running = await start({"a": smollm2}, inference={"max_in_flight": 1})
    first = await begin_stream(running, model="a")
    entry = running.supervisor.fleet.scheduler.entry("a")
    gone = asyncio.create_task(running.http.post(running.url + "/v1/chat/completions", json=STORY | {"model": "a"}))
    await until(lambda: entry.waiters)
    gone.cancel()
    await until(lambda: not entry.waiters)
    assert len(entry.leases) == 1  # the first one still streams
    first.close()
    await until(lambda: not entry.leases)
    assert (await running.chat("a", max_tokens=1))[0] == 200
    _, slots = await running.json("GET", "/slots?model=a")
    assert not any(slot["is_processing"] for slot in slots)


async def test_many_slow_clients_keep_nobody_out(start, smollm2):
    running = await start({"a": smollm2}, api={"idle_seconds": 3, "stall_seconds": 3})
    await running.chat("a", max_tokens=1)
    url = urlsplit(running.url)
    head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    slow = [await asyncio.open_connection(url.hostname, url.port) for _ in range(200)]
    for number, (_, writer) in enumerate(slow):
        writer.write(head + b"\r\n{" if number % 2 else head)
    assert (await running.chat("a", max_tokens=1))[0] == 200
    assert len(running.supervisor.fleet.scheduler.entry("a").leases) == 0
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(reader.read() for reader, _ in slow))
    assert [answer[9:12] for answer in answers] == [b"", b"408"] * 100
    for _, writer in slow:
        writer.close()
