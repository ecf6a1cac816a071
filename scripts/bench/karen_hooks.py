#!/usr/bin/env python3
"""How long do both hooks of KAREN's extension take in a turn in which the local model is not asked?

The extension as KAREN loads it, in this process, before a supervisor of its own: up, with the policies `off` and
`fallback` and a remote model that answers; then down, with one that failed. The supervisor is looked for as by default.
Targets for the median of both hooks together: 5 ms while it is up, 2 ms while it is down, after the first look.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

from common import REPOSITORY, Json, machine_state, model_file, parser, run_main, server_of, supervisor

UP, DOWN = 5.0, 2.0
HOOKS = ("pre_llm_prompt", "post_llm_result")


def extension(url: str, policy: str) -> Any:
    """Return the extension as KAREN loads it."""
    folder = REPOSITORY / "karen_ext"
    spec = importlib.util.spec_from_file_location("karen_handler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    manifest = SimpleNamespace(**json.loads((folder / "extension_manifest.json").read_text()))
    return module.LlamaSupervisorExtension(manifest, {"url": url, "policy": policy})


async def turns(url: str, policy: str, remote: str, count: int, pause: float) -> list[float]:
    """Return the milliseconds of both hooks in each of `count` turns, in the order that they came."""
    one = extension(url, policy)
    await one.initialize()
    took = []
    for _ in range(count):
        data = {"prompt": "Say hello.", "result": remote}
        began = time.perf_counter()
        for hook in HOOKS:
            context = SimpleNamespace(data=data, user_context={"user_id": "ada"})
            result = await one.execute_hook(SimpleNamespace(value=hook), context)
            assert not result["local_inference_used"]
        took.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(pause)
    await one.shutdown()
    return took


def figures(took: list[float], target: float) -> Json:
    """Return the median, the 99th percentile and the largest, in milliseconds."""
    ordered = sorted(took)
    p50 = statistics.median(ordered)
    p99 = ordered[int(len(ordered) * 0.99)]
    return {"p50": round(p50, 4), "p99": round(p99, 4), "max": round(ordered[-1], 4), "met": p50 < target}


def main() -> int:
    """Run the benchmark; 0 when the targets are met, 1 when they are not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file that is there; it is not loaded")
    options.add_argument("--turns", type=int, default=1000)
    options.add_argument("--pause", type=float, default=0.02, help="seconds between two turns, so that looks expire")
    given = options.parse_args()
    before = machine_state()
    found = {}
    with supervisor({"small": given.model}, server_of(given)) as running:
        for policy in ("off", "fallback"):
            took = asyncio.run(turns(running.url, policy, "The remote says so.", given.turns, given.pause))
            found[f"up, {policy}"] = figures(took, UP)
        url = running.url
    took = asyncio.run(turns(url, "fallback", "", given.turns, given.pause))
    found["down, fallback"] = figures(took[1:], DOWN)
    if given.json:
        print(json.dumps({"benchmark": "karen_hooks", "machine": before, "milliseconds": found}, indent=2))
    else:
        for name, one in found.items():
            print(f"{name:16} p50 {one['p50']:.3f} ms  p99 {one['p99']:.3f} ms  max {one['max']:.3f} ms")
    return 0 if all(one["met"] for one in found.values()) else 1


if __name__ == "__main__":
    run_main(main)
