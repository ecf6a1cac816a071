"""Children come and go: swap, unload, crash, replaced files, shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal

import psutil
import pytest

from supervisor.setup import native

STORY = {"messages": [{"role": "user", "content": "Tell a long story."}], "stream": True, "ignore_eos": True}


async def stream(running, tokens: int, **more):
    """Return the events of a stream of `tokens` tokens."""
    body = STORY | {"max_tokens": tokens, "temperature": 0} | more
    events = []
    async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
    return events


async def begin_stream(running, tokens: int = 100_000, **more):
    """Start a stream and return its response after the first event."""
    body = STORY | {"max_tokens": tokens} | more
    response = await running.http.post(running.url + "/v1/chat/completions", json=body)
    assert response.status == 200
    await response.content.readline()
    return response


async def until(condition, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not (await condition() if asyncio.iscoroutinefunction(condition) else condition()):
            await asyncio.sleep(0.02)


async def until_gone(running, model: str) -> None:
    async def gone():
        return await running.state(model) == "absent"

    await until(gone)


def iter_now(queue: asyncio.Queue):
    """Yield what is in `queue` already."""
    while not queue.empty():
        yield queue.get_nowait()


def child_pid(running, model: str) -> int:
    return running.supervisor.fleet.children[model].pid


async def test_two_models_run_side_by_side_within_the_budget(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, models={"max_loaded_models": 2})
    assert {status for status, _ in await asyncio.gather(running.chat("a"), running.chat("b"))} == {200}
    assert await running.state("a") == await running.state("b") == "ready"


async def test_an_idle_model_is_swapped_out_and_back(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, models={"max_loaded_models": 1})
    for model, other in (("a", "b"), ("b", "a"), ("a", "b")):
        status, answer = await running.chat(model)
        assert (status, answer["model"]) == (200, model)
        await until_gone(running, other)  # it may still exit while the next one answers


@pytest.mark.parametrize("known", [True, False])
async def test_the_next_model_loads_while_the_one_before_exits_unless_they_may_share_a_gpu(
    start, smollm2, native_server, short_tmp, known
):
    server = native_server
    if not known:
        server = short_tmp / "stock"
        server.symlink_to(native_server)
    models = {"max_loaded_models": 1}
    running = await start({"a": smollm2, "b": smollm2}, models=models, server={"llama_server": server})
    await running.chat("a", max_tokens=1)
    events = running.supervisor.fleet.events.listen()
    await running.chat("b", max_tokens=1)
    await until_gone(running, "a")
    told = [(e["model"], e["data"]["status"]) for e in iter_now(events) if "progress" not in e["data"]]
    gone, loading = told.index(("a", "unloaded")), told.index(("b", "loading"))
    assert (loading < gone) == native.is_cpu_build(server)


async def test_a_running_answer_finishes_before_the_swap(start, smollm2, gemma3):
    running = await start(
        {"a": smollm2, "b": gemma3}, models={"max_loaded_models": 1}, inference={"max_wait_seconds": 0.2}
    )
    await running.chat("a", max_tokens=1)
    answer = asyncio.create_task(stream(running, 150, model="a"))
    await until(lambda: running.supervisor.fleet.scheduler.entry("a").leases)
    status, _ = await running.chat("b", max_tokens=1)
    assert status == 200
    events = await answer
    assert events[-1] == b"[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


async def test_requests_for_a_model_under_steady_load_do_not_keep_another_out(start, smollm2, gemma3):
    running = await start(
        {"a": smollm2, "b": gemma3}, models={"max_loaded_models": 1}, inference={"max_wait_seconds": 0.5}
    )
    served = asyncio.Event()

    async def keep_busy():
        while not served.is_set():
            status, _ = await running.chat("a", max_tokens=4)
            assert status == 200

    await running.chat("a", max_tokens=1)
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(keep_busy())
        status, _ = await asyncio.wait_for(running.chat("b", max_tokens=1), 60)
        assert status == 200
        served.set()


async def test_unload_lets_running_answers_finish(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    answer = asyncio.create_task(stream(running, 100, model="a"))
    await until(lambda: running.supervisor.fleet.scheduler.entry("a").leases)
    status, _ = await running.json("POST", "/models/unload", {"model": "a"})
    assert status == 200
    assert (await answer)[-1] == b"[DONE]"
    await until_gone(running, "a")


async def test_forced_unload_ends_streams_with_an_error_event(start, smollm2):
    running = await start({"a": smollm2})
    response = await begin_stream(running)
    await running.json("POST", "/models/unload", {"model": "a", "force": True})
    rest = (await response.content.read()).strip().splitlines()
    error = json.loads(rest[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_failed"
    assert b"[DONE]" not in rest


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_killed_child_ends_streams_with_an_error_event_and_comes_back(start, smollm2, path):
    running = await start({"a": smollm2})
    body = STORY | {"max_tokens": 100_000}
    response = await running.http.post(running.url + path, json=body)
    await response.content.readline()
    os.kill(child_pid(running, "a"), signal.SIGKILL)
    lines = (await response.content.read()).strip().splitlines()
    event = json.loads(lines[-1].removeprefix(b"data: "))
    assert "error" in event
    if path == "/v1/messages":
        assert lines[-2] == b"event: error"
        assert event["type"] == "error"
    status, _ = await running.chat("a", max_tokens=1)
    assert status == 200
    _, listed = await running.json("GET", "/api/v1/status")
    assert listed["models"][0]["restarts"] == 1


async def kill_when_busy(running, model: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to the child of `model` once it has a request; return its pid."""
    scheduler = running.supervisor.fleet.scheduler
    await until(lambda: scheduler.entry(model).leases)
    await asyncio.sleep(0.2)
    pid = child_pid(running, model)
    os.kill(pid, number)
    return pid


