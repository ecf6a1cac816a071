"""Saving and loading again and again changes nothing: not the session, not the server, not the answers of others.

`scripts/bench/atlas_files.py` measures what it costs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_files
from atlas_server import MemoryServer, saved_tokens, tiny_model, workplace

WORDS = ["-c", "512", "-np", "2", "-t", "1", "--atlas-memory-backup-count", "1"]
PROMPT = [40 + number * 7 % 61 for number in range(500)]


@pytest.fixture
def running(native_server: Path) -> Iterator[MemoryServer]:
    with workplace() as folder, MemoryServer(native_server, tiny_model(folder), folder, *WORDS) as made:
        yield made


def test_cycles(running: MemoryServer) -> None:
    running.want(running.complete(PROMPT, 1, memory_file="book"))
    first = (running.memory / "book.atlas").stat().st_size
    seen = atlas_files.cycle(running, "book", 60, every=20)
    assert seen[-1]["files"] <= seen[0]["files"]
    assert saved_tokens(running.memory / "book.atlas")[0] == PROMPT
    assert abs((running.memory / "book.atlas").stat().st_size - first) < 100
    goes_on = running.want(running.complete([70], 16, memory_file="book", save_memory=False))["tokens"]
    running.want(running.complete(PROMPT, 1, memory_file="fresh"))
    assert running.want(running.complete([70], 16, memory_file="fresh"))["tokens"] == goes_on


def test_a_stream_is_the_same_while_another_session_is_saved_and_loaded(running: MemoryServer) -> None:
    running.want(running.complete(PROMPT, 1, memory_file="book"))
    alone = atlas_files.Stream(running, 600)
    alone.join()
    assert alone.whole and len(alone.tokens) > 100  # those that end a character
    beside, cycles = atlas_files.Stream(running, 600), 0
    while beside.is_alive():
        atlas_files.cycle(running, "book", 1)
        cycles += 1
    assert cycles > 0
    assert beside.whole and beside.tokens == alone.tokens


def test_what_is_measured_fits_the_file(running: MemoryServer) -> None:
    row = atlas_files.measure(running, PROMPT, rounds=1, quiet=0.1)
    assert row["tokens"] == len(PROMPT)
    assert row["stored"] == row["whole_written"] <= (running.memory / "book.atlas").stat().st_size
    assert row["raw"] > len(PROMPT) * atlas_files.kv_bytes(running.memory.parent / "tiny.gguf", "f16")
    assert set(atlas_files.latencies(running, 2)) == {"disabled", "enabled", "session"}


def test_a_session_can_be_saved_again_at_once(running: MemoryServer) -> None:
    running.want(running.complete(PROMPT, 1, memory_file="book"))
    for _ in range(100):
        atlas_files.save(running, "book")
        saved = running.want(running.complete([70], 1, memory_file="book", append=True))["atlas"]["saved"]
        assert "bytes" in saved, saved


def test_a_file_is_good_wherever_the_layers_are(native_server: Path, gemma3: Path) -> None:
    """Repacked weights have a buffer of their own, as those on a GPU have, and so come in another order."""
    words = ["-c", "512", "-np", "1", "-t", "1"]
    with workplace() as folder:
        with MemoryServer(native_server, gemma3, folder, *words, "--no-repack") as running:
            running.want(running.complete(PROMPT, 1, memory_file="book"))
        with MemoryServer(native_server, gemma3, folder, *words) as running:
            answer = running.want(running.complete([70], 1, memory_file="book", save_memory=False))
    assert answer["tokens_evaluated"] > len(PROMPT) > 10 > answer["timings"]["prompt_n"]
