"""Fixtures: the real llama-server, two real models, and supervisors over them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from supervisor.app import Supervisor, supervisor
from supervisor.config import Config
from supervisor.settings import Settings
from supervisor.setup import native
from supervisor.setup.embedded import MODELS

TEST_MODELS = "LLAMA_SUPERVISOR_TEST_MODELS"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands it down ignored


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: the supervisors of tests would ignore it as well
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def native_server() -> Path:
    """The patched llama-server. Its absence is a failure, never a skip."""
    binary = native.find_server()
    assert binary is not None, "no llama-server: scripts/test builds it, or run `llama-supervisor build`"
    return binary


def _model(name: str) -> Path:
    folder = os.environ.get(TEST_MODELS)
    assert folder, f"{TEST_MODELS} is not set: scripts/test gets the models and sets it"
    path = Path(folder) / MODELS[name].file
    assert path.is_file(), f"{path} is missing: `llama-supervisor pull {name} --models {folder}` gets it"
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, 8K context, architecture llama."""
    return _model("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, architecture gemma3 with sliding-window layers."""
    return _model("gemma3-270m")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder with a path short enough for Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ls"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Running:
    """A supervisor in this process, and a client for it."""

    url: str
    supervisor: Supervisor
    http: aiohttp.ClientSession
    models: Path
    runtime: Path

    async def json(self, method: str, path: str, body: Any = None, **kwargs: Any) -> tuple[int, Any]:
        """Make a request; return the status and the JSON answer."""
        async with self.http.request(method, self.url + path, json=body, **kwargs) as response:
            return response.status, await response.json(content_type=None)

    async def chat(self, model: str | None = None, max_tokens: int = 8, **more: Any) -> tuple[int, Any]:
        """Ask a chat question at temperature 0."""
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": max_tokens, "temperature": 0}
        return await self.json("POST", "/v1/chat/completions", body | ({"model": model} if model else {}) | more)

    async def state(self, model: str) -> str:
        """Return the state of a model's child."""
        _, status = await self.json("GET", "/api/v1/status")
        return next((one["state"] for one in status["models"] if one["id"] == model), "absent")


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(short_tmp: Path, native_server: Path) -> AsyncIterator[Start]:
    """Return a function that starts a supervisor: `await start({"a": path}, models={...}, server={...})`."""
    async with AsyncExitStack() as stack:

        async def begin(files: dict[str, Path], **sections: dict[str, Any]) -> Running:
            models = short_tmp / "models"
            models.mkdir(exist_ok=True)
            for name, path in files.items():
                (models / f"{name}.gguf").symlink_to(path)
            config: dict[str, dict[str, Any]] = {
                "server": {"port": 0, "llama_server": native_server, "runtime_dir": short_tmp / "run"},
                "models": {"directory": models, "settle_seconds": 0.2, "slot_cache_directory": short_tmp / "slots"},
                "performance": {"context_size": 2048, "threads": 1},
                "atlas": {"memory_directory": short_tmp / "memory"},
                "api": {"require_keys": False},  # there may be a file of keys at the default place
                "logging": {"directory": short_tmp / "logs"},
            }
            for section, values in sections.items():
                config[section] = config.get(section, {}) | values
            settings = Settings(Config.model_validate(config), None, short_tmp, {})
            running = await stack.enter_async_context(supervisor(settings))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            return Running(running.urls[0], running, http, models, short_tmp / "run")

        yield begin