async def test_an_answer_that_had_not_begun_comes_from_a_fresh_child(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    answer = asyncio.create_task(running.chat("a", max_tokens=150, ignore_eos=True))
    first = await kill_when_busy(running, "a")
    status, body = await answer
    assert (status, body["usage"]["completion_tokens"]) == (200, 150)
    assert child_pid(running, "a") != first


async def test_an_answer_that_two_children_die_over_is_a_502(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    answer = asyncio.create_task(running.chat("a", max_tokens=100_000, ignore_eos=True))
    first = await kill_when_busy(running, "a")
    await until(lambda: "a" in running.supervisor.fleet.running() and child_pid(running, "a") != first)
    await kill_when_busy(running, "a")
    status, body = await answer
    assert (status, body["error"]["code"]) == (502, "upstream_failed")


async def test_load_progress_is_told_as_events(start, smollm2):
    running = await start({"a": smollm2})
    async with running.http.get(running.url + "/models/sse") as response:
        status, answer = await running.json("POST", "/models/load", {"model": "a"})
        assert (status, answer) == (200, {"success": True})
        seen = []
        async with asyncio.timeout(60):
            async for line in response.content:
                if line.startswith(b"data: "):
                    seen.append(json.loads(line[6:]))
                    if seen[-1]["data"].get("status") == "loaded":
                        break
    assert {event["event"] for event in seen} == {"model_status"}
    progress = [event["data"]["progress"]["value"] for event in seen if event["data"].get("progress")]
    assert progress
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


async def test_a_model_copied_into_the_folder_while_serving_answers(start, smollm2, gemma3):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    await asyncio.to_thread(shutil.copyfile, gemma3, running.models / "new.gguf")

    async def listed():
        _, models = await running.json("GET", "/v1/models")
        return any(one["id"] == "new" and one["status"]["value"] == "unloaded" for one in models["data"])

    await until(listed)
    status, answer = await running.chat("new", max_tokens=1)
    assert (status, answer["model"]) == (200, "new")
    (running.models / "new.gguf").unlink()

    async def gone():
        return await running.state("new") == "absent" and (await running.chat("new"))[0] == 404

    await until(gone)
    assert (await running.chat("a", max_tokens=1))[0] == 200


async def test_a_replaced_file_is_swapped_in_when_its_answers_end(start, smollm2, gemma3, short_tmp):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    first = child_pid(running, "a")
    response = await begin_stream(running, 200, model="a")
    link = short_tmp / "link"
    link.symlink_to(gemma3)
    link.replace(running.models / "a.gguf")
    assert b"[DONE]" in await response.content.read()

    async def swapped():
        _, model = await running.json("GET", "/v1/models/a")
        return model["architecture_name"] == "gemma3" and await running.state("a") == "absent"

    await until(swapped)
    assert (await running.chat("a", max_tokens=1))[0] == 200
    assert child_pid(running, "a") != first


async def test_shutdown_drains_and_leaves_nothing(start, smollm2):
    running = await start({"a": smollm2}, server={"drain_seconds": 30})
    response = await begin_stream(running, 60)
    pid = child_pid(running, "a")
    stopping = asyncio.create_task(running.supervisor.shutdown())
    assert b"[DONE]" in await response.content.read()
    await asyncio.wait_for(stopping, 30)
    assert not psutil.pid_exists(pid)
    assert not running.runtime.exists()


async def test_shutdown_does_not_wait_for_ever(start, smollm2):
    running = await start({"a": smollm2}, server={"drain_seconds": 0.3})
    response = await begin_stream(running)
    pid = child_pid(running, "a")
    await asyncio.wait_for(running.supervisor.shutdown(), 30)
    rest = await response.content.read()
    assert b'"error"' in rest
    assert not psutil.pid_exists(pid)


async def test_new_requests_are_refused_while_draining(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)  # keeps a connection open
    running.supervisor.fleet.scheduler.closing = True
    async with running.http.post(running.url + "/v1/completions", json={"prompt": "x"}) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
    running.supervisor.fleet.scheduler.closing = False


async def test_idle_models_are_unloaded(start, smollm2):
    running = await start({"a": smollm2}, models={"idle_unload_seconds": 0.2})
    await running.chat("a", max_tokens=1)
    await until_gone(running, "a")


async def test_logs_of_a_model(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    async with running.http.get(running.url + "/api/v1/models/a/logs?lines=500") as response:
        assert "model loaded" in await response.text()
    assert "model loaded" in (running.models.parent / "logs" / "a.log").read_text()


async def test_logs_are_followed_from_the_first_line_on(start, smollm2):
    running = await start({"a": smollm2})
    async with asyncio.timeout(60):
        async with running.http.get(running.url + "/api/v1/models/a/logs?follow=1") as response:
            await running.chat("a", max_tokens=1)
            lines = []
            async for line in response.content:
                lines.append(line.decode().rstrip("\n"))
                if "model loaded" in lines[-1]:
                    break
    assert lines == running.supervisor.fleet.log_of("a").tail(1000)[: len(lines)]


async def test_a_child_that_does_not_speak_the_protocol_is_polled(start, smollm2, native_server, short_tmp):
    wrapper = short_tmp / "stock"
    wrapper.write_text(f'#!/bin/sh\nunset LLAMA_SERVER_ROUTER_PORT\nexec "{native_server}" "$@"\n')
    wrapper.chmod(0o755)
    running = await start({"a": smollm2}, server={"llama_server": wrapper})
    status, _ = await running.chat("a", max_tokens=1)
    assert status == 200
    await asyncio.wait_for(running.supervisor.shutdown(), 30)


async def test_a_hung_child_is_killed_at_stop(start, smollm2):
    running = await start({"a": smollm2}, server={"stop_seconds": 0.5})
    await running.chat("a", max_tokens=1)
    pid = child_pid(running, "a")
    os.kill(pid, signal.SIGSTOP)
    await running.json("POST", "/models/unload", {"model": "a"})
    await until(lambda: not psutil.pid_exists(pid))
