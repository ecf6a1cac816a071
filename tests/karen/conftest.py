"""Fixtures: the extension in each of KAREN's hosts, before a scripted supervisor."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from karen_host import EXTENSION, Host

from karen.scripted import Scripted


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set on this machine is not the tests' business."""
    for name in [name for name in os.environ if name.startswith("LLAMACPP_KAREN_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def extensions(tmp_path: Path) -> Path:
    """KAREN's folder of extensions, with ours copied into it."""
    folder = tmp_path / "src" / "extensions"
    shutil.copytree(EXTENSION, folder / "llama_supervisor", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    supervisor = Scripted()
    await supervisor.start()
    yield supervisor
    await supervisor.stop()


@pytest.fixture
def generation() -> str:
    """Which of KAREN's hosts; a module that tests what differs between them has its own."""
    return "A"


HostOf = Callable[..., Awaitable[Host]]


@pytest.fixture
async def host_of(extensions: Path, generation: str) -> AsyncIterator[HostOf]:
    """Return a function that starts KAREN with these options of the extension."""
    hosts = []

    async def begin(**options: Any) -> Host:
        host = Host(extensions, generation, options)
        hosts.append(host)
        await host.start()
        return host

    yield begin
    for host in hosts:
        await host.stop()
