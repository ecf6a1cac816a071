"""Whatever comes in, the answer is a clear error with the right status, and everything else keeps serving."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture
async def running(start, smollm2):
    return await start({"small": smollm2}, api={"max_body_mb": 0.5})


async def post(running, path: str, data: bytes, **headers: str):
    async with running.http.post(running.url + path, data=data, headers=headers) as response:
        return response.status, await response.json(content_type=None)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"messages": [}',
        b"\xff\xfe\x00",
        b'{"model": "small", "messages": [], }',
        b"[" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=["cut", "broken", "binary", "trailing comma", "deep list", "deep object"],
)
async def test_malformed_json_is_a_400_and_loads_nothing(running, body):
    status, answer = await post(running, "/v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert await running.state("small") == "absent"


@pytest.mark.parametrize("model", [b"5", b'["small"]', b'{"id": "small"}', b"true"])
async def test_model_of_the_wrong_type(running, model):
    status, answer = await post(running, "/v1/chat/completions", b'{"model": ' + model + b"}")
    assert status == 400
    assert answer["error"]["param"] == "model"


async def test_a_body_over_the_limit_is_a_413(running):
    status, answer = await post(running, "/v1/completions", b'{"prompt": "' + b"x" * 600_000 + b'"}')
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "max_body_mb" in answer["error"]["message"]


async def test_a_compressed_body_may_not_explode(running):
    import gzip

    bomb = gzip.compress(b'{"prompt": "' + b"x" * 50_000_000 + b'"}')
    status, answer = await post(running, "/v1/completions", bomb, **{"Content-Encoding": "gzip"})
    assert status in (400, 413)
    assert "error" in answer


async def test_a_compressed_body_is_understood(running):
    import gzip

    body = gzip.compress(b'{"content": "Hello world"}')
    status, answer = await post(running, "/tokenize", body, **{"Content-Encoding": "gzip"})
    assert status == 200
    assert answer["tokens"]


async def test_unknown_paths_and_methods(running):
    status, answer = await running.json("GET", "/nowhere")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, answer = await running.json("DELETE", "/v1/chat/completions")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    assert await running.state("small") == "absent"


async def test_errors_on_anthropic_routes_have_its_shape(running):
    status, answer = await running.json("POST", "/v1/messages", {"model": "none", "messages": []})
    assert status == 404
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "not_found_error"


async def test_the_childs_own_errors_pass_untouched(running):
    status, answer = await running.json("POST", "/v1/chat/completions", {"messages": "not a list"})
    assert status == 400
    assert answer["error"]["code"] == 400  # llama-server's, not ours
    status, answer = await running.json("POST", "/v1/embeddings", {"input": "x"})
    assert status == 501


async def test_management_wants_a_model(running):
    for body in ({}, {"model": 5}, {"model": ""}):
        status, answer = await running.json("POST", "/models/load", body)
        assert (status, answer["error"]["param"]) == (400, "model")
    status, answer = await running.json("POST", "/models/load", {"model": "smll"})
    assert (status, answer["error"]["near"]) == (404, ["small"])
    status, answer = await running.json("POST", "/models/unload", {"model": "small", "force": "yes"})
    assert (status, answer["error"]["param"]) == (400, "force")
    status, answer = await post(running, "/models/load", b"[1]")
    assert status == 400


async def test_logs_check_their_parameters(running):
    status, answer = await running.json("GET", "/api/v1/models/none/logs")
    assert status == 404
    status, answer = await running.json("GET", "/api/v1/models/small/logs?lines=-1")
    assert (status, answer["error"]["param"]) == (400, "lines")


async def test_raw_garbage_on_the_port_hurts_nobody(running):
    host, port = running.url.removeprefix("http://").split(":")
    for garbage in (
        b"\x16\x03\x01\x02",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\0" * 9000,
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
    status, _ = await running.chat(max_tokens=1)
    assert status == 200


async def test_a_truncated_gguf_is_listed_as_invalid_and_refused(start, smollm2, short_tmp):
    (short_tmp / "models").mkdir()
    with smollm2.open("rb") as whole, (short_tmp / "models" / "cut.gguf").open("wb") as cut:
        cut.write(whole.read(10_000_000))
    (short_tmp / "models" / "junk.gguf").write_bytes(b"not a model")
    running = await start({"small": smollm2}, models={"settle_seconds": 0})
    _, listed = await running.json("GET", "/v1/models")
    status = {one["id"]: one["status"] for one in listed["data"]}
    assert status["cut"]["value"] == status["junk"]["value"] == "invalid"
    assert "truncated" in status["cut"]["error"]
    code, answer = await running.chat("cut")
    assert (code, answer["error"]["code"]) == (422, "model_invalid")
    code, answer = await running.json("POST", "/models/load", {"model": "junk"})
    assert code == 422
    code, _ = await running.chat(max_tokens=1)  # the default is the one that works
    assert code == 200


async def test_flags_that_llama_server_refuses_are_told_with_its_last_words(start, smollm2):
    running = await start({"small": smollm2}, models={"overrides": {"small": {"args": ["--no-such-flag"]}}})
    status, answer = await running.chat()
    assert (status, answer["error"]["code"]) == (503, "model_start_failed")
    assert "--no-such-flag" in answer["error"]["message"]
    async with running.http.post(running.url + "/v1/completions", json={"prompt": "x"}) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1  # it backs off


async def test_a_server_that_is_not_there(start, smollm2, short_tmp):
    running = await start({"small": smollm2}, server={"llama_server": short_tmp / "missing"})
    status, answer = await running.chat()
    assert status == 503
    assert "cannot be started" in answer["error"]["message"]
