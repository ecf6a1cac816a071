#!/usr/bin/env python3
"""What does a memory file cost: bytes, seconds, the wait of others, and does anything grow?

`files`: a session of 8K and of 32K tokens, with F16 and Q8_0 cache: saved to a new file, saved after a turn, and
loaded, by the routes, median of 5; loaded by a server that has just started, whose memory is all new, median of 3; its
bytes beside those of the KV cache for as many tokens; and the longest gap between two tokens of another slot's stream
meanwhile, over the median gap when nothing is saved. `latency`: a short request with `"enabled": true` and `false`, and
as a session, in turn; medians of 50. `cycles`: 1,000 times saved and loaded: resident memory, open files.
Targets: at 32K a save takes less than 1 s and a load less than 0.5 s (F16), the stream waits at most 50 ms longer than
else; `enabled` adds less than 5 ms; the last 900 cycles add no open file and less than 4 MiB (medians of the first and
of the last five looks: one may fall into a moment in which buffers are given back).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from atlas_common import CORPUS, TEXTS, corpus, place, progress, steps
from atlas_server import MemoryServer, workplace
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

SAVE, LOAD, STALL, LATENCY, GROWTH = 1.0, 0.5, 0.05, 0.005, 4 << 20
"""Targets: seconds, seconds, seconds, seconds, bytes."""

CACHES = {"f16": 2.0, "q8_0": 34 / 32}
"""Bytes of a value in each type of cache."""

TURN = 16
"""Tokens of a turn."""

WARM = 100
"""Cycles before the memory is looked at."""

LOOKS = 5
"""Looks at the memory of which the median counts, first and last."""


class Stream(threading.Thread):
    """A request of its own whose tokens are timed; `gaps` are the seconds between those of a span of time."""

    def __init__(self, running: MemoryServer, tokens: int) -> None:
        super().__init__(daemon=True)
        self.running, self.count = running, tokens
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.whole = False
        self.enough = threading.Event()
        self.start()

    def run(self) -> None:
        """Read the stream; it ends early when `enough` is set."""
        body = {"prompt": "Once upon a time", "n_predict": self.count, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0, "return_tokens": True}
        with contextlib.closing(self.running.connect()) as connection:
            connection.request("POST", "/completion", json.dumps(body))
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    self.times.append(time.perf_counter())
                    event = json.loads(line[6:])
                    self.tokens += event.get("tokens", [])
                    self.whole = event.get("stop", False)
                if self.enough.is_set():
                    break

    def gaps(self, begin: float, end: float) -> list[float]:
        """Return the gaps that touch the span from `begin` to `end`."""
        times = list(self.times)
        return [b - a for a, b in pairwise(times) if b > begin and a < end]

    def go_on(self, seconds: float) -> tuple[float, float]:
        """Wait so long, and until two more tokens have come; return the span."""
        begin, before = time.perf_counter(), len(self.times)
        time.sleep(seconds)
        while len(self.times) < before + 2:
            if not self.is_alive():
                raise BenchError("the other slot's stream has ended")
            time.sleep(0.001)
        return begin, time.perf_counter()


@contextlib.contextmanager
def streaming(running: MemoryServer, tokens: int = 100_000) -> Iterator[Stream]:
    """Let another slot stream meanwhile; it is free again at the end. Raises `BenchError` when it is not."""
    stream = Stream(running, tokens)
    try:
        while not stream.times:
            if not stream.is_alive():
                raise BenchError("the other slot's stream does not begin")
            time.sleep(0.001)
        yield stream
    finally:
        stream.enough.set()
        stream.join(30)
    for _ in range(3000):
        if not any(slot["is_processing"] for slot in running.want(running.ask("GET", "/slots"))):
            return
        time.sleep(0.01)
    raise BenchError("the other slot's stream does not end")


def tokens_of(running: MemoryServer, text: str, count: int) -> list[int]:
    """Return the first `count` tokens of a text. Raises `BenchError` when it has fewer."""
    found = running.want(running.ask("POST", "/tokenize", {"content": text, "add_special": True}))["tokens"]
    if len(found) < count:
        raise BenchError(f"the text has {len(found)} tokens, not {count}")
    return list(found[:count])


def save(running: MemoryServer, name: str, **more: Any) -> Json:
    """Save a session now."""
    return running.want(running.ask("POST", "/v1/atlas/memory/save", {"filename": name} | more))


def load(running: MemoryServer, name: str) -> Json:
    """Load a session as its file has it."""
    return running.want(running.ask("POST", "/v1/atlas/memory/load", {"filename": name}))


def measure(running: MemoryServer, prompt: list[int], rounds: int, quiet: float, settle: float = 0.0) -> Json:
    """Read a session, and save and load it `rounds` times, each alone and beside a stream of the other slot.

    `whole`: a file of its own; `save`: the session's file after a turn of a few tokens. Returns bytes and seconds; a
    stall is the longest gap in the stream less the median gap of `quiet` seconds before, which begin `settle` seconds
    after what was done before: the host of a virtual machine may take back freed memory, the pages of a deleted file
    too, two seconds later, and everything waits then. Each round has a stream of its own, for a longer one is slower:
    after 2,000 tokens a token takes twice the time. `stream_noise` is what the quiet seconds have for a stall.
    """
    slot = running.want(running.complete(prompt, 1, memory_file="book"))["atlas"]["saved"]["slot"]
    row: Json = {"tokens": len(prompt)}

    def turn() -> None:
        running.want(running.complete([70] * TURN, 1, memory_file="book", append=True, save_memory=False))

    def nothing() -> None:
        pass

    def forget() -> None:
        running.ask("DELETE", "/v1/atlas/memory?file=whole")

    calls: dict[str, tuple[Callable[[], None], Callable[[], Json]]] = {
        "whole": (forget, lambda: save(running, "whole", slot=slot)),
        "save": (turn, lambda: save(running, "book")),
        "load": (nothing, lambda: load(running, "book")),
    }
    for what, (before_it, call) in calls.items():
        seconds, written = [], []
        for _ in range(rounds):
            before_it()
            began = time.perf_counter()
            answer = call()
            seconds.append(time.perf_counter() - began)
            written.append(answer.get("written", 0))
            if answer["n_tokens"] < len(prompt):
                raise BenchError(f"{what}: {answer['n_tokens']} tokens instead of {len(prompt)}")
        row[f"{what}_seconds"] = statistics.median(seconds)
        row[f"{what}_written"] = statistics.median(written)
        if what == "whole":
            row |= {"raw": answer["raw"], "stored": answer["bytes"]}
    for what, (before_it, call) in calls.items():
        stalls, usual, worst = [], [], []
        for _ in range(rounds):
            with streaming(running) as stream:
                before_it()
                stream.go_on(settle)
                before = stream.gaps(*stream.go_on(quiet))
                began = time.perf_counter()
                call()
                _, ended = stream.go_on(0.05)
            stalls.append(max(stream.gaps(began, ended)) - statistics.median(before))
            usual.append(statistics.median(before))
            worst.append(max(before) - statistics.median(before))
        row[f"{what}_stall"], row[f"{what}_stalls"] = statistics.median(stalls), stalls
        row[f"{what}_stream_gap"] = statistics.median(usual)
        row[f"{what}_stream_noise"] = worst
    forget()
    return row


def latencies(running: MemoryServer, rounds: int) -> dict[str, float]:
    """Return the median seconds of a short request by what its `atlas` object says, asked in turn."""
    kinds: dict[str, Json] = {
        "disabled": {"enabled": False},
        "enabled": {"enabled": True},
        "session": {"memory_file": "short", "reset": "hard"},
    }
    body = {"prompt": "The capital of France is", "n_predict": 4, "temperature": 0, "cache_prompt": False}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in steps(list(range(rounds + 2)), "latency"):
        for kind in sorted(kinds, reverse=number % 2 == 1):
            began = time.perf_counter()
            running.want(running.ask("POST", "/completion", body | {"atlas": kinds[kind]}))
            if number > 1:
                seconds[kind].append(time.perf_counter() - began)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def cycle(running: MemoryServer, name: str, count: int, every: int = 50) -> list[Json]:
    """Save and load a session `count` times; return resident bytes and open files after each `every` of them."""
    process = psutil.Process(running.process.pid)
    seen = []
    for number in range(1, count + 1):
        progress("save and load", number, count)
        save(running, name)
        load(running, name)
        if number % every == 0:
            files = _open_files(process)  # takes the moment in which buffers are given back
            seen.append({"cycles": number, "rss": process.memory_info().rss, "files": files})
    progress("")
    return seen


def _open_files(process: psutil.Process) -> int:
    """Return the least number of open files in 0.1 s: connections and locks are closed after the answer."""
    if not hasattr(process, "num_fds"):
        return 0
    least = process.num_fds()
    for _ in range(10):
        time.sleep(0.01)
        least = min(least, process.num_fds())
    return least


def kv_bytes(model: Path, cache: str) -> float:
    """Return the bytes of a token in the KV cache."""
    from supervisor.models.gguf import read_header
    from supervisor.plan import kv_bytes_per_token

    return kv_bytes_per_token(read_header(model)) / 2 * CACHES[cache]


def main() -> int:
    """Run the benchmark; 0 when the targets are met, 1 when they are not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--parts", nargs="*", default=["files", "latency", "cycles"])
    options.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768])
    options.add_argument("--caches", nargs="*", default=list(CACHES), choices=list(CACHES))
    options.add_argument("--cells", type=int, default=2048, help="context of a slot")
    options.add_argument("--rounds", type=int, default=7, help="saves and loads of each kind")
    options.add_argument("--starts", type=int, default=3, help="loads by a server that has just started")
    options.add_argument("--quiet", type=float, default=2.0, help="seconds of the stream before each")
    options.add_argument("--settle", type=float, default=3.0, help="seconds before that")
    options.add_argument("--requests", type=int, default=50, help="short requests of each kind")
    options.add_argument("--cycles", type=int, default=1000)
    options.add_argument("--cycle-tokens", type=int, default=600)
    options.add_argument("--threads", "-t", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--text", default="glossary", metavar="FILE[:OFFSET]")
    options.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the default texts")
    options.add_argument("--words", default="", help="more words for llama-server")
    given = options.parse_args()
    before, server = machine_state(), server_of(given)
    path, _, offset = place(given.text, corpus(given.corpus) if given.text in TEXTS else {}).partition(":")
    text = Path(path).read_text(errors="replace")[int(offset or 0) :][: 8 * max(given.tokens)]

    def words(cells: int, cache: str) -> list[str]:
        made = ["-c", str(2 * cells), "-np", "2", "-t", str(given.threads), "--atlas-memory-backup-count", "1"]
        types = [] if cache == "f16" else ["-ctk", cache, "-ctv", cache, "-fa", "on"]
        return [*made, "--atlas-auto-save-interval", "0", *types, *given.words.split()]

    result: Json = {"benchmark": "atlas files", "files": [], "latency": None, "cycles": []}
    with workplace() as folder:
        for cache in given.caches if "files" in given.parts else []:
            for tokens in given.tokens:
                progress(f"{tokens} tokens, {cache}")
                with MemoryServer(server, given.model, folder, *words(given.cells, cache)) as running:
                    row = measure(running, tokens_of(running, text, tokens), given.rounds, given.quiet, given.settle)
                first = []
                for _ in range(given.starts):
                    with MemoryServer(server, given.model, folder, *words(given.cells, cache)) as running:
                        began = time.perf_counter()
                        load(running, "book")
                        first.append(time.perf_counter() - began)
                row["first_seconds"] = statistics.median(first)
                for path in (folder / "memory").glob("book*"):
                    path.unlink()
                result["files"].append({"cache": cache} | row | {"kv": kv_bytes(given.model, cache) * tokens})
        if {"latency", "cycles"} & set(given.parts):
            with MemoryServer(server, given.model, folder, *words(512, "f16")) as running:
                if "latency" in given.parts:
                    result["latency"] = latencies(running, given.requests)
                if "cycles" in given.parts:
                    prompt = tokens_of(running, text, given.cycle_tokens)
                    running.want(running.complete(prompt, 1, memory_file="small", save_memory=False))
                    result["cycles"] = cycle(running, "small", given.cycles)
    progress("")
    return _report(result, before, given.json)


def _targets(result: Json) -> dict[str, bool]:
    """Return the targets that were measured, and whether they are met."""
    targets = {}
    for row in result["files"]:
        name = f"{row['cache']}, {row['tokens']} tokens"
        if row["cache"] == "f16" and row["tokens"] == 32768:
            targets[f"{name}: save < {SAVE:g} s"] = row["whole_seconds"] < SAVE
            targets[f"{name}: save after a turn < {SAVE:g} s"] = row["save_seconds"] < SAVE
            targets[f"{name}: load < {LOAD:g} s"] = row["load_seconds"] < LOAD
        for what in ("whole", "save", "load"):
            targets[f"{name}: {what} stalls < {1000 * STALL:g} ms"] = row[f"{what}_stall"] < STALL
    if result["latency"]:
        added = result["latency"]["enabled"] - result["latency"]["disabled"]
        targets[f"enabled adds < {1000 * LATENCY:g} ms"] = added < LATENCY
    later = [seen for seen in result["cycles"] if seen["cycles"] >= WARM]
    if len(later) > 1:
        first, last = (statistics.median(seen["rss"] for seen in looks) for looks in (later[:LOOKS], later[-LOOKS:]))
        targets[f"cycles add < {GROWTH >> 20} MiB"] = last - first < GROWTH
        targets["cycles leave no file open"] = later[-1]["files"] <= later[0]["files"]
    return targets


def _report(result: Json, before: Json, as_json: bool) -> int:
    targets = _targets(result)
    if as_json:
        more: dict[str, Any] = {"targets": targets, "machine": {"before": before, "after": machine_state()}}
        print(json.dumps(result | more, indent=2))
        return 0 if all(targets.values()) else 1
    if result["files"]:
        print(
            "cache  tokens   KV cache       raw    stored  a token   new file, after a turn, load, first load: s;"
            " stalls (longest)"
        )
    for row in result["files"]:
        sizes = " ".join(f"{row[key] / 1e6:>6.1f} MB" for key in ("kv", "raw", "stored"))
        stalls = ", ".join(
            f"{1000 * row[f'{what}_stall']:.0f} ({1000 * max(row[f'{what}_stalls']):.0f}) ms"
            for what in ("whole", "save", "load")
        )
        noise = [seen for what in ("whole", "save", "load") for seen in row[f"{what}_stream_noise"]]
        alone = f"{1000 * statistics.median(noise):.0f} ({1000 * max(noise):.0f})"
        gap = f"gap {1000 * row['save_stream_gap']:.0f} ms, alone {alone} ms"
        print(
            f"{row['cache']:5} {row['tokens']:>7}  {sizes} {row['stored'] / row['tokens'] / 1e3:>5.1f} KB"
            f" {row['whole_seconds']:>6.2f} s, {row['save_seconds']:.2f} s ({row['save_written'] / 1e6:.1f} MB),"
            f" {row['load_seconds']:.2f} s, {row['first_seconds']:.2f} s  {stalls} ({gap})"
        )
    if result["latency"]:
        print("a short request: " + ", ".join(f"{kind} {1000 * s:.1f} ms" for kind, s in result["latency"].items()))
    for seen in result["cycles"]:
        print(f"after {seen['cycles']:>5} cycles: {seen['rss'] / 2**20:.1f} MiB, {seen['files']} open files")
    for target, met in targets.items():
        print(f"{'met   ' if met else 'MISSED'} {target}")
    print_machine(before)
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    run_main(main)
