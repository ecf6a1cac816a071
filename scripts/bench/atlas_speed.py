#!/usr/bin/env python3
"""How fast are prompt and decode over a long history, with ATLAS in 1,024 cells and with full attention?

Through llama-server's own timings: a prompt of 2K, 8K, 32K tokens (more with --tokens), then answers of 64 tokens,
greedy, each of which goes on where the one before ended; full attention with a context that holds the longest. There
is a server for each length, and they answer in turn: a shared machine's speed changes by a tenth from minute to minute,
and what counts between two lengths is the median of the ratios of neighbouring answers. Also:
what ATLAS costs in % of the time of the prompt and of the answers, by part (from the `atlas` object beside `timings`),
archive bytes per token, and the peak of resident memory over what was resident after loading (with one small request
done).
Targets: ATLAS decodes at 32K with >= 0.85 of the speed at 2K; against full attention at 32K prefill >= 3 times and
decode >= 10 times as fast.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil
from atlas_common import CORPUS, TEXTS, Server, corpus, place, progress
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

from supervisor.models.gguf import read_header

FLAT, PREFILL, DECODE = 0.85, 3.0, 10.0

AGAIN = 32
"""Tokens that an answer may read before it begins; more would mean that the history was not in the slot."""

PARTS = ("score_ms", "write_ms", "slide_ms")


def main() -> int:
    """Run the benchmark; 0 when the targets are met, 1 when they are not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--base-server", type=Path, help="llama-server for full attention; default: --server")
    options.add_argument("--modes", nargs="*", default=["atlas", "full"], choices=["atlas", "full"])
    options.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192, 32768], help="131072 is possible")
    options.add_argument("--full-up-to", type=int, default=32768, help="longest prompt for full attention, tokens")
    options.add_argument("--cells", type=int, default=1024)
    options.add_argument("--decode", type=int, default=64, help="tokens of an answer")
    options.add_argument("--rounds", type=int, default=7, help="answers after a prompt, of which the middle one counts")
    options.add_argument("--threads", "-t", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--text", default="glossary", metavar="FILE[:OFFSET]")
    options.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the default texts")
    options.add_argument(
        "--atlas", default="", metavar="WORDS", help="more words for the memory, e.g. '--atlas-refresh 32'"
    )
    given = options.parse_args()
    before = machine_state()
    server = server_of(given)
    where = place(given.text, corpus(given.corpus) if given.text.partition(":")[0] in TEXTS else {})
    rows: list[Json] = []
    for mode in given.modes:
        lengths = [n for n in given.tokens if mode == "atlas" or n <= given.full_up_to]
        cells = given.cells if mode == "atlas" else max(lengths) + given.rounds * given.decode + 192
        words = ["-c", str(cells), "-t", str(given.threads), "-ub", "512"]
        if mode == "atlas":
            words += ["--atlas", *given.atlas.split()]
        elif cells > (header := read_header(given.model)).context_length:
            # llama-server holds a request to the context of the training
            words += ["--override-kv", f"{header.architecture}.context_length=int:{cells}"]
        binary = server if mode == "atlas" else (given.base_server or server)
        with ExitStack() as stack:
            histories = []
            for length in lengths:
                progress(f"{mode}, {length} tokens")
                running = stack.enter_context(Server(binary, given.model, words))
                histories.append(History(running, where, length))
            for number in range(given.rounds):
                progress(f"{mode}, answer {number + 1} of {given.rounds}")
                for history in histories:
                    history.answer(given.decode)
            rows += [{"mode": mode, "tokens": history.length} | history.row() for history in histories]
    progress("")
    figures = _figures(rows)
    return _report(rows, figures, before, given.model.name, given.json)


class History:
    """A server that has read a prompt, and answers."""

    def __init__(self, running: Server, where: str, length: int) -> None:
        path, _, offset = where.rpartition(":")
        text = Path(path or where).read_text(errors="replace")[int(offset) if path else 0 :]
        self.running, self.length = running, length
        self.tokens: list[int] = running.tokens(text[: length * 8])[:length]
        if len(self.tokens) < length:
            raise BenchError(f"{where} has only {len(self.tokens)} tokens, not {length}")
        self._complete(self.tokens[:64], 8)
        self.resident = int(psutil.Process(running.process.pid).memory_info().rss)
        self.last = self._complete(self.tokens, 1)
        self.reading = _times(self.last, {})
        self.rounds: list[dict[str, float]] = []

    def _complete(self, tokens: list[int], n: int, **more: bool) -> Json:
        body = {"prompt": tokens, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self.running.call("/completion", body | {"cache_prompt": False} | more)

    def answer(self, n: int) -> None:
        """Go on for n tokens; the history is in the slot, so that what is measured is the answer."""
        self.tokens, before = self.tokens + self.last["tokens"], self.last.get("atlas") or {}
        self.last = self._complete(self.tokens, n, cache_prompt=True)
        if (read := self.last["timings"]["prompt_n"]) > AGAIN:
            raise BenchError(f"{read} of {len(self.tokens)} tokens were read again before an answer")
        self.rounds.append(_times(self.last, before))

    def row(self) -> Json:
        """Return what was measured."""
        rounds, memory = self.rounds, self.last.get("atlas") or {}
        row: Json = {
            "prompt_per_second": self.reading["prompt_per_second"],
            "decode_per_second": median(times["predicted_per_second"] for times in rounds),
            "decode_rounds": [times["predicted_per_second"] for times in rounds],
            "resident_mib": self.resident / 2**20,
            "peak_over_resident_mib": (self.running.peak_bytes() - self.resident) / 2**20,
        }
        if memory:
            row["atlas"] = memory
            row["archive_bytes_per_token"] = memory["memory_bytes"] / max(1, memory["tokens_archived"])
            row["overhead_of_prompt"] = {part: self.reading[part] / self.reading["all_ms"] for part in PARTS}
            row["overhead_of_decode"] = {
                part: median(times[part] / times["all_ms"] for times in rounds) for part in PARTS
            }
        return row


def _times(answer: Json, before: Json) -> dict[str, float]:
    """Milliseconds and speeds of an answer; the memory sums up its parts as long as the history grows."""
    times, memory = answer["timings"], answer.get("atlas") or {}
    parts = {part: float(memory.get(part, 0)) - float(before.get(part, 0)) for part in PARTS}
    return {
        "all_ms": times["prompt_ms"] + times["predicted_ms"],
        "prompt_per_second": times["prompt_per_second"],
        "predicted_per_second": times["predicted_per_second"],
        **parts,
    }


def _figures(rows: list[Json]) -> Json:
    speed = {(row["mode"], row["tokens"]): row for row in rows}
    ours = sorted(tokens for mode, tokens in speed if mode == "atlas")
    figures: Json = {"met": {}}
    if len(ours) > 1 and 32768 in ours:
        pairs = zip(speed["atlas", 32768]["decode_rounds"], speed["atlas", ours[0]]["decode_rounds"], strict=True)
        ratios = [long / short for long, short in pairs]
        flat = median(ratios)
        figures["decode_32k_over_shortest_rounds"] = ratios
        figures["decode_32k_over_shortest"] = flat
        figures["met"]["flat"] = flat >= FLAT
    for tokens in ours:
        if full := speed.get(("full", tokens)):
            mine = speed["atlas", tokens]
            figures[f"prefill_over_full_{tokens}"] = mine["prompt_per_second"] / full["prompt_per_second"]
            figures[f"decode_over_full_{tokens}"] = mine["decode_per_second"] / full["decode_per_second"]
    if "prefill_over_full_32768" in figures:
        figures["met"]["prefill"] = figures["prefill_over_full_32768"] >= PREFILL
        figures["met"]["decode"] = figures["decode_over_full_32768"] >= DECODE
    return figures


def _report(rows: list[Json], figures: Json, before: Json, model: str, as_json: bool) -> int:
    met = all(figures["met"].values())
    if as_json:
        result = {"benchmark": "atlas speed", "model": model, "rows": rows, **figures}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 0 if met else 1
    print(f"{model}: tokens/s by tokens of history\n{'':16}{'prompt':>10}{'decode':>10}{'peak over resident':>22}")
    for row in rows:
        head = f"{row['mode']:6}{row['tokens']:>9} "
        print(
            f"{head}{row['prompt_per_second']:10.1f}{row['decode_per_second']:10.1f}"
            f"{row['peak_over_resident_mib']:18.0f} MiB"
        )
        if "overhead_of_decode" in row:
            for of in ("prompt", "decode"):
                parts = ", ".join(f"{part[:-3]} {value:.1%}" for part, value in row[f"overhead_of_{of}"].items())
                print(f"{'':16}of the time of {of}: {parts}")
            print(f"{'':16}archive: {row['archive_bytes_per_token'] / 1024:.1f} KiB per token")
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name.replace('_', ' ')}: {value:.2f}")
        elif isinstance(value, list):
            print(f"{name.replace('_', ' ')}: {' '.join(f'{ratio:.2f}' for ratio in value)}")
    print("targets: " + ", ".join(f"{name} {'met' if ok else 'MISSED'}" for name, ok in figures["met"].items()))
    print_machine(before)
    return 0 if met else 1


if __name__ == "__main__":
    run_main(main)
