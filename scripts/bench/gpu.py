#!/usr/bin/env python3
"""Does ATLAS on a GPU give what it gives on the CPU, and is the memory of a GPU foretold and measured rightly?

`same`: mean NLL by llama-atlas-eval, all layers on the GPU and none, with the same refresh: full attention, window only
and ATLAS, F16 and Q8_0 cache, with and without flash attention, one and three sequences. `files`: a session read on
the GPU, saved, and loaded by a fresh server on the GPU, which must go on with the same 64 tokens, and by one on the
CPU (how many of the 64 are the same is told). `memory`: the supervisor's estimate of a child's memory on the GPU beside
what NVML shows (with the package nvidia-ml-py). Needs a server built with `llama-supervisor build --backend cuda`.
Targets: NLL within 0.01; the same 64 tokens; within 15 %.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from atlas_common import add_tool, corpus, evaluate, place, progress, steps, tool_of
from atlas_server import MemoryServer, workplace
from common import (
    BenchError,
    Json,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    supervisor,
    wait_for,
)

NLL, MEMORY = 0.01, 0.15
KINDS = ("-ctk f16 -ctv f16 -fa on", "-ctk f16 -ctv f16 -fa off", "-ctk q8_0 -ctv q8_0 -fa on", "-np 3")
DECODED = 64


def main() -> int:
    """Run the benchmark; 0 when the targets are met, 1 when they are not."""
    options = parser(__doc__)
    add_tool(options)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--parts", nargs="*", default=["same", "files", "memory"], choices=["same", "files", "memory"])
    options.add_argument("--texts", nargs="*", default=["perlvar", "history"], metavar="FILE[:OFFSET]")
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--cells", type=int, default=512)
    options.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192], help="for the part `memory`")
    given = options.parse_args()
    before, server = machine_state(), server_of(given)
    found: Json = {}
    if {"same", "files"} & set(given.parts):
        files = corpus(given.corpus)
        texts = [place(text, files) for text in given.texts]
    if "same" in given.parts:
        found["same"] = _same(tool_of(given, server), given.model, texts, given.cells, given.tokens, given.threads)
    if "files" in given.parts:
        found["files"] = _files(server, given.model, texts[0], given.cells)
    if "memory" in given.parts:
        found["memory"] = [_memory(server, given.model, context) for context in given.contexts]
    met = _met(found)
    if given.json:
        print(json.dumps({"model": given.model.name, **found, "met": met, "machine": before}, indent=1))
    else:
        _report(found, met, given.model.name)
        print_machine(before)
    return 0 if met and all(met.values()) else 1


@contextlib.contextmanager
def _only(side: str) -> Iterator[None]:
    """Hide the GPUs from programs that start meanwhile, unless `side` is `gpu`: with no layers, they still help."""
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if side == "cpu":
        os.environ[name] = "-1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _same(tool: Path, model: Path, texts: list[str], cells: int, tokens: int, threads: int) -> list[Json]:
    common = f"-c {cells} -n {tokens} --modes full,window,atlas --atlas-refresh 4 --scored-chunk 4".split()
    common += [word for text in texts for word in ("--text", text)]
    common += ["-t", str(threads)] if threads else []
    rows = []
    for kind in steps(list(KINDS), "NLL on GPU and CPU"):
        sides = {}
        for side in ("gpu", "cpu"):
            with _only(side):
                sides[side] = evaluate(tool, model, [*common, *kind.split()], f"{side} {kind} ")
        for gpu, cpu in zip(sides["gpu"], sides["cpu"], strict=True):
            if (gpu["test"], gpu["mode"]) != (cpu["test"], cpu["mode"]):
                raise BenchError(f"{gpu['test']} {gpu['mode']} beside {cpu['test']} {cpu['mode']}")
            rows.append({"kind": kind, "test": gpu["test"], "mode": gpu["mode"], "gpu": gpu["nll"], "cpu": cpu["nll"]})
    return rows


def _files(server: Path, model: Path, text: str, cells: int) -> Json:
    path, _, offset = text.rpartition(":")
    words = ["-c", str(cells), "-np", "1"]
    session: Json = {"memory_file": "book", "save_memory": False}
    answers: dict[str, list[int]] = {}
    with workplace() as folder:
        progress("a session on the GPU")
        with MemoryServer(server, model, folder, *words) as running:
            tokens = running.tokens(Path(path).read_text(errors="replace")[int(offset) :][: cells * 24])[: cells * 4]
            going_on = (tokens[-8:], DECODED)
            running.want(running.complete(tokens[:-8], 1, memory_file="book"))
            answers["unsaved"] = running.want(running.complete(*going_on, **session))["tokens"]
            running.kill()  # so that nothing is saved again
        for side in ("gpu", "cpu"):
            progress(f"the session loaded on the {side.upper()}")
            with _only(side), MemoryServer(server, model, folder, *words) as running:
                answer = running.want(running.complete(*going_on, **session))
                answers[side] = answer["tokens"]
                read = answer["timings"]["prompt_n"]
                if read > cells:
                    raise BenchError(f"the session was not found in the file: {read} tokens were read on the {side}")
                running.kill()
    progress("")
    return {side: _agree(answers["unsaved"], answers[side]) for side in ("gpu", "cpu")}


def _agree(one: list[int], other: list[int]) -> int:
    """Return how many tokens are the same until the first that differs."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _memory(server: Path, model: Path, context: int) -> Json:
    own = {"models": {"overrides": {"m": {"context_size": context}}}}
    with supervisor({"m": model}, server, own) as running:

        def told() -> Json:
            models = running.call("GET", "/api/v1/status")["models"]
            return dict(next(one for one in models if one["id"] == "m")["memory"])

        running.call("POST", "/completion", {"model": "m", "prompt": "A word. " * 200, "n_predict": 4})
        wait_for(lambda: told()["measured_bytes"], 10, lambda: "the child's memory is not measured")
        memory = told()
    return {"context": context, "predicted": memory["predicted_bytes"], "measured": memory["measured_bytes"]}


def _met(found: Json) -> dict[str, bool]:
    met = {}
    if "same" in found:
        met["same"] = all(abs(row["gpu"] - row["cpu"]) <= NLL for row in found["same"])
    if "files" in found:
        met["files"] = found["files"]["gpu"] == DECODED
    if "memory" in found:
        met["memory"] = all(
            pool in row["measured"] and abs(row["predicted"][pool] / row["measured"][pool] - 1) <= MEMORY
            for row in found["memory"]
            for pool in row["predicted"]
            if pool.startswith("gpu")
        ) and all("gpu0" in row["predicted"] for row in found["memory"])
    return met


def _report(found: Json, met: dict[str, bool], model: str) -> None:
    print(model)
    for row in found.get("same", []):
        difference = row["gpu"] - row["cpu"]
        print(
            f"{row['kind']:28}{row['test'][:24]:25}{row['mode']:8}{row['gpu']:9.4f}{row['cpu']:9.4f}{difference:+9.4f}"
        )
    if "files" in found:
        print(
            f"the same tokens of {DECODED} after a round trip: GPU {found['files']['gpu']}, CPU {found['files']['cpu']}"
        )
    for row in found.get("memory", []):
        for pool, predicted in row["predicted"].items():
            measured = row["measured"].get(pool, 0)
            error = f"{predicted / measured - 1:+.1%}" if measured else "not measured"
            print(f"context {row['context']:6} {pool:5}{predicted / 2**20:9.1f}{measured / 2**20:9.1f} MiB  {error}")
    print("targets: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in met.items()))


if __name__ == "__main__":
    run_main(main)
