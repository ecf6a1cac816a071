"""Sessions of the long-context memory from the clients that people use: read once, then ask without the text."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from test_clients import HERE, node, run

TEXT = (HERE.parent / "data" / "text.txt").read_text()[:2200]
QUESTION = "In short, what does the above say?"
MESSAGES = [{"role": "user", "content": QUESTION}]
GREEDY = {"model": "small", "temperature": 0}
WRONG = {"status": 400, "type": "atlas_parameter_error", "param": "atlas.memory_file"}


def body(name: str) -> dict[str, object]:
    return {"ignore_eos": True, "atlas": {"memory_file": name}}


@pytest.fixture
async def running(start, smollm2):
    performance = {"context_size": 512, "parallel": 1, "threads": 1}
    return await start({"small": smollm2}, atlas={"enabled": "auto"}, performance=performance)


async def test_openai_python(running):
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        read = await client.completions.create(prompt=TEXT, max_tokens=1, **GREEDY, extra_body=body("py"))
        assert read.usage.prompt_tokens > 512
        asked = await client.chat.completions.create(messages=MESSAGES, max_tokens=8, **GREEDY, extra_body=body("py"))
        assert asked.usage.prompt_tokens > read.usage.prompt_tokens
        assert asked.model_extra["atlas"]["memory_file"] == "py"
        assert asked.model_extra["atlas"]["saved"]["n_tokens"] >= asked.usage.prompt_tokens
        without = await client.chat.completions.create(messages=MESSAGES, max_tokens=8, **GREEDY)
        assert without.usage.prompt_tokens < 64
        stream = await client.chat.completions.create(
            messages=MESSAGES, max_tokens=8, stream=True, **GREEDY, extra_body=body("py")
        )
        told = [chunk.model_extra["atlas"] async for chunk in stream if "atlas" in chunk.model_extra]
        assert [one["memory_file"] for one in told] == ["py"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(messages=MESSAGES, **GREEDY, extra_body=body("../py"))
        assert {"status": caught.value.status_code, "type": caught.value.type, "param": caught.value.param} == WRONG


async def test_langchain(running):
    async with openai.DefaultAsyncHttpxClient() as http:
        options = {"base_url": running.url + "/v1", "api_key": "none", "max_retries": 0, "http_async_client": http}
        await OpenAI(max_tokens=1, extra_body=body("chain"), **GREEDY, **options).ainvoke(TEXT)
        chat = ChatOpenAI(max_tokens=8, extra_body=body("chain"), **GREEDY, **options)
        answer = await chat.ainvoke([HumanMessage(QUESTION)])
        assert answer.content
        assert answer.usage_metadata["input_tokens"] > 512
        pieces = [piece async for piece in chat.astream([HumanMessage("And what else?")])]
        assert "".join(str(piece.content) for piece in pieces)
    _, listed = await running.json("GET", "/v1/atlas/memory")
    assert [one["name"] for one in listed["files"]] == ["chain"]


async def test_openai_node(running, short_tmp):
    told = json.loads(await node(short_tmp, "atlas.mjs", BASE_URL=running.url + "/v1", TEXT=TEXT))
    assert told["tokens"][1] > told["tokens"][0] > 512
    assert told["read"]["memory_file"] == told["asked"]["memory_file"] == told["streamed"]["memory_file"] == "node"
    assert told["refused"] == WRONG


async def test_curl(running, short_tmp: Path):
    async def curl(route: str, **more: object) -> str:
        request = json.dumps({**GREEDY, **body("curl"), **more})
        return await run("curl", "-sN", running.url + route, "-d", request, cwd=short_tmp)

    read = json.loads(await curl("/v1/completions", prompt=TEXT, max_tokens=1))
    asked = json.loads(await curl("/v1/chat/completions", messages=MESSAGES, max_tokens=8))
    assert asked["usage"]["prompt_tokens"] > read["usage"]["prompt_tokens"] > 512
    events = await curl("/v1/chat/completions", messages=MESSAGES, max_tokens=8, stream=True)
    assert '"memory_file":"curl"' in events and events.rstrip().endswith("data: [DONE]")
    status = json.loads(await run("curl", "-s", running.url + "/v1/atlas/status?model=small", cwd=short_tmp))
    assert [slot["memory_file"] for slot in status["slots"]] == ["curl"]
    removed = await run("curl", "-sX", "DELETE", running.url + "/v1/atlas/memory?file=curl", cwd=short_tmp)
    assert json.loads(removed)["deleted"] >= 1
