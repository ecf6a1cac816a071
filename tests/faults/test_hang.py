"""Real children hang or lose their socket: they are found, and the next one answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "native"))
from test_life import begin_stream, child_pid, kill_when_busy, until


async def test_a_stopped_child_ends_its_stream_with_an_error_event(start, smollm2):
    running = await start({"a": smollm2})
    response = await begin_stream(running, model="a")
    pid = child_pid(running, "a")
    os.kill(pid, signal.SIGSTOP)
    lines = (await response.content.read()).strip().splitlines()
    error = json.loads(lines[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_hung"
    assert "stopped (SIGSTOP)" in error["message"]
    assert b"[DONE]" not in lines[-1]
    assert (await running.chat("a", max_tokens=1))[0] == 200
    assert child_pid(running, "a") != pid


async def test_an_answer_that_had_not_begun_comes_from_a_fresh_child(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    answer = asyncio.create_task(running.chat("a", max_tokens=100, ignore_eos=True))
    pid = await kill_when_busy(running, "a", signal.SIGSTOP)
    status, body = await answer
    assert (status, body["usage"]["completion_tokens"]) == (200, 100)
    assert child_pid(running, "a") != pid


async def test_what_is_not_asked_again_is_a_504(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    os.kill(child_pid(running, "a"), signal.SIGSTOP)
    status, body = await running.json("POST", "/lora-adapters", [])
    assert (status, body["error"]["code"]) == (504, "upstream_hung")


async def test_an_idle_child_that_was_stopped_is_found_before_anybody_asks(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    os.kill(child_pid(running, "a"), signal.SIGSTOP)
    await until(lambda: "a" not in running.supervisor.fleet.children)
    _, status = await running.json("GET", "/api/v1/status")
    assert (status["models"][0]["state"], status["models"][0]["restarts"]) == ("failed", 1)
    assert "hung: stopped (SIGSTOP)" in status["models"][0]["error"]


async def test_another_model_is_served_while_one_hangs(start, smollm2, gemma3):
    running = await start({"a": smollm2, "b": gemma3}, models={"max_loaded_models": 1})
    response = await begin_stream(running, model="a")
    os.kill(child_pid(running, "a"), signal.SIGSTOP)
    status, _ = await running.chat("b", max_tokens=1)
    assert status == 200
    response.close()


async def test_a_stopped_child_makes_room_without_being_killed(start, smollm2, native_server, short_tmp, caplog):
    """It can still save its memory. The name of the link says nothing of the build, so the exit is waited for."""
    (short_tmp / "stock").symlink_to(native_server)
    server = {"llama_server": short_tmp / "stock"}
    running = await start({"a": smollm2, "b": smollm2}, models={"max_loaded_models": 1}, server=server)
    await running.chat("a", max_tokens=1)
    os.kill(child_pid(running, "a"), signal.SIGSTOP)
    status, _ = await running.chat("b", max_tokens=1)
    assert status == 200
    assert "did not stop in" not in caplog.text
    assert running.supervisor.fleet.scheduler.entry("a").restarts == 0


async def test_a_child_without_its_socket_is_replaced(start, smollm2):
    running = await start({"a": smollm2})
    await running.chat("a", max_tokens=1)
    pid = child_pid(running, "a")
    running.supervisor.fleet.children["a"].socket.unlink()
    await until(lambda: "a" not in running.supervisor.fleet.children)
    assert (await running.chat("a", max_tokens=1))[0] == 200
    assert child_pid(running, "a") != pid


async def test_a_child_that_only_works_hard_is_left_alone(start, smollm2):
    """Two prompts of a thousand tokens at once, on one thread."""
    running = await start({"a": smollm2}, performance={"context_size": 4096, "threads": 1, "parallel": 2})
    await running.chat("a", max_tokens=1)
    pid = child_pid(running, "a")
    prompt = "The quick brown fox jumps over the lazy dog. " * 100
    answers = await asyncio.gather(
        *(running.json("POST", "/completion", {"model": "a", "prompt": prompt + x, "n_predict": 1}) for x in "ab")
    )
    assert {status for status, _ in answers} == {200}
    assert child_pid(running, "a") == pid
