#!/usr/bin/env python3
"""Is a patched llama-server without `--atlas` the same as the unpatched one, in output and in speed?

Output: greedy answers to 20 prompts (48 tokens each, with the log-probabilities of the 20 likeliest tokens), one slot,
the same threads: must be bit-identical. Speed: llama-bench of both builds, prompt of 512 and decode of 64 tokens, must
be at most 1 % slower. The two run at the same time, with one thread each, on the same CPU, where the kernel changes
from one to the other every few milliseconds: what disturbs a shared machine by tens of percent hits both alike. The
CPU time of each counts. A round has such a pair on every CPU; the median of all ratios is judged, and its 95 %
interval (order statistics) says whether it can be told at all.
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

TESTS = {"prompt": "-p 512 -n 0 -r 2", "decode": "-p 0 -n 64 -r 8"}
"""Arguments of llama-bench; long enough that its start does not count."""

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
    before = machine_state()
    builds = {"base": given.base, "patched": given.patched}
    said = {name: _answers(server, given.model, name) for name, server in builds.items()}
    different = [TOPICS[number] for number in range(len(TOPICS)) if said["base"][number] != said["patched"][number]]
    benches = [server.parent / "llama-bench" for server in builds.values()]
    seconds: dict[str, list[tuple[float, float]]] = {test: [] for test in TESTS}
    for number in steps(list(range(given.rounds + 1)), "llama-bench"):
        for test, args in TESTS.items():
            pairs = _pairs(benches, [*args.split(), "-m", str(given.model)], swapped=number % 2 == 1)
            seconds[test] += pairs if number else []  # the round before does not count
    ratios = {test: _median([base / patched for base, patched in pairs]) for test, pairs in seconds.items()}
    verdict = _verdict(not different, list(ratios.values()))
    if given.json:
        result = {"benchmark": "atlas off", "different": different, "cpu_seconds": seconds}
        result |= {"speed_of_base": ratios, "verdict": verdict}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 0 if verdict == MET else 1
    print(
        f"{len(TOPICS) - len(different)} of {len(TOPICS)} answers bit-identical"
        + ": not " * bool(different)
        + "; ".join(different)
    )
    for test, (middle, low, high) in ratios.items():
        base, patched = (f"{statistics.median(one):.2f}" for one in zip(*seconds[test], strict=True))
        print(
            f"{test}: {base} and {patched} s of CPU time, {len(seconds[test])} pairs: speed {middle - 1:+.2%} "
            f"({low - 1:+.2%} to {high - 1:+.2%})"
        )
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


def _answers(server: Path, model: Path, note: str) -> list[Json]:
    body = {"n_predict": 48, "temperature": 0, "n_probs": 20, "return_tokens": True, "ignore_eos": True, "seed": 1}
    with Server(server, model, ["-c", "1024", "-t", str(len(os.sched_getaffinity(0)))]) as running:
        found = []
        for topic in steps(list(TOPICS), f"greedy, {note}"):
            answer = running.call("/completion", {"prompt": f"Here is a text about {topic}.\n\n", **body})
            found.append({key: answer[key] for key in ("content", "tokens", "completion_probabilities")})
    return found


def _pairs(benches: list[Path], args: list[str], *, swapped: bool) -> list[tuple[float, float]]:
    """Run both builds on every CPU, all at once; return their CPU times in seconds."""
    cpus = sorted(os.sched_getaffinity(0))
    with ThreadPoolExecutor(len(cpus) * len(benches)) as pool:
        started = [
            [pool.submit(_cpu_seconds, bench, args, cpu) for bench in (benches[::-1] if swapped else benches)]
            for cpu in cpus
        ]
        used = [[one.result() for one in pair] for pair in started]
    return [(second, first) if swapped else (first, second) for first, second in used]


def _cpu_seconds(bench: Path, args: list[str], cpu: int) -> float:
    os.sched_setaffinity(0, [cpu])  # of this thread, which its child inherits
    command = [str(bench), "-t", "1", *args]
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
            said = running.stderr.read() if running.stderr else b""
            _, status, used = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
    except OSError as error:
        raise BenchError(f"{bench}: {error}") from error
    if running.returncode:
        raise BenchError(
            f"{' '.join(command)} exited with {running.returncode}: {said[-500:].decode(errors='replace')}"
        )
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run_main(main)
