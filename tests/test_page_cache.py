"""The files of a model that waits for room are read before it starts, once, and only where they fit."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from supervisor import page_cache
from supervisor.models.model_files import Model
from supervisor.page_cache import ReadAhead, will_need

sys.path.append(str(Path(__file__).parent / "native"))
from test_life import begin_stream


@pytest.fixture
def asked(monkeypatch) -> list[Path]:
    seen: list[Path] = []
    monkeypatch.setattr(page_cache, "will_need", seen.append)
    return seen


def model(folder: Path, **more) -> Model:
    files = (folder / "m-00001-of-00002.gguf", folder / "m-00002-of-00002.gguf")
    facts = {"mmproj": None, "size": 20, "mtime": 0.0, "header": None, "error": None}
    return Model("m", files[0], files, **facts | more)


async def test_all_files_and_not_again(asked, tmp_path):
    ahead, found = ReadAhead(), model(tmp_path, mmproj=tmp_path / "mmproj.gguf")
    await ahead.model(found)
    await ahead.model(found)
    assert asked == [*found.files, found.mmproj]


async def test_not_what_would_push_out_others(asked, tmp_path):
    await ReadAhead().model(model(tmp_path, size=psutil.virtual_memory().total + 1))
    assert asked == []


async def test_a_file_that_is_gone_does_no_harm(tmp_path):
    with pytest.raises(FileNotFoundError):
        will_need(tmp_path / "gone")
    await ReadAhead().model(model(tmp_path))


def test_the_system_is_asked_for_the_whole_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: calls.append(given[1:]), raising=False)  # not on macOS
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    (tmp_path / "a").write_bytes(b"x")
    will_need(tmp_path / "a")
    assert calls == [(0, 0, os.POSIX_FADV_WILLNEED)]


async def test_while_another_model_is_busy(start, smollm2, gemma3, asked):
    running = await start({"a": smollm2, "b": gemma3}, models={"max_loaded_models": 1})
    answer = await begin_stream(running, model="a")
    waiting = asyncio.create_task(running.chat("b", max_tokens=1))
    async with asyncio.timeout(5):
        while not asked:
            await asyncio.sleep(0.01)
    assert asked == [running.supervisor.catalog.models["b"].path]
    assert await running.state("a") == "ready"
    answer.close()
    assert (await waiting)[0] == 200
    assert asked == [running.supervisor.catalog.models["b"].path]
