#!/usr/bin/env python3
"""Is a patched llama-server without `--atlas` the same as the unpatched one, in output and in speed?

Output: greedy answers to 20 prompts (48 tokens each, with the log-probabilities of the 20 likeliest tokens), one slot,
the same threads: must be bit-identical. Speed: llama-bench of both builds, prompt of 512 and decode of 64 tokens,
interleaved, each going first every other round: median of the rounds' ratios, at most 1 % slower, with its 95 %
interval (order statistics). On a machine whose rounds vary by 10 %, seven of them say nothing about 1 %: ask for more.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from pathlib import Path

from atlas_common import Server, steps
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main

SLOWER = 0.01

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
    options.add_argument("--threads", "-t", type=int, default=len(os.sched_getaffinity(0)))
    given = options.parse_args()
    before = machine_state()
    builds = {"base": given.base, "patched": given.patched}
    said = {name: _answers(server, given.model, given.threads, name) for name, server in builds.items()}
    different = [TOPICS[number] for number in range(len(TOPICS)) if said["base"][number] != said["patched"][number]]
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in builds}
    for number in steps(list(range(given.rounds + 1)), "llama-bench"):
        for name in sorted(builds, reverse=number % 2 == 1):
            for test, speed in _bench(builds[name].parent / "llama-bench", given.model, given.threads).items():
                if number:  # the round before does not count
                    speeds[name].setdefault(test, []).append(speed)
    medians = {name: {test: statistics.median(all_) for test, all_ in of.items()} for name, of in speeds.items()}
    ratios = {
        test: _median([patched / base for base, patched in zip(speeds["base"][test], of, strict=True)])
        for test, of in speeds["patched"].items()
    }
    met = not different and all(middle >= 1 - SLOWER for middle, _, _ in ratios.values())
    if given.json:
        result = {"benchmark": "atlas off", "different": different, "rounds": speeds, "median": medians}
        result |= {"patched_over_base": ratios, "met": met}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 0 if met else 1
    print(
        f"{len(TOPICS) - len(different)} of {len(TOPICS)} answers bit-identical"
        + ": not " * bool(different)
        + "; ".join(different)
    )
    for test, (middle, low, high) in ratios.items():
        base, patched = (
            f"{medians[name][test]:.1f} ({min(speeds[name][test]):.1f} to {max(speeds[name][test]):.1f})"
            for name in builds
        )
        print(f"{test}: base {base}, patched {patched} tokens/s: {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})")
    print(f"target: identical and at most {SLOWER:.0%} slower: {'met' if met else 'MISSED'}")
    print_machine(before)
    return 0 if met else 1


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


def _bench(binary: Path, model: Path, threads: int) -> dict[str, float]:
    command = [str(binary), "-m", str(model), "-p", "512", "-n", "64", "-r", "1", "-t", str(threads), "-o", "json"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from error
    return {"prompt" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in json.loads(ended.stdout)}


if __name__ == "__main__":
    run_main(main)
