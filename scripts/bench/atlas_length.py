#!/usr/bin/env python3
"""Does ATLAS still read well after a long text?

Teacher-forced, through llama-atlas-eval, one text of 4K, 16K and 32K tokens in a context of 1,024 cells: mean NLL of
the last 2,048 tokens with the window only, with ATLAS, and with full attention where the model was trained on that
length. With --aligned all lengths end at the same place of the text, so that the last 2,048 tokens are the same.
Target: with ATLAS, 32K is at most 0.02 above 4K on the same end, and never above the window by more than 0.003.
"""

from __future__ import annotations

import json
from pathlib import Path

from atlas_common import Server, add_tool, corpus, evaluate, place, tool_of
from common import Json, machine_state, model_file, parser, print_machine, run_main, server_of

RISE, WORSE = 0.02, 0.003

END = 2048
"""The last tokens, which are scored one by one; those before them are read as a prompt."""


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    add_tool(options)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--text", default="perlfunc:0", metavar="FILE[:OFFSET]")
    options.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384, 32768])
    options.add_argument("--cells", type=int, default=1024)
    options.add_argument("--full-up-to", type=int, default=8192, help="longest text for full attention, tokens")
    options.add_argument("--aligned", action="store_true", help="start later in the text for the shorter lengths")
    given = options.parse_args()
    before = machine_state()
    server = server_of(given)
    tool = tool_of(given, server)
    where = place(given.text, corpus(given.corpus) if ":" not in given.text or "/" not in given.text else {})
    starts = dict.fromkeys(given.tokens, int(where.rpartition(":")[2]))
    if given.aligned:
        path, _, offset = where.rpartition(":")
        text = Path(path).read_text(encoding="utf-8")[int(offset) :]
        with Server(server, given.model, ["-c", "512"]) as running:
            starts = _starts(running, text, given.tokens, int(offset))
    rows: list[Json] = []
    for tokens in given.tokens:
        modes = ["window", "atlas", *(["full"] if tokens <= given.full_up_to else [])]
        words = ["-c", str(given.cells), "-n", str(tokens), "--skip", str(tokens - END), "--modes", ",".join(modes)]
        words += ["--text", f"{where.rpartition(':')[0]}:{starts[tokens]}"]
        words += ["-t", str(given.threads)] if given.threads else []
        for result in evaluate(tool, given.model, words, f"{tokens} tokens, "):
            kept = {key: result[key] for key in ("mode", "n_tokens", "nll", "tail_nll", "seconds")}
            rows.append({"tokens": tokens, "start": starts[tokens], **kept, "stats": result.get("stats")})
    tail = {(row["tokens"], row["mode"]): float(row["tail_nll"]) for row in rows}
    first, last = min(given.tokens), max(given.tokens)
    rise = tail[last, "atlas"] - tail[first, "atlas"]
    worse = max(tail[tokens, "atlas"] - tail[tokens, "window"] for tokens in given.tokens)
    # on different ends the texts differ, and a rise says nothing
    met = worse <= WORSE and (rise <= RISE or not given.aligned)
    if given.json:
        result = {"benchmark": "atlas length", "model": given.model.name, "text": where, "rows": rows}
        result |= {"aligned": given.aligned, "rise": rise, "worst_against_window": worse, "met": met}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 0 if met else 1
    print(f"NLL of the last {END} tokens, {given.model.name}, {given.cells} cells")
    for row in rows:
        print(f"  {row['tokens']:>7} tokens  {row['mode']:8}{row['tail_nll']:9.4f}  ({row['seconds']:.0f} s)")
    print(f"atlas, {last} over {first} tokens: {rise:+.4f}" + ("" if given.aligned else " (another end of the text)"))
    print(f"atlas over window, at worst: {worse:+.4f}; target {'met' if met else 'MISSED'}")
    print_machine(before)
    return 0 if met else 1


def _starts(running: Server, text: str, lengths: list[int], offset: int) -> dict[int, int]:
    """Return the character offsets from which the texts of these lengths (tokens) end at one place."""
    longest = max(lengths)
    pieces = running.call("/tokenize", {"content": text[: longest * 8], "add_special": False, "with_pieces": True})
    sizes = [
        len(piece.encode()) if isinstance(piece := token["piece"], str) else len(piece) for token in pieces["tokens"]
    ]
    found = {}
    for length in lengths:
        skipped = text.encode()[: sum(sizes[: longest - length])].decode("utf-8", "ignore")
        found[length] = offset + len(skipped)
    return found


if __name__ == "__main__":
    run_main(main)
