"""A child that answers /health and does not decode any more is ended as hung: shown on a fake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf_files
import pytest

from supervisor import watchdog

FAKE = Path(__file__).parents[1] / "fake_stuck_server.py"


@pytest.fixture
async def running(start, short_tmp, monkeypatch):
    """A supervisor over it that is less patient."""
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "SUSPECT_SECONDS", 0.4)
    monkeypatch.setattr(watchdog, "STUCK_SECONDS", 1.0)
    binary = short_tmp / "stuck"
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    binary.chmod(0o755)
    model = short_tmp / "m.gguf"
    model.write_bytes(gguf_files.gguf(gguf_files.llama()))
    return await start({"a": model}, server={"llama_server": binary})


async def test_its_stream_ends_with_an_error_event(running):
    body = {"model": "a", "messages": [], "stream": True}
    async with running.http.post(running.url + "/v1/chat/completions", json=body) as response:
        lines = (await response.read()).strip().splitlines()
    assert lines[0] == b"data: 1"
    error = json.loads(lines[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_hung"
    assert "no progress with the requests in flight for " in error["message"]


async def test_what_has_no_answer_is_a_504(running):
    status, body = await running.json("POST", "/lora-adapters?model=a", [])
    assert (status, body["error"]["code"]) == (504, "upstream_hung")
    assert running.supervisor.fleet.scheduler.entry("a").restarts == 1
