"""The routes that KAREN's documents describe, with children that answer as the request says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import test_gate
from test_gate import Front

begin, front, open_front = test_gate.begin, test_gate.front, test_gate.open_front

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
TIMINGS = {"prompt_ms": 1.5, "predicted_ms": 20.0, "predicted_per_second": 100.0}
ANSWER = {
    "choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
    "timings": TIMINGS,
}


def says(*pieces: str, **more: Any) -> dict[str, Any]:
    """Return the parameters with which the fake child answers so."""
    return {"say": list(pieces)} | more


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def delta(**fields: Any) -> str:
    return event(choices=[{"delta": fields, "finish_reason": None}])


async def ask(one: Front, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
    status, answer, _ = await one.ask("POST" if body is not None else "GET", path, key, body)
    return status, answer


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_inference_tells_the_answer_and_its_timing(open_front):
    body = {"prompt": "Hi", "parameters": says(json.dumps(ANSWER), max_tokens=2)}
    status, answer = await ask(open_front, "/inference", body | {"model_id": "uno"})
    timing = answer.pop("timing")
    assert (status, answer) == (200, {"model": "one", "response": "Hello", "finish_reason": "stop", "usage": USAGE})
    assert timing["total_ms"] >= timing["wait_ms"] >= 0
    assert (timing["prompt_ms"], timing["generation_ms"], timing["tokens_per_second"]) == (1.5, 20.0, 100.0)


async def test_what_the_child_is_asked(open_front):
    body = {"prompt": "Hi", "parameters": {"status": 418, "temperature": 0}, "model": "two"}
    status, answer = await ask(open_front, "/inference", body)
    assert (status, answer["method"], answer["target"]) == (418, "POST", "/v1/chat/completions")  # as the child says it
    assert [name for name, _ in answer["headers"]] == ["Host", "Content-Type", "X-Request-Id", "Content-Length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_is_charged_and_says_whose_sessions(front, stream):
    key = await front.key("a", tokens_per_minute=9, owner="ada")
    body = {"prompt": "Hi", "model": "one", "stream": stream}
    status, answer = await ask(front, "/inference", body | {"parameters": {"status": 418}}, key)
    headers = {name.lower(): value for name, value in answer["headers"]}
    assert headers["x-atlas-owner"] == "ada"
    assert "authorization" not in headers
    pieces = [delta(content="a"), event(choices=[], usage=USAGE)] if stream else [json.dumps(ANSWER)]
    for expected in (200, 429):
        status, answer = await ask(front, "/inference", body | {"parameters": says(*pieces)}, key)
        assert status == expected, answer


async def test_inference_in_pieces(open_front):
    end = event(choices=[{"delta": {}, "finish_reason": "length"}])
    last = event(choices=[], usage=USAGE, timings=TIMINGS, atlas={"active": True})
    pieces = [delta(role="assistant", content=None), delta(content="Hé")[:20], delta(content="Hé")[20:], end, last]
    parameters = says(*pieces, "data: [DONE]\n\n", type="text/event-stream")
    status, text = await ask(open_front, "/inference", {"prompt": "Hi", "stream": True, "parameters": parameters})
    first, ending, done = events(text)
    assert (status, first, done) == (200, {"response": "Hé"}, "[DONE]")
    assert (ending["done"], ending["model"], ending["finish_reason"]) == (True, "one", "length")
    assert (ending["usage"], ending["atlas"], ending["timing"]["generation_ms"]) == (USAGE, {"active": True}, 20.0)


async def test_an_error_within_a_stream_ends_it(open_front):
    broken = event(error={"message": "it died", "type": "server_error"})
    parameters = says(delta(content="a"), broken)
    _, text = await ask(open_front, "/inference", {"prompt": "Hi", "stream": True, "parameters": parameters})
    assert events(text) == [{"response": "a"}, {"error": {"message": "it died", "type": "server_error"}}]


async def test_a_child_that_dies_within_a_stream(open_front):
    running = open_front.supervisor
    body = {"prompt": "Hi", "stream": True, "parameters": says(delta(content="a"), hang=True), "model": "one"}
    async with open_front.http.post(f"{running.urls[0]}/inference", json=body) as response:
        first = await response.content.readuntil(b"\n\n")
        running.fleet.children["one"].kill()
        rest = await response.content.read()
    assert first == b'data: {"response": "a"}\n\n'
    assert events(rest.decode())[0]["error"]["code"] == "upstream_failed"
    assert not running.fleet.scheduler.entry("one").leases


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["Hi"]}, "prompt"),
        ({"prompt": "Hi", "parameters": [1]}, "parameters"),
        ({"prompt": "Hi", "parameters": 0}, "parameters"),
        ({"prompt": "Hi", "parameters": {"messages": []}}, "parameters.messages"),
        ({"prompt": "Hi", "stream": "yes"}, "stream"),
        ({"prompt": "Hi", "model_id": 5}, "model_id"),
        ({"prompt": "Hi", "model": "one", "model_id": {}}, "model_id"),
        ({"prompt": "Hi", "model": 0}, "model"),
    ],
)
async def test_inference_refuses(open_front, body, param):
    status, answer = await ask(open_front, "/inference", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert open_front.supervisor.fleet.running() == []


async def test_inference_by_an_unknown_model_or_for_another_key(front):
    key = await front.key("a", models=["two"])
    for model, expected in (("nobody", 404), ("one", 403)):
        status, _ = await ask(front, "/inference", {"prompt": "Hi", "model_id": model}, key)
        assert status == expected


async def test_models_at_a_glance(open_front):
    _, before = await ask(open_front, "/models")
    assert (before["available"], before["loaded"], before["current"]) == (["one", "two"], [], "one")
    await open_front.seen(model="two")
    _, after = await ask(open_front, "/models")
    assert (after["available"], after["loaded"], after["current"]) == (["one", "two"], ["two"], "two")
    _, openai = await ask(open_front, "/v1/models")
    assert set(openai) == {"object", "data"}
    assert [(one["id"], one.get("alias_of")) for one in openai["data"]] == [
        ("one", None),
        ("two", None),
        ("auto", "two"),
    ]
    assert openai["data"][-1]["status"]["value"] == "loaded"


async def test_models_at_a_glance_for_a_key(front):
    key = await front.key("a", models=["two"])
    _, listed = await ask(front, "/models", key=key)
    assert (listed["available"], listed["current"]) == (["two"], None)
    _, listed = await ask(front, "/v1/models", key=key)
    assert [one["id"] for one in listed["data"]] == ["two"]  # the default is not for this key


async def test_load_with_parameters(open_front):
    fleet = open_front.supervisor.fleet

    async def load(**parameters: Any) -> list[str]:
        body = {"model_id": "one"} | ({"parameters": parameters} if parameters else {})
        assert await ask(open_front, "/models/load", body) == (200, {"success": True})
        await open_front.seen()  # it waits for the child that is to come
        command: list[str] = fleet.children["one"].command
        return command

    command = await load(context_window=512, num_threads=1, gpu_layers=0, parallel=2)
    for flag, value in (("--ctx-size", "512"), ("--threads", "1"), ("--n-gpu-layers", "0"), ("--parallel", "2")):
        assert command[command.index(flag) + 1] == value
    pid = fleet.children["one"].pid
    await load()
    await load(num_threads=1, context_window=512, parallel=2, gpu_layers=0)
    assert fleet.children["one"].pid == pid  # as it runs already
    command = await load(n_ctx=1024)
    assert (command[command.index("--ctx-size") + 1], "--threads" in command) == ("1024", False)
    assert fleet.children["one"].pid != pid
    assert await ask(open_front, "/models/unload/uno", {}) == (200, {"success": True})
    await open_front.seen()
    assert "1024" not in fleet.children["one"].command


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_ctx": "512"}, "context_size: '512' is not a whole number"),
        ({"thread": 1}, "thread: unknown key; did you mean 'threads'?"),
        ([1], "'parameters' must be an object"),
    ],
)
async def test_load_refuses_parameters(open_front, parameters, message):
    status, answer = await ask(open_front, "/models/load", {"model_id": "one", "parameters": parameters})
    assert (status, answer["error"]["param"]) == (400, "parameters")
    assert message in answer["error"]["message"]
    assert open_front.supervisor.fleet.children == {}


async def test_unload_of_an_unknown_model(open_front):
    status, answer = await ask(open_front, "/models/unload/on", {})
    assert (status, answer["error"]["near"]) == (404, ["one"])


async def test_performance_loads_nothing(open_front):
    _, before = await ask(open_front, "/performance")
    assert before["system"]["memory_total_bytes"] > before["supervisor"]["rss_bytes"] > 0
    assert before["models"] == []
    await open_front.seen()
    used = open_front.supervisor.fleet.scheduler.entry("one").last_used
    _, after = await ask(open_front, "/performance")
    [model] = after["models"]
    assert (model["id"], model["state"], model["figures"]) == ("one", "ready", {})  # the fake child measures nothing
    assert open_front.supervisor.fleet.scheduler.entry("one").last_used == used


async def test_what_the_extension_may_do(open_front):
    on = {"integration_enabled": True, "enable_local_fallback": True, "context_awareness": True}
    _, told = await ask(open_front, "/karen/config?model=uno")
    assert told == on | {"model": "one", "atlas": False}
    assert (await ask(open_front, "/karen/config?model=nobody"))[0] == 404
    _, changed = await ask(open_front, "/karen/config", {"enable_local_fallback": False})
    assert changed == on | {"enable_local_fallback": False}
    _, told = await ask(open_front, "/karen/config")
    assert (told["enable_local_fallback"], told["model"]) == (False, "one")
    for wrong, message in (({"x": 1}, "karen.x: unknown key"), ({"context_awareness": 1}, "is not true or false")):
        status, answer = await ask(open_front, "/karen/config", wrong)
        assert status == 400
        assert message in answer["error"]["message"]
    assert (await ask(open_front, "/karen/config", {"integration_enabled": False}))[0] == 200
    assert (await ask(open_front, "/karen/config"))[1]["integration_enabled"] is False


async def test_who_may_change_what_the_extension_may_do(front):
    key = await front.key("a", models=["two"])
    assert (await ask(front, "/karen/config", key=key))[1]["model"] is None
    assert (await ask(front, "/karen/config", {}, key))[0] == 403
    assert (await ask(front, "/performance", key=key))[0] == 403
    assert (await ask(front, "/karen/config"))[0] == 401
