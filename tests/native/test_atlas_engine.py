"""The memory's engine, measured by llama-atlas-eval on short texts: its worth, and that settings do not change it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from supervisor.setup import native

ROOT = Path(__file__).parents[2]

LONG = "--text TEXT -c 256 -n 640 --atlas-chunk 16"
SHORT = "--text TEXT -c 256 -n 512 --atlas-chunk 16"
SAME = "--text TEXT -c 256 -n 380 --skip 260 --atlas-chunk 1 --modes atlas"
OFTEN = "--text TEXT -c 256 -n 480 --skip 260 --atlas-chunk 1 --modes atlas"
THREADS = "--text TEXT -c 256 --atlas-cells 64 --atlas-window 64 -n 200 --skip 140 --atlas-chunk 16 --modes atlas"
FAR = "--text TWICE -c 256 -n 9600 --skip 9500 --atlas-chunk 16"
BEYOND = "--text TEXT:9000 --text TEXT:20000 --atlas-cells 176 --atlas-window 76 -n 289 --skip 256 --atlas-chunk 16"
CHUNKS = "--text TEXT:9000 --text TEXT:20000 -c 256 -n 400 --atlas-chunk 16 --modes window --atlas-cells 0"
RUNS = {
    "text": f"{LONG} --modes window,atlas,shuffled",
    "copy": "--copy PASSAGE FILLER --passage 160 --filler 240 -c 256 --atlas-chunk 16 --modes full,window,atlas",
    "base": SAME,
    "no flash attention": f"{SAME} -fa off",
    "f32": f"{SAME} -ctk f32 -ctv f32",
    "q8_0": f"{SAME} -ctk q8_0 -ctv q8_0",
    "archive as the cache": f"{SAME} --atlas-type-k f16 --atlas-type-v f16",
    "archive of two types": f"{SAME} --atlas-type-k f32 --atlas-type-v q5_1 -fa off",
    "three sequences": f"{SAME} -np 3",
    "three sequences, one cache": f"{SAME} -np 3 --kv-unified",
    "one thread": THREADS,
    "two threads": f"{THREADS} -t 2",
    "llama": f"{BEYOND} -c 256 --modes full,atlas",
    "llama, unread": f"{BEYOND} -c 256 --modes atlas --atlas-blend 0",
    "gemma3": f"-m GEMMA {BEYOND} -c 768 --modes full,atlas",
    "gemma3, unread": f"-m GEMMA {BEYOND} -c 768 --modes atlas --atlas-blend 0",
    "cap": f"{LONG} --modes atlas,shuffled --atlas-archive-max 5",
    "unread": f"{SHORT} --modes atlas --atlas-blend 0",
    "window": f"{SHORT} --modes window --atlas-cells 0 --atlas-window 124",
    "chunks": CHUNKS,
    "chunks, no flash attention": f"{CHUNKS} -fa off",
    "chunks, two threads": f"{CHUNKS} -t 2",
    "chunks, three sequences": f"{CHUNKS} -np 3",
    "chunks, three sequences, one cache": f"{CHUNKS} -np 3 --kv-unified",
    "chunks, f32": f"{CHUNKS} -ctk f32 -ctv f32",
    "often": OFTEN,
    "seldom": f"{OFTEN} --atlas-refresh 16",
    "far, unread": f"{FAR} --modes atlas --atlas-blend 0",
    "far, window": f"{FAR} --modes window --atlas-cells 0 --atlas-window 124",
}


@dataclass
class Runs:
    """The runs of llama-atlas-eval, two at a time."""

    futures: dict[str, Future[list[dict[str, Any]]]]

    def nll(self, name: str, mode: str = "atlas") -> float:
        """Return the mean NLL of the run's texts."""
        return mean(one["nll"] for one in self.futures[name].result() if one["mode"] == mode)

    def stats(self, name: str) -> dict[str, Any]:
        """Return what the memory did in the run's last text."""
        stats: dict[str, Any] = next(one for one in self.futures[name].result() if one["mode"] == "atlas")["stats"]
        return stats


def evaluate(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in events if event["event"] == "result"]


