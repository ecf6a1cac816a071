"""How fast is the header of a large model read? Compares supervisor.models.gguf with the `gguf` package, if installed.

The file has a vocabulary of 150 000 tokens, as many merges, scores and token types, and 300 tensors. Times are
CPU times, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from supervisor.models.gguf import read_header

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from gguf_files import F32, Raw, gguf, llama

Read = Callable[[Path], object]


def make_file(path: Path, tokens: int) -> None:
    """Write a model with `tokens` tokens; the words are random and the same each time."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghij", k=words.randint(1, 12))) for _ in range(tokens)]
    metadata = llama(
        tokenizer__ggml__tokens=vocabulary,
        tokenizer__ggml__merges=[f"{word[:3]} {word[3:]}" for word in vocabulary],
        tokenizer__ggml__scores=Raw(6, [0.5] * tokens, array=True),
        tokenizer__ggml__token_type=Raw(5, [1] * tokens, array=True),
    )
    path.write_bytes(gguf(metadata, [(f"blk.{i}.weight", (256, 4), F32) for i in range(300)]))


def readers() -> dict[str, Read]:
    found: dict[str, Read] = {"supervisor.models.gguf": read_header}
    try:
        from gguf import GGUFReader
    except ImportError:
        print("the gguf package is not installed: nothing to compare with", file=sys.stderr)
    else:
        found["gguf.GGUFReader"] = GGUFReader
    return found


def measure(read: Read, path: Path, rounds: int) -> tuple[float, float, float]:
    """Return the best and the median CPU time in milliseconds, and the peak of Python memory in MiB."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        read(path)
        times.append((time.process_time() - began) * 1000)
    tracemalloc.start()
    read(path)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return min(times), statistics.median(times), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150_000, help="size of the vocabulary")
    parser.add_argument("--rounds", type=int, default=5, help="times that each reader runs")
    parser.add_argument("--file", type=Path, help="a model to read instead of the generated one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "large.gguf"
        if options.file is None:
            make_file(path, options.tokens)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB, {options.rounds} rounds")
        print(f"{'reader':<20}{'best ms':>10}{'median ms':>12}{'peak MiB':>10}")
        for name, read in readers().items():
            best, median, peak = measure(read, path, options.rounds)
            print(f"{name:<20}{best:>10.1f}{median:>12.1f}{peak:>10.1f}")


if __name__ == "__main__":
    main()
