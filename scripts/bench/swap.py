#!/usr/bin/env python3
"""How long does a request for B wait while A is loaded and idle and only one may run, compared with a raw start of B?

Raw: llama-server started by hand for B, /health polled every 5 ms, then the same request; it warms up and looks how
much fits into memory, as it does by default (--same-flags: as little as our child does).
Ours: the request for B, to a supervisor that must first stop A. Both files are on the page cache.
Target: first byte of our answer at most 150 ms after raw healthy, prompt processing included.
"""

from __future__ import annotations

import time

from common import (
    PAUSE,
    chat,
    first_byte,
    interleave,
    machine_state,
    model_file,
    parser,
    raw_start,
    report_starts,
    run_main,
    server_of,
    stock,
    supervisor,
    warm_page_cache,
)

TARGET = 0.150


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("--model-a", type=model_file, required=True, help="GGUF file swapped out")
    options.add_argument("--model-b", type=model_file, required=True, help="GGUF file swapped in")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--same-flags", action="store_true", help="start the raw server with our start-up flags too")
    given = options.parse_args()
    before = machine_state()
    for path in (given.model_a, given.model_b):
        warm_page_cache(path)
    models = {"a": given.model_a, "b": given.model_b}
    with supervisor(models, server_of(given), {"models": {"max_loaded_models": 1}}) as running:
        first_byte(running.connect(), chat("b"))
        command = running.child_command("b")
        command = command if given.same_flags else stock(command)
        running.unload("b")

        def ours() -> float:
            first_byte(running.connect(), chat("a"))
            time.sleep(PAUSE)
            try:
                return first_byte(running.connect(), chat("b"))
            finally:
                running.unload("b")

        rounds = interleave(lambda: raw_start(command, running.workspace.temp, chat("b")), ours, given.rounds)
    return report_starts("swap", rounds, TARGET, before, given.json)


if __name__ == "__main__":
    run_main(main)
