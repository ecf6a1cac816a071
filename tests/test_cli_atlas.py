"""`atlas eval` over a scripted evaluation program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf_files
import pytest

from supervisor.cli_atlas_eval import drawing, gap_recovered, smooth

Run = subprocess.CompletedProcess[str]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tool = tmp_path / "eval"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_atlas_eval.py")} "$@"\n')
    tool.chmod(0o755)
    for name in ("m.gguf", "a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    return {**os.environ, "LLAMA_SUPERVISOR_ATLAS_EVAL": str(tool), "FAKE_EVAL_PID": str(tmp_path / "pid")}


def command(tmp_path: Path, *more: str) -> list[str]:
    words = ["atlas", "eval", "--model", str(tmp_path / "m.gguf"), "--text", str(tmp_path / "a.txt"), *more]
    return [sys.executable, "-m", "supervisor", *words]


def evaluate(environment: dict[str, str], tmp_path: Path, *more: str, fault: str = "") -> Run:
    return subprocess.run(
        command(tmp_path, *more),
        env={**environment, "FAKE_EVAL": fault},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_table(environment: dict[str, str], tmp_path: Path) -> None:
    done = evaluate(environment, tmp_path, "--text", str(tmp_path / "b.txt"))
    assert done.returncode == 0, done.stderr
    assert "2.4000" in done.stdout and "75 %" in done.stdout and "sum of texts" in done.stdout


def test_json_and_the_flags(environment: dict[str, str], tmp_path: Path) -> None:
    more = ["--copy", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--cache-type", "q8_0", "--memory-cells", "128"]
    done = evaluate(environment, tmp_path, "--json", *more)
    document = json.loads(done.stdout)
    args = " ".join(document["config"]["args"])
    assert "-ctk q8_0 -ctv q8_0" in args and "--atlas-cells 128" in args and "-c 512 -n 2048" in args
    assert document["summary"][0]["gap_recovered"] == pytest.approx(0.75)
    assert len(document["results"]) == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [("error", "cannot shift its cache"), ("crash", "assertion failed"), ("garbage", "no JSON")],
)
def test_faults(environment: dict[str, str], tmp_path: Path, fault: str, message: str) -> None:
    done = evaluate(environment, tmp_path, "--json", fault=fault)
    assert done.returncode == 1
    assert message in json.loads(done.stdout)["error"]["message"]


def test_a_model_by_its_id(environment: dict[str, str], tmp_path: Path) -> None:
    models = tmp_path / "models"
    for path in ("tiny.gguf", "work/tiny.gguf"):
        gguf_files.write(models / path)
    environment["LLAMA_SUPERVISOR_MODELS__DIRECTORY"] = str(models)
    environment["LLAMA_SUPERVISOR_MODELS__OVERRIDES"] = '{"tiny": {"aliases": ["small"]}}'
    for id, path in {"tiny": "tiny.gguf", "work/tiny": "work/tiny.gguf", "SMALL": "tiny.gguf"}.items():
        document = json.loads(evaluate(environment, tmp_path, "--json", "--model", id).stdout)
        args = document["config"]["args"]
        assert args[args.index("-m") + 1] == str(models / path)
    done = evaluate(environment, tmp_path, "--json", "--model", "work")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4, "model_not_found")
    (models / "broken.gguf").write_text("no model")
    done = evaluate(environment, tmp_path, "--json", "--model", "broken")
    assert (done.returncode, "not a GGUF file" in done.stdout) == (1, True)


def test_wrong_mode_and_nothing_to_read(environment: dict[str, str], tmp_path: Path) -> None:
    assert evaluate(environment, tmp_path, "--modes", "fast").returncode == 2


def test_ctrl_c_ends_the_child(environment: dict[str, str], tmp_path: Path) -> None:
    running = subprocess.Popen(command(tmp_path), env={**environment, "FAKE_EVAL": "hang"}, stderr=subprocess.PIPE)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=20)
    assert running.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_ctrl_c_within_the_code_of_a_string(environment: dict[str, str], tmp_path: Path) -> None:
    """Libraries make their dataclasses so; the exit code must not depend on where the signal comes."""
    interrupting = 'import subprocess\nsubprocess.Popen = lambda *_, **__: exec("raise KeyboardInterrupt")\n'
    (tmp_path / "sitecustomize.py").write_text(interrupting)
    assert evaluate({**environment, "PYTHONPATH": str(tmp_path)}, tmp_path).returncode == 130


def test_gap_needs_a_gap() -> None:
    assert gap_recovered({"full": 2.0, "window": 2.0, "atlas": 1.9}) is None
    assert gap_recovered({"full": 2.0, "window": 3.0}) is None


def test_drawing() -> None:
    lines = drawing("t", [{"mode": "full", "by_position": [[0, 3.0], [64, 2.0]]}])
    assert "f = full" in lines[0] and len(lines) == 15
    assert smooth([[0, 1.0], [64, 3.0]]) == [(0, 2.0), (64, 2.0)]
