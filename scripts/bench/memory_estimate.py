#!/usr/bin/env python3
"""How far is the estimate of a child's memory from the peak that it takes?

Each model runs with each context, reads a prompt of more than one batch and answers. Target: within 15 % of the peak.
"""

from __future__ import annotations

import json

from common import (
    Supervisor,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    supervisor,
    wait_for,
)

TARGET = 0.15
PROMPT = [1000 + number for number in range(600)]


def measure(running: Supervisor) -> tuple[int, int]:
    """Return the bytes that were predicted and the peak, after some work."""
    body = {"model": "m", "prompt": PROMPT, "n_predict": 4, "temperature": 0}
    running.call("POST", "/completion", body)
    running.call("POST", "/models/unload", {"model": "m"})
    wait_for(lambda: running.state("m") == "absent", 30, lambda: "the model does not stop")
    memory = next(one["memory"] for one in running.call("GET", "/v1/models")["data"] if one["id"] == "m")
    return memory["predicted"], memory["measured"]


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=model_file, help="GGUF files")
    options.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    options.add_argument("--args", nargs="*", default=[], help="more flags for llama-server, as `--args=-ctk` `q8_0`")
    given = options.parse_args()
    machine, rows = machine_state(), []
    for path in given.models:
        for context in given.contexts:
            own = {"models": {"overrides": {"m": {"context_size": context, "args": given.args}}}}
            with supervisor({"m": path}, server_of(given), own) as running:
                predicted, measured = measure(running)
            rows.append({"model": path.name, "context": context, "predicted": predicted, "measured": measured})
    met = all(abs(row["predicted"] / row["measured"] - 1) <= TARGET for row in rows)
    if given.json:
        print(json.dumps({"machine": machine, "rows": rows, "met": met}))
        return 0 if met else 1
    for row in rows:
        error = row["predicted"] / row["measured"] - 1
        sizes = f"{row['predicted'] / 2**20:8.1f}{row['measured'] / 2**20:8.1f} MiB"
        print(f"{row['model'][:40]:40} {row['context']:6} {sizes} {error:+7.1%}")
    print(f"target: within {TARGET:.0%}: {'met' if met else 'MISSED'}")
    print_machine(machine)
    return 0 if met else 1


if __name__ == "__main__":
    run_main(main)
