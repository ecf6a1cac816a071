#!/usr/bin/env python3
"""How long does the first request wait for a model that is not loaded, compared with a raw llama-server?

Raw: llama-server started by hand, /health polled every 5 ms until it says 200, then the same first request; it warms
up and looks how much fits into memory, as it does by default (--same-flags: as little as our child does).
Ours: the request, to a supervisor that has not loaded the model. The file is on the page cache.
Target: first byte of our answer at most 100 ms after raw healthy, prompt processing included.
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

TARGET = 0.100


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--same-flags", action="store_true", help="start the raw server with our start-up flags too")
    given = options.parse_args()
    before = machine_state()
    warm_page_cache(given.model)
    request = chat("m")
    with supervisor({"m": given.model}, server_of(given)) as running:
        first_byte(running.connect(), request)
        command = running.child_command("m")
        command = command if given.same_flags else stock(command)
        running.unload("m")

        def ours() -> float:
            time.sleep(PAUSE)
            try:
                return first_byte(running.connect(), request)
            finally:
                running.unload("m")

        rounds = interleave(lambda: raw_start(command, running.workspace.temp, request), ours, given.rounds)
    return report_starts("cold start", rounds, TARGET, before, given.json)


if __name__ == "__main__":
    run_main(main)
