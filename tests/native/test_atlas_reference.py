"""The engine against the memory in plain NumPy: the same tokens, the same NLL."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import atlas_reference
import pytest

from supervisor.setup import native

TEXT = Path(__file__).parents[1] / "data" / "text.txt"
TOKENS, FIRST, CONTEXT, CELLS = 640, 448, 256, 128
REPORTED = 64
"""Tokens whose mean NLL the tool reports."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("refresh", "modes"), [(1, ("full", "window", "atlas")), (4, ("window", "atlas"))])
async def test_engine_and_plain_memory_agree(start, native_server, smollm2, tmp_path, refresh, modes):
    running = await start({"small": smollm2})
    body = {"model": "small", "content": TEXT.read_text()[: TOKENS * 8], "add_special": True}
    status, answer = await running.json("POST", "/tokenize", body)
    assert status == 200
    tokens = answer["tokens"][:TOKENS]
    assert len(tokens) == TOKENS

    path = tmp_path / "f32.gguf"
    atlas_reference.write_f32(smollm2, path)
    command = [native_server.with_name(native.EVAL), "-m", path, "--text", TEXT, "-c", CONTEXT, "-n", TOKENS]
    command += ["--skip", FIRST, "--atlas-cells", CELLS, "--modes", ",".join(modes), "--atlas-refresh", refresh]
    command += ["-ctk", "f32", "-ctv", "f32", "--atlas-type-k", "f32", "--atlas-type-v", "f32"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine = {one["mode"]: one for one in map(json.loads, done.stdout.splitlines()) if one["event"] == "result"}

    model = atlas_reference.Model(path)
    means = {}
    for mode in modes:
        context, cells = {"full": (TOKENS, 0), "window": (CONTEXT, 0), "atlas": (CONTEXT, CELLS)}[mode]
        plain = model.losses(tokens, context, cells, FIRST, refresh)
        parts = [plain[i : i + REPORTED].mean() for i in range(0, len(plain), REPORTED)]
        means[mode] = plain.mean()
        assert engine[mode]["nll"] == pytest.approx(means[mode], abs=0.004)
        reported = [nll for position, nll in engine[mode]["by_position"] if position >= FIRST]
        assert reported == pytest.approx(parts, abs=0.008)
    assert means["atlas"] < means["window"] - 0.1
