#!/usr/bin/env python3
"""Is a patched llama-server without `--atlas` the same as the unpatched one, in output and in speed?

Output: greedy answers to 20 prompts (48 tokens each, with the log-probabilities of the 20 likeliest tokens), one slot,
the same threads: must be bit-identical. Speed: llama-bench of both builds, prompt of 512 and decode of 64 tokens, must
be at most 1 % slower. Both run at the same time, each on half of the CPUs, and change places for the second half of a
round: what disturbs a shared machine by tens of percent then hits both. The median of the rounds' ratios counts, and
its 95 % interval (order statistics) says whether it can be told at all.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atlas_common import Server, steps
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main

SLOWER = 0.01
MET = "met"

REPEATED = 2
"""Times that llama-bench repeats a test."""

TOPICS = (
    "a river in winter", "the history of paper", "how bread is made", "the moons of Jupiter", "a letter to a friend",
    "sorting a list in Python", "the rules of chess", "a storm at sea", "why leaves are green", "a recipe for soup",
    "the first railway", "a dialogue between two cats", "how to repair a bicycle", "the number zero", "an old library",
    "what a compiler does", "a walk through a market", "the water cycle", "a short poem about rain", "keeping bees",
)  # fmt: skip


def main() -> int:
    """Run the benchmark; 0 when the targets are met, 1 when they are not."""
    options = parser(__doc__)
    options.add_argument("base", type=Path, help="unpatched llama-server, llama-bench beside it")
    options.add_argument("patched", type=Path, help="patched llama-server, llama-bench beside it")
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise BenchError("the two builds run side by side: at least two CPUs are needed")
    halves = cpus[: len(cpus) // 2], cpus[len(cpus) // 2 : len(cpus) // 2 * 2]
    before = machine_state()
    builds = {"base": given.base, "patched": given.patched}
    said = {name: _answers(server, given.model, len(cpus), name) for name, server in builds.items()}
    different = [TOPICS[number] for number in range(len(TOPICS)) if said["base"][number] != said["patched"][number]]
    benches = {name: server.parent / "llama-bench" for name, server in builds.items()}
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in builds}
    for number in steps(list(range(given.rounds + 1)), "llama-bench"):
        for name, speed in _round(benches, given.model, halves).items():
            for test, value in speed.items():
                if number:  # the round before does not count
                    speeds[name].setdefault(test, []).append(value)
    ratios = {
        test: _median([patched / base for base, patched in zip(speeds["base"][test], of, strict=True)])
        for test, of in speeds["patched"].items()
    }
    verdict = _verdict(not different, list(ratios.values()))
    if given.json:
        result = {"benchmark": "atlas off", "different": different, "rounds": speeds}
        result |= {"patched_over_base": ratios, "verdict": verdict}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 0 if verdict == MET else 1
    print(
        f"{len(TOPICS) - len(different)} of {len(TOPICS)} answers bit-identical"
        + ": not " * bool(different)
        + "; ".join(different)
    )
    for test, (middle, low, high) in ratios.items():
        all_ = (speeds[name][test] for name in builds)
        base, patched = (f"{statistics.median(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in all_)
        print(f"{test}: base {base}, patched {patched} tokens/s: {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})")
    print(f"target: identical and at most {SLOWER:.0%} slower: {verdict}")
    print_machine(before)
    return 0 if verdict == MET else 1


def _verdict(identical: bool, ratios: list[tuple[float, float, float]]) -> str:
    """Judge by the intervals of the ratios; where one of them holds the target, more rounds are needed."""
    if not identical or any(high < 1 - SLOWER for _, _, high in ratios):
        return "MISSED"
    return MET if all(low >= 1 - SLOWER for _, low, _ in ratios) else "cannot be told: more rounds"


def _median(of: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval; the smallest and largest where there are too few for one."""
    ranked = sorted(of)
    least = max(0, math.floor(len(of) / 2 - 0.98 * math.sqrt(len(of))))
    return statistics.median(ranked), ranked[least], ranked[-1 - least]


def _answers(server: Path, model: Path, threads: int, note: str) -> list[Json]:
    body = {"n_predict": 48, "temperature": 0, "n_probs": 20, "return_tokens": True, "ignore_eos": True, "seed": 1}
    with Server(server, model, ["-c", "1024", "-t", str(threads)]) as running:
        found = []
        for topic in steps(list(TOPICS), f"greedy, {note}"):
            answer = running.call("/completion", {"prompt": f"Here is a text about {topic}.\n\n", **body})
            found.append({key: answer[key] for key in ("content", "tokens", "completion_probabilities")})
    return found


def _round(benches: dict[str, Path], model: Path, halves: tuple[list[int], list[int]]) -> dict[str, dict[str, float]]:
    """Run both on one half of the CPUs each, and again on the other; return the geometric means of the speeds."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in benches}
    with ThreadPoolExecutor(len(benches)) as pool:
        for places in (halves, halves[::-1]):
            pairs = zip(benches.values(), places, strict=True)
            started = [pool.submit(_bench, bench, model, half) for bench, half in pairs]
            for name, run in zip(benches, started, strict=True):
                runs[name].append(run.result())
    return {name: {test: math.sqrt(a[test] * b[test]) for test in a} for name, (a, b) in runs.items()}


def _bench(binary: Path, model: Path, cpus: list[int]) -> dict[str, float]:
    os.sched_setaffinity(0, cpus)  # of this thread, which its child inherits
    command = [str(binary), "-m", str(model), "-p", "512", "-n", "64", "-r", str(REPEATED)]
    command += ["-t", str(len(cpus)), "-o", "json"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from error
    return {"prompt" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in json.loads(ended.stdout)}


if __name__ == "__main__":
    run_main(main)
