"""The real llama-atlas-eval on a short text: all modes answer, and memory beats a random one on a copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "passage.txt").write_text((ROOT / "README.md").read_text())
    (tmp_path / "filler.txt").write_text((ROOT / "docs" / "design.md").read_text() + (ROOT / "LICENSE").read_text())
    copy = ["--copy", str(tmp_path / "passage.txt"), str(tmp_path / "filler.txt")]
    words = ["atlas", "eval", "-m", str(smollm2), *copy, "--tokens", "1024", "--cells", "256", "--json"]
    done = subprocess.run([sys.executable, "-m", "supervisor", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    nll = json.loads(done.stdout)["summary"][0]["nll"]
    assert set(nll) == {"full", "window", "atlas", "shuffled"}
    assert nll["atlas"] < nll["window"]
    assert nll["atlas"] < nll["shuffled"]
