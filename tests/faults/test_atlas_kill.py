"""Sessions of a real supervisor process with no settings but `auto`: what is left after SIGKILL, and after SIGTERM."""

from __future__ import annotations

import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from common import Supervisor, Workspace, wait_for

TEXT = (Path(__file__).parents[1] / "data" / "text.txt").read_text()[:1500]


@pytest.fixture
def workspace(native_server: Path, smollm2: Path) -> Iterator[Workspace]:
    performance = {"context_size": 512, "parallel": 1, "threads": 1}
    made = Workspace({"a": smollm2}, native_server, {"atlas": {"enabled": "auto"}, "performance": performance})
    yield made
    made.remove()


def complete(running: Supervisor, prompt: str, **atlas: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    return running.call("POST", "/completion", body | {"atlas": {"memory_file": "book"} | atlas})


def test_a_session_after_sigkill_and_after_sigterm(workspace: Workspace) -> None:
    running = workspace.start()
    saved = complete(running, TEXT)["atlas"]["saved"]
    complete(running, " and", save_memory=False)
    running.stop(signal.SIGKILL)
    wait_for(lambda: not workspace.processes(), 60, lambda: "a process is left")

    folder = workspace.root / "home" / ".local" / "state" / "llama-supervisor" / "atlas" / "a"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    running = workspace.start()
    found = running.call("GET", "/v1/atlas/memory/info?file=book")
    assert found["n_tokens"] >= saved["n_tokens"] > 256
    answer = complete(running, " and", save_memory=False)
    assert answer["timings"]["prompt_n"] < 32
    assert running.stop(signal.SIGTERM) == 0
    assert "killing it" not in running.output()

    running = workspace.start()
    after = running.call("GET", "/v1/atlas/memory/info?file=book")
    assert after["n_tokens"] > found["n_tokens"]
    assert complete(running, " and")["timings"]["prompt_n"] < 32
    assert running.stop(signal.SIGTERM) == 0