@pytest.fixture(scope="module")
def runs(native_server: Path, smollm2: Path, gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("texts")
    words = {"GEMMA": str(gemma3)}
    sources = {"TEXT": [ROOT / "tests" / "data" / "text.txt"], "PASSAGE": [ROOT / "README.md"]}
    sources["TWICE"] = 2 * sources["TEXT"]
    sources["FILLER"] = [ROOT / "docs" / "design.md", ROOT / "LICENSE"]
    for name, paths in sources.items():
        (folder / name).write_text("".join(path.read_text() for path in paths))
        words |= {word: word.replace(name, str(folder / name)) for word in (name, f"{name}:9000", f"{name}:20000")}
    tool = [str(native_server.with_name(native.EVAL)), "-t", "1", "-m", str(smollm2)]
    with ThreadPoolExecutor(2) as pool:
        commands = {name: [*tool, *(words.get(word, word) for word in run.split())] for name, run in RUNS.items()}
        yield Runs({name: pool.submit(evaluate, command) for name, command in commands.items()})
        pool.shutdown(cancel_futures=True)


def test_memory_is_worth_more_than_the_window_and_than_random_tokens(runs: Runs) -> None:
    atlas = runs.nll("text")
    assert atlas < runs.nll("text", "window") - 0.05
    assert atlas < runs.nll("text", "shuffled") - 0.05


def test_copy_is_found_again(runs: Runs) -> None:
    full, window, atlas = (runs.nll("copy", mode) for mode in ("full", "window", "atlas"))
    assert window - full > 2
    assert window - atlas >= 0.9 * (window - full)


@pytest.mark.parametrize(
    ("name", "base", "tolerance"),
    [
        ("no flash attention", "base", 0.03),
        ("f32", "base", 0.03),
        ("q8_0", "base", 0.03),
        ("archive as the cache", "base", 0.02),
        ("archive of two types", "base", 0.03),
        ("three sequences", "base", 1e-4),
        ("three sequences, one cache", "base", 1e-4),
        ("two threads", "one thread", 1e-4),
    ],
)
def test_same_result(runs: Runs, name: str, base: str, tolerance: float) -> None:
    assert runs.nll(name) == pytest.approx(runs.nll(base), abs=tolerance)
    assert runs.stats(name)["n_archived"] == runs.stats(base)["n_archived"] > 0
    assert runs.stats(name)["n_recalled"] > 0


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("no flash attention", 0.02),
        ("two threads", 1e-4),
        ("three sequences", 1e-4),
        ("three sequences, one cache", 0.02),
        ("f32", 0.02),
    ],
)
def test_chunk_of_a_prompt_has_the_attention_that_the_model_has(runs: Runs, name: str, tolerance: float) -> None:
    assert runs.nll(f"chunks, {name}", "window") == pytest.approx(runs.nll("chunks", "window"), abs=tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_memory_that_holds_nearly_everything_is_full_attention(runs: Runs, name: str) -> None:
    full, atlas, unread = runs.nll(name, "full"), runs.nll(name), runs.nll(f"{name}, unread")
    assert unread - full > 0.15
    assert abs(atlas - full) < (unread - full) / 4


def test_archive_forgets_the_oldest_when_it_is_full(runs: Runs) -> None:
    stats = runs.stats("cap")
    assert 0 < stats["n_forgotten"] < stats["n_archived"]
    assert stats["bytes"] < 6 << 20
    assert runs.nll("cap") < runs.nll("cap", "shuffled") - 0.02
    assert runs.nll("cap") < runs.nll("text", "window")


def test_memory_that_is_not_read_is_the_window(runs: Runs) -> None:
    assert runs.nll("unread") == pytest.approx(runs.nll("window", "window"), abs=0.03)


def test_frequent_refreshes_do_no_harm(runs: Runs) -> None:
    assert runs.nll("often") < runs.nll("seldom") + 0.02
    assert runs.stats("often")["n_refresh"] > 8 * runs.stats("seldom")["n_refresh"] > 0


@pytest.mark.timeout(900)  # the longest runs, which come last
def test_sinks_stay_near_a_window_without_memory(runs: Runs) -> None:
    """They have to move with it: the model was trained on 8,192 tokens, and no further behind do they work as sinks."""
    assert runs.nll("far, window", "window") == pytest.approx(runs.nll("far, unread"), abs=0.05)
