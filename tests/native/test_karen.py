"""KAREN before a real supervisor and a real model: its hooks, its conversations, and its OpenAI-compatible client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from karen_host import EXTENSION, Host

Json = dict[str, Any]
NAME = "llama-supervisor"
GREEDY = {"temperature": 0, "max_tokens": 12, "budget_seconds": 120}


@pytest.fixture
async def karen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Awaitable[Host]]]:
    """Return a function that starts KAREN, with the extension linked into it."""
    monkeypatch.delenv("LLAMACPP_KAREN_API_KEY", raising=False)
    (tmp_path / "llama_supervisor").symlink_to(EXTENSION, target_is_directory=True)
    hosts = []

    async def begin(generation: str, **options: Any) -> Host:
        host = Host(tmp_path, generation, GREEDY | options, timeout=240)
        await host.start()
        hosts.append(host)
        return host

    yield begin
    for host in hosts:
        await host.stop()


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_each_policy_and_combination(start, smollm2, karen, generation):
    running = await start({"small": smollm2})
    host = await karen(generation, url=running.url)
    remote = "The remote says so."

    async def turn(answer: Any, **options: Any) -> Json:
        data: Json = {"prompt": "Say hello.", "local_options": options}
        result = (await host.chat(data, answer))[NAME]
        return data | {"used": result["local_inference_used"]}

    assert (await turn(None, policy="off")).get("result") is None
    assert (await turn(remote))["result"] == remote
    assert await running.state("small") == "absent"  # nothing was asked so far
    for _ in range(2):  # from the second on the prompt is cached
        local = (await turn({"error": "timeout"}))["result"]["content"]
    assert len(local.split()) > 1
    for policy in ("fallback", "prefer_local", "hybrid"):
        assert (await turn("", policy=policy))["result"] == local
        for combination in ("remote_first", "local_first", "merge"):
            told = await turn(remote, policy=policy, combination=combination)
            both = {"remote_first": remote, "local_first": local, "merge": f"{remote}\n\n{local}"}
            assert told["result"] == (remote if policy == "fallback" else both[combination])
    told = await turn("", policy="hybrid")
    assert (told["metadata"]["local_model"], told["local_inference"]["usage"]["completion_tokens"]) == ("small", 12)
    assert local in told["prompt"]
    assert (await turn("", model="none"))["used"] is False  # a 404


async def test_fifty_conversations_at_once(start, smollm2, karen):
    running = await start({"small": smollm2})
    host = await karen("B", url=running.url, max_tokens=4)
    datas: list[Json] = [{"message": f"Count from {n}.", "session_id": n} for n in range(50)]
    await asyncio.gather(*(host.chat(data, "") for data in datas))
    assert all(data["metadata"]["local_inference_used"] for data in datas)
    assert all(data["result"].strip() for data in datas)


async def test_a_conversation_outlives_a_restart_of_everything(start, smollm2, karen, short_tmp):
    sections = {"atlas": {"enabled": "auto"}, "performance": {"context_size": 1024, "parallel": 1, "threads": 1}}
    running = await start({"small": smollm2}, **sections)
    host = await karen("A", url=running.url)
    user = {"user_id": "ada"}
    first: Json = {"prompt": "The secret word is heliotrope. " * 20, "conversation_id": "c1"}
    name = (await host.chat(first, "", user))[NAME]["local_inference"]["memory_file"]
    assert [path.stem for path in (short_tmp / "memory" / "small").glob("*.atlas")] == [name]
    await running.supervisor.shutdown()

    running = await start({}, **sections)
    host = await karen("B", url=running.url)
    again: Json = {"prompt": "What is the secret word?", "conversation_id": "c1", "use_local": True}
    await host.run("pre_llm_prompt", again, user)
    assert again["local_inference"]["memory_file"] == name
    _, status = await running.json("GET", "/v1/atlas/status?model=small")
    assert status["slots"][0]["tokens_seen"] > 150  # more than this turn: what was said before the restart

    other: Json = {"prompt": "What is the secret word?", "conversation_id": "c1", "use_local": True}
    await host.run("pre_llm_prompt", other, {"user_id": "bob"})
    assert other["local_inference"]["memory_file"] != name


async def test_a_supervisor_that_goes_and_comes_back(start, smollm2, karen):
    running = await start({"small": smollm2})
    host = await karen("A", url=running.url)
    port = int(running.url.rpartition(":")[2])
    await running.supervisor.shutdown()
    data: Json = {"prompt": "Say hello.", "result": ""}
    host.loaded[0]._watch._due = 0.0
    assert (await host.chat(data))[NAME]["available"] is False
    assert data == {"prompt": "Say hello.", "result": ""}
    await start({}, server={"port": port})
    host.loaded[0]._watch._due = 0.0  # its back-off is over
    await host.chat(data)
    assert data["metadata"]["local_inference_used"] is True


async def test_the_answer_comes_within_its_budget(start, smollm2, karen):
    running = await start({"small": smollm2})
    await running.chat()  # it is loaded
    host = await karen("A", url=running.url, max_tokens=100_000, budget_seconds=3)
    data: Json = {"prompt": "Tell a very long story."}
    await host.chat(data, "")
    assert (data["metadata"]["local_truncated"], bool(data["result"].strip())) == (True, True)
    async with asyncio.timeout(60):  # the model does not go on for nobody
        while any(slot["is_processing"] for slot in (await running.json("GET", "/slots"))[1]):
            await asyncio.sleep(0.05)


async def test_inference_and_performance(start, smollm2, monkeypatch):
    monkeypatch.setattr("supervisor.routes.karen.METRICS_SECONDS", 60)  # a child on a busy machine takes its time
    running = await start({"small": smollm2})
    body: Json = {"prompt": "Say hello.", "parameters": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}}
    body["parameters"]["cache_prompt"] = False  # so that both are the same
    status, whole = await running.json("POST", "/inference", body)
    assert (status, whole["usage"]["completion_tokens"], whole["model"]) == (200, 8, "small")
    assert whole["timing"]["tokens_per_second"] > 0
    async with running.http.post(running.url + "/inference", json=body | {"stream": True}) as response:
        lines = [line[6:] async for line in response.content if line.startswith(b"data: ")]
    *pieces, ending = [json.loads(line) for line in lines[:-1]]
    assert lines[-1].strip() == b"[DONE]"
    assert "".join(piece["response"] for piece in pieces) == whole["response"]
    assert (ending["done"], ending["usage"]) == (True, whole["usage"])
    _, told = await running.json("GET", "/performance")
    assert told["models"][0]["figures"]["generated_tokens"] == 16
    status, answer = await running.json("POST", "/inference", body | {"parameters": {"temperature": "hot"}})
    assert (status, "error" in answer) == (400, True)


async def test_as_its_openai_compatible_provider(start, smollm2):
    """What KAREN does: both without a key and 200, the name is listed; then chats, with and without a stream."""
    running = await start({"small": smollm2})
    assert (await running.json("GET", "/health"))[0] == 200
    _, listed = await running.json("GET", "/v1/models")
    assert "auto" in [one["id"] for one in listed["data"]]
    ask: Json = {"model": "auto", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(**ask)
        usage = answer.usage
        assert usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        stream = await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
    body = ask | {"stream": True}
    async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
        assert (await response.text()).rstrip().endswith("data: [DONE]")
