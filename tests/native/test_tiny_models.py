"""The tiny models load in the real llama-server, and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Start
from tiny_models import NAMES, make


@pytest.mark.parametrize("name", NAMES)
async def test_answers(start: Start, tmp_path: Path, name: str) -> None:
    running = await start({name: make(tmp_path / f"{name}.gguf", name)})
    status, answer = await running.json(
        "POST", "/completion", {"model": name, "prompt": "Hello", "n_predict": 4, "temperature": 0}
    )
    assert status == 200, answer
