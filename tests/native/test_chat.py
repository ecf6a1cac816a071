"""A real model answers through the proxy, with every kind of request."""

from __future__ import annotations

import asyncio
import json

import aiohttp

GREEDY = {"temperature": 0, "ignore_eos": True}


async def test_first_request_starts_the_model_and_answers(start, smollm2):
    running = await start({"small": smollm2})
    assert await running.state("small") == "absent"
    status, answer = await running.chat()
    assert status == 200
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    assert await running.state("small") == "ready"


async def test_stream_comes_in_pieces_and_ends_with_done(start, smollm2):
    running = await start({"small": smollm2})
    body = {"messages": [{"role": "user", "content": "Count to ten."}], "stream": True, "max_tokens": 12} | GREEDY
    events = []
    async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
    assert events[-1] == b"[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert len([delta for delta in deltas if delta.get("content")]) > 3


async def test_the_other_openai_routes_and_native_ones(start, smollm2):
    running = await start({"small": smollm2})
    status, answer = await running.json("POST", "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4})
    assert (status, answer["object"]) == (200, "text_completion")
    status, answer = await running.json("POST", "/v1/responses", {"input": "Hello", "max_output_tokens": 8})
    assert (status, answer["object"]) == (200, "response")
    message = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    status, answer = await running.json("POST", "/v1/messages", message)
    assert (status, answer["type"]) == (200, "message")
    status, tokens = await running.json("POST", "/tokenize", {"content": "Hello world"})
    assert status == 200
    status, text = await running.json("POST", "/detokenize", tokens)
    assert (status, text["content"]) == (200, "Hello world")
    status, answer = await running.json("POST", "/completion", {"prompt": "2 + 2 =", "n_predict": 2} | GREEDY)
    assert status == 200
    assert answer["tokens_predicted"] == 2
    status, props = await running.json("GET", "/props")
    assert (status, props["model_alias"]) == (200, "small")
    async with running.http.get(running.url + "/metrics?model=small") as response:
        assert response.status == 200
        assert "\nllamacpp:prompt_tokens_total " in await response.text()
    status, slots = await running.json("GET", "/slots")
    assert status == 200
    assert len(slots) == 4


async def test_embeddings_from_a_model_with_its_own_flags(start, smollm2):
    override = {"small": {"args": ["--embedding", "--pooling", "mean"], "aliases": ["embedder"]}}
    running = await start({"small": smollm2}, models={"overrides": override})
    status, answer = await running.json("POST", "/v1/embeddings", {"model": "embedder", "input": ["one", "two"]})
    assert status == 200
    assert [len(one["embedding"]) for one in answer["data"]] == [576, 576]


async def test_which_model_answers(start, smollm2, gemma3):
    overrides = {"small": {"aliases": ["tiny"]}}
    running = await start({"small": smollm2, "gem": gemma3}, models={"default_model": "small", "overrides": overrides})
    for name in (None, "auto", "small", "tiny", "SMALL"):
        status, _ = await running.chat(name, max_tokens=1)
        assert (status, await running.state("small")) == (200, "ready")
    assert await running.state("gem") == "absent"
    status, answer = await running.json("POST", "/tokenize?model=gem", {"content": "Hello"})
    assert status == 200
    assert await running.state("gem") == "ready"
    status, answer = await running.chat("smal")
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert answer["error"]["near"] == ["small"]


async def test_unknown_names_can_go_to_the_default_model(start, smollm2):
    running = await start({"small": smollm2}, models={"unknown_model": "default"})
    status, _ = await running.chat("gpt-4o", max_tokens=1)
    assert status == 200


async def test_lists_of_models(start, smollm2):
    running = await start({"small": smollm2})
    for path in ("/v1/models", "/models"):
        status, listed = await running.json("GET", path)
        assert (status, listed["object"]) == (200, "list")
        model, *auto = listed["data"]
        assert [one["id"] for one in auto] == (["auto"] if path == "/v1/models" else [])
        assert model["id"] == "small"
        assert model["status"]["value"] == "unloaded"
        assert model["context_length"] == 8192
        assert model["size"] == smollm2.stat().st_size
    status, one = await running.json("GET", "/v1/models/small")
    assert (status, one["architecture_name"]) == (200, "llama")
    status, answer = await running.json("GET", "/v1/models/none")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")


async def test_the_built_server_says_which_patches_it_carries(start, smollm2):
    running = await start({"small": smollm2})
    await running.chat(max_tokens=1)
    _, props = await running.json("GET", "/props")
    assert props["patch_series"] == running.supervisor.fleet.patches


async def test_observing_does_not_load(start, smollm2):
    running = await start({"small": smollm2})
    for path in ("/metrics?model=small", "/slots", "/props?autoload=false"):
        status, answer = await running.json("GET", path)
        assert (status, answer["error"]["code"]) == (503, "model_not_loaded"), path
    for origin, allowed in (
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://evil.example", None),
        ("http://[", None),
    ):
        async with running.http.options(running.url + "/v1/completions", headers={"Origin": origin}) as response:
            assert response.status == 200
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
    assert await running.state("small") == "absent"


async def test_sixteen_at_once_while_the_model_loads(start, smollm2):
    running = await start({"small": smollm2})
    answers = await asyncio.gather(*(running.chat(max_tokens=2) for _ in range(16)))
    assert {status for status, _ in answers} == {200}
    assert all(answer["usage"]["completion_tokens"] == 2 for _, answer in answers)


async def test_a_client_that_leaves_cancels_its_generation(start, smollm2):
    running = await start({"small": smollm2})
    await running.chat(max_tokens=1)
    body = {"messages": [{"role": "user", "content": "Tell a long story."}], "stream": True, "ignore_eos": True}
    async with aiohttp.ClientSession() as session:
        response = await session.post(running.url + "/v1/chat/completions", json=body | {"max_tokens": 100000})
        await response.content.readline()
        response.close()
    async with asyncio.timeout(30):
        while any(slot["is_processing"] for slot in (await running.json("GET", "/slots"))[1]):
            await asyncio.sleep(0.05)
        while running.supervisor.fleet.scheduler.entry("small").leases:
            await asyncio.sleep(0.05)
