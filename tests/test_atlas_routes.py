"""The memory of models that do not run, through the supervisor alone: here no child can start."""

from __future__ import annotations

import asyncio
import fcntl
import sys
from pathlib import Path

import gguf_files
import pytest
from conftest import Running, Start
from memory_files import memory_file

from supervisor.atlas_folder import folder_name

GOOD = memory_file()


@pytest.fixture
def native_server(tmp_path: Path) -> Path:
    return tmp_path / "no-llama-server"


@pytest.fixture
async def running(start: Start, short_tmp: Path) -> Running:
    gguf_files.write(short_tmp / "models" / "work" / "tiny.gguf")
    running = await start(
        {"tiny": gguf_files.write(short_tmp / "tiny.gguf")},
        models={"default_model": "tiny", "overrides": {"work/tiny": {"atlas": {"enabled": "auto"}}}},
    )
    for model, names in {"tiny": ["book", "bad"], "work/tiny": ["book"]}.items():
        folder = short_tmp / "memory" / folder_name(model)
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.atlas").write_bytes(memory_file(name=name, saved=len(model)))
        (folder / "book_17.atlas.bak").write_bytes(GOOD)
    (short_tmp / "memory" / "tiny" / "bad.atlas").write_bytes(GOOD[:-1])
    return running


async def test_files_are_listed_without_a_child(running: Running) -> None:
    status, answer = await running.json("GET", "/v1/atlas/memory")
    bad, book = answer["files"]
    assert (status, bad["file"], bad["compatible"], book["file"]) == (200, "bad.atlas", False, "book.atlas")
    assert "corruption" in bad["reason"]
    assert (book["name"], book["n_tokens"], book["saved"], book["bytes"]) == ("book", 5, 4, len(GOOD))
    assert book["compatible"] is None and "not running" in book["reason"]
    _, answer = await running.json("GET", "/v1/atlas/memory?model=work/tiny")
    assert [(one["file"], one["saved"]) for one in answer["files"]] == [("book.atlas", 9)]
    _, about = await running.json("GET", "/v1/atlas/memory/info?file=book.atlas&model=WORK/tiny")
    assert about["backups"] == ["book_17.atlas.bak"]
    assert running.supervisor.fleet.children == {}


async def test_a_file_is_deleted_without_a_child(running: Running, short_tmp: Path) -> None:
    own = short_tmp / "memory" / "work%2Ftiny"
    with (own / ".book.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        status, answer = await running.json("DELETE", "/v1/atlas/memory?file=book&model=work/tiny")
        assert (status, answer["error"]["type"]) == (409, "atlas_memory_error")
    assert (await running.json("DELETE", "/v1/atlas/memory?file=book&model=work/tiny")) == (200, {"deleted": 2})
    assert list(own.iterdir()) == []
    assert (await running.json("DELETE", "/v1/atlas/memory", {"file": "book", "model": "tiny"}))[1] == {"deleted": 2}
    assert [path.name for path in (short_tmp / "memory" / "tiny").iterdir()] == ["bad.atlas"]


@pytest.mark.parametrize("name", ["", ".book", "../tiny/book", "a/b", "b%C3%BCch", "x" * 129, "book%00"])
async def test_wrong_names(running: Running, name: str) -> None:
    for method, path in [("GET", "/v1/atlas/memory/info"), ("DELETE", "/v1/atlas/memory")]:
        status, answer = await running.json(method, f"{path}?file={name}")
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "atlas_parameter_error", "file")


async def test_what_is_not_there(running: Running) -> None:
    for method, path in [("GET", "/v1/atlas/memory/info"), ("DELETE", "/v1/atlas/memory")]:
        status, answer = await running.json(method, f"{path}?file=none")
        assert (status, answer["error"]["type"]) == (404, "atlas_memory_error")
        status, answer = await running.json(method, f"{path}?file=book&model=tini")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = await running.json("DELETE", "/v1/atlas/memory", {"file": 7})
    assert (status, answer["error"]["param"]) == (400, "file")


async def test_looking_starts_no_model_and_changing_does(running: Running) -> None:
    for path in ("status", "config", "metrics", "metrics/stream"):
        status, answer = await running.json("GET", f"/v1/atlas/{path}")
        assert (status, answer["error"]["code"]) == (503, "model_not_loaded"), path
    for path in ("config", "memory/save", "memory/load"):
        status, answer = await running.json("POST", f"/v1/atlas/{path}", {})
        assert (status, answer["error"]["code"]) == (503, "model_start_failed"), path


async def test_models_tell_what_they_have_of_a_memory(running: Running) -> None:
    _, listed = await running.json("GET", "/v1/models")
    told = {model["id"]: model["atlas_support"] for model in listed["data"]}
    nothing = {"max_context": None, "window": None, "memory_cells": None}
    assert told["tiny"] == {"enabled": False, "reason": "atlas.enabled is off"} | nothing
    assert told["work/tiny"]["enabled"] is True
    assert told["work/tiny"]["max_context"] == 1 << 22
    _, one = await running.json("GET", "/v1/models/work/tiny")
    assert one["atlas_support"] == told["work/tiny"]


async def test_a_stream_of_metrics_does_not_keep_its_model(start: Start, short_tmp: Path) -> None:
    script = short_tmp / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_llama_server.py")} "$@"\n')
    script.chmod(0o755)
    path = gguf_files.write(short_tmp / "tiny.gguf")
    running = await start({"a": path, "b": path}, server={"llama_server": script}, models={"max_loaded_models": 1})
    assert (await running.json("GET", "/props?model=a"))[0] == 200
    async with running.http.get(running.url + "/v1/atlas/metrics/stream?model=a") as events:
        assert await events.content.readline() == b"data: 1\n"
        assert not running.supervisor.fleet.scheduler.entry("a").leases
        async with asyncio.timeout(30):
            assert (await running.json("GET", "/props?model=b"))[0] == 200
            rest = await events.content.read()
    assert b'data: {"error": {"message": "model \'a\' was stopped' in rest
