#!/usr/bin/env python3
"""What does it save to keep prompts over a swap, and what does it cost the swap?

A conversation of some N tokens with A, a swap to B and back, with `models.slot_cache` and without, in turn. Back:
seconds from the next question of the conversation to the first byte of its answer. Away: seconds to the first byte of
B, for which A is stopped, and saved in one case. Both files are on the page cache.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from common import (
    PAUSE,
    BenchError,
    Supervisor,
    chat,
    first_byte,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    supervisor,
    wait_for,
    warm_page_cache,
)

LINE = "Fact {}: the quick brown fox jumps over a lazy dog. "


def messages(running: Supervisor, tokens: int) -> tuple[int, list[dict[str, str]]]:
    """Return a conversation of at least so many tokens, and how many they are."""
    lines: list[str] = []
    count = 0
    while count < tokens:
        lines += [LINE.format(len(lines) + number) for number in range(max(1, (tokens - count) // 16))]
        found = running.call("POST", "/tokenize", {"model": "a", "content": "".join(lines)})
        count = len(found["tokens"])
    return count, [{"role": "user", "content": "".join(lines)}]


def one_round(running: Supervisor, said: list[dict[str, str]]) -> tuple[float, float]:
    """Return the seconds of the swap away from the conversation, and of the return to it."""
    body = {"model": "a", "messages": said, "max_tokens": 8, "temperature": 0}
    answer = running.call("POST", "/v1/chat/completions", body)["choices"][0]["message"]
    time.sleep(PAUSE)
    away = first_byte(running.connect(), chat("b"))
    wait_for(lambda: running.state("a") == "absent", 30, lambda: "a is not stopped")
    time.sleep(PAUSE)
    more = [*said, answer, {"role": "user", "content": "Go on."}]
    back = first_byte(running.connect(600), chat("a", messages=more))
    running.unload("a")
    running.unload("b")
    return away, back


def measure(options: Any, tokens: int) -> dict[str, Any]:
    """Measure both ways in turn; the median seconds of each."""
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    models = {"a": options.model_a, "b": options.model_b}
    count = 0
    for number in range(options.rounds):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            overlay = {"models": {"max_loaded_models": 1, "slot_cache": name == "with"}}
            with supervisor(models, server_of(options), overlay) as running:
                count, said = messages(running, tokens)
                found[name].append(one_round(running, said))
    medians = {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}
    return {
        "tokens": count,
        "back_s": {name: round(back, 3) for name, (_, back) in medians.items()},
        "away_s": {name: round(away, 3) for name, (away, _) in medians.items()},
        "rounds_s": {name: [[round(value, 3) for value in pair] for pair in times] for name, times in found.items()},
    }


def main() -> int:
    """Run the benchmark; 0 when coming back is faster with the cache, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("--model-a", type=model_file, required=True, help="GGUF file that has the conversation")
    options.add_argument("--model-b", type=model_file, required=True, help="GGUF file swapped in between")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tokens", type=int, nargs="+", default=[500, 2000])
    given = options.parse_args()
    if given.rounds < 1:
        raise BenchError("--rounds: at least 1")
    before = machine_state()
    for path in (given.model_a, given.model_b):
        warm_page_cache(path)
    results = []
    for tokens in given.tokens:
        one = measure(given, tokens)
        results.append(one)
        if not given.json:
            back, away = one["back_s"], one["away_s"]
            print(f"{one['tokens']} tokens, medians of {given.rounds} rounds:")
            print(f"  first byte on coming back: {back['with']} s with, {back['without']} s without")
            print(f"  first byte of the swap:    {away['with']} s with, {away['without']} s without", flush=True)
    if given.json:
        print(json.dumps({"benchmark": "slot_cache", "results": results, "machine": before}, indent=2))
    else:
        print_machine(before)
    return 0 if all(one["back_s"]["with"] < one["back_s"]["without"] for one in results) else 1


if __name__ == "__main__":
    run_main(main)
