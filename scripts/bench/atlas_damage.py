#!/usr/bin/env python3
"""What do the server and `atlas verify` make of a memory file that is damaged, or made to harm?

A session of a few hundred tokens is saved; then each mutant of its file is loaded by the running server
(`POST /v1/atlas/memory/load`), looked into (`.../info`) and verified by Python: the file cut at every 1/200, 2,000 bits
flipped, wrong magic, version, sizes, model, and a seeded fuzzer over the header's text, its values, the table and the
content of the frames, which makes the checksums right so that it gets past them, and files that claim to be large.
Demanded: 400 with "corruption" or 409 where the mutant is surely wrong, and never 200 for what Python refuses; the same
process all the time, whose memory grows by no more than the file (or the good file's content) has, and 32 MiB; after a
load that works, and between, the server answers as before. There are no backups. With `--server` a build with
sanitizers (its memory: `--no-memory`); what they write fails the mutant. `--keep` keeps the files that failed.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from atlas_common import steps
from atlas_mutants import KINDS, MISMATCH, Mutant, split
from atlas_server import Gone, MemoryServer, tiny_model, workplace
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

SLACK = 32 << 20
"""Bytes by which the server may grow beside the file: frames at work, stacks of threads, what the allocator keeps."""

COUNTS = {
    "truncation": 200, "flip": 2000, "front": 0, "model": 0, "header text": 300, "header values": 800,
    "frame table": 300, "frame content": 800, "bomb": 0, "generation": 500,
}  # fmt: skip
"""How many mutants of each kind; those of 0 are as many as there are."""

BETWEEN = 100
"""Mutants after which the good file is loaded and must give the same tokens as at first."""

PROMPT = "The quick brown fox jumps over the lazy dog. "


@dataclass
class Tried:
    """What came of one mutant."""

    kind: str
    name: str
    bytes: int
    status: int = 0
    message: str = ""
    verified: bool = False
    grown: int = 0  # bytes, from before the load to the peak
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Target:
    """The server under test, started again when it dies, and what it makes of the good file."""

    def __init__(self, binary: Path, model: Path, folder: Path, words: list[str], tokens: int, memory: bool) -> None:
        self.binary, self.model, self.folder, self.words, self.memory = binary, model, folder, words, memory
        self.bad = folder / "memory" / "bad.atlas"
        self.start()
        prompt = PROMPT * (4 * tokens // len(PROMPT) + 1)
        first = self.running.want(self.running.ask("POST", "/tokenize", {"content": prompt, "add_special": True}))
        read = self.running.complete(first["tokens"][:tokens], 1, memory_file="good")
        if not self.running.want(read)["atlas"]["tokens_archived"]:
            raise BenchError("the session has no archive: more --tokens are needed")
        self.good = (folder / "memory" / "good.atlas").read_bytes()
        self.raw = sum(frame["raw"] for frame in split(self.good)[0]["frames"])
        self.reference = self.continued()

    def start(self) -> None:
        """Start the server."""
        self.running = MemoryServer(self.binary, self.model, self.folder, *self.words)
        self.running.until_healthy()

    def continued(self) -> list[int]:
        """Load the good file and return the next tokens. Raises `BenchError` when that does not work."""
        self.running.want(self.running.ask("POST", "/v1/atlas/memory/load", {"filename": "good"}))
        answer = self.running.complete(PROMPT, 8, memory_file="good", append=True, save_memory=False)
        tokens = list(self.running.want(answer)["tokens"])
        self.running.want(self.running.ask("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"}))
        return tokens

    def attempt(self, mutant: Mutant) -> Tried:
        """Have the server and Python read a mutant."""
        tried = Tried(mutant.kind, mutant.name, len(mutant.data))
        self.bad.write_bytes(mutant.data)
        tried.verified = _verify(self.bad, tried)
        try:
            self._load(mutant, tried)
        except Gone as error:
            tried.failures.append(self._died(error))
        tried.failures += self.running.complaints()
        return tried

    def _load(self, mutant: Mutant, tried: Tried) -> None:
        running = self.running
        running.forget_peak()
        before, began = running.rss(), time.perf_counter()
        tried.status, answer = running.ask("POST", "/v1/atlas/memory/load", {"filename": "bad"}, timeout=60)
        tried.seconds = time.perf_counter() - began
        tried.grown = max(0, running.peak() - before)
        allowed = max(len(mutant.data), self.raw) + SLACK
        if self.memory and tried.grown > allowed:
            tried.failures.append(f"the server grew by {tried.grown} bytes, {allowed} are allowed")
        tried.message = str(answer.get("error", {}).get("message", ""))
        if tried.status not in mutant.expected:
            tried.failures.append(f"answered with {tried.status}, not {mutant.expected}: {tried.message}")
        older = "backup" in answer  # what is damaged is behind what was loaded
        if tried.status == 200 and not tried.verified and not older:
            tried.failures.append("the server takes what Python refuses")
        if tried.status == 400 and "corruption" not in tried.message:
            tried.failures.append(f"no corruption: {tried.message}")
        if tried.status == MISMATCH and not tried.message:
            tried.failures.append("no reason")

        status, answer = running.ask("GET", "/v1/atlas/memory/info?file=bad", timeout=60)
        if status != 200:
            tried.failures.append(f"info: {status} {json.dumps(answer)[:200]}")
        elif tried.status == 200 and not answer["compatible"] and not older:
            tried.failures.append(f"it loads, but info says: {answer.get('reason')}")
        if tried.status == 200:  # harmless, it seems: the session has to go on
            for tokens in (3, 40):
                status, answer = running.complete(PROMPT * (tokens // 10), tokens, memory_file="bad", save_memory=False)
                if status != 200:
                    tried.failures.append(f"it loads, but cannot be continued: {status} {json.dumps(answer)[:200]}")
        status, answer = running.ask("DELETE", "/v1/atlas/memory?file=bad")
        if status != 200:
            tried.failures.append(f"cannot be deleted: {status} {json.dumps(answer)[:200]}")

    def _died(self, error: Gone) -> str:
        try:
            code = self.running.process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
            self.running.kill()
        tail = "\n".join([*self.running.complaints(), self.running.tail(12)])
        self.start()
        return f"{error}; exit code {code}\n{tail}"

    def check(self) -> list[str]:
        """Return what is wrong with the server between mutants."""
        try:
            tokens = self.continued()
        except BenchError as error:
            return [f"the good file does not load: {error}"]
        return [] if tokens == self.reference else [f"the good file gives {tokens}, not {self.reference}"]


def _verify(path: Path, tried: Tried) -> bool:
    from supervisor import atlas_file

    try:
        atlas_file.read(path).verify()
    except atlas_file.CorruptMemory:
        return False
    except Exception as error:
        tried.failures.append(f"Python: {error!r}")
        return False
    return True


def attempt_all(target: Target, mutants: list[Mutant], keep: Path | None = None, most: int = 20) -> list[Tried]:
    """Try mutants; after `most` failures of a kind its others are left out."""
    done: list[Tried] = []
    failed: Counter[str] = Counter()
    for number, mutant in enumerate(steps(mutants, "mutants"), 1):
        if failed[mutant.kind] >= most:
            continue
        tried = target.attempt(mutant)
        if number % BETWEEN == 0 or tried.failures or number == len(mutants):
            tried.failures += target.check()
        done.append(tried)
        if tried.failures:
            failed[mutant.kind] += 1
            if keep is not None:
                name = re.sub(r"[^A-Za-z0-9]+", "-", f"{mutant.kind} {number} {mutant.name}")[:80]
                (keep / f"{name}.atlas").write_bytes(mutant.data)
    return done


def mutants_of(good: bytes, counts: dict[str, int], seed: int) -> list[Mutant]:
    """Return the mutants of all kinds named in `counts`; each kind has random numbers of its own."""
    return [
        mutant for kind, count in counts.items() for mutant in KINDS[kind](good, count, random.Random(f"{seed} {kind}"))
    ]


def main() -> int:
    """Try all mutants; 0 when none did harm, 1 otherwise."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, help="GGUF file; default: a tiny one with random weights")
    options.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--scale", type=float, default=1.0, help="share of the mutants of each kind")
    options.add_argument("--tokens", type=int, default=400, help="tokens of the session")
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--no-memory", action="store_true", help="do not look at the server's memory")
    options.add_argument("--keep", type=Path, help="folder for the files that failed")
    given = options.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    counts = {kind: max(1, round(COUNTS[kind] * given.scale)) for kind in given.kinds}
    words = ["-c", str(given.context), "-np", "1", "-t", "1", "--atlas-memory-backup-count", "0"]
    before, began = machine_state(), time.monotonic()
    with workplace() as folder:
        model = given.model or tiny_model(folder)
        target = Target(server_of(given), model, folder, words, given.tokens, not given.no_memory)
        try:
            tried = attempt_all(target, mutants_of(target.good, counts, given.seed), given.keep)
            size, raw = len(target.good), target.raw
        finally:
            target.running.kill()
    failed = [one for one in tried if one.failures]
    seconds = round(time.monotonic() - began, 1)
    if given.json:
        rows = [asdict(one) for one in tried]
        result: Json = {"benchmark": "atlas damage", "seed": given.seed, "file": {"bytes": size, "raw": raw}}
        result |= {"mutants": rows, "failed": len(failed), "seconds": seconds}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if failed else 0
    _print_table(tried)
    for one in failed[:40]:
        print(f"\n{one.kind}: {one.name} ({one.bytes} bytes)")
        print("\n".join(f"  {failure}" for failure in one.failures))
    print(f"\n{len(tried)} mutants of a file of {size} bytes, seed {given.seed}, {seconds:.0f} s: {len(failed)} failed")
    print_machine(before)
    return 1 if failed else 0


def _print_table(tried: list[Tried]) -> None:
    heads = f"{'kind':14} {'mutants':>8} {'400':>6} {'409':>6} {'200':>6} {'verified':>9}"
    print(f"{heads} {'grown MiB':>10} {'longest':>10} {'failed':>7}")
    for kind in dict.fromkeys(one.kind for one in tried):
        these = [one for one in tried if one.kind == kind]
        codes = Counter(one.status for one in these)
        numbers = f"{len(these):>8} {codes[400]:>6} {codes[409]:>6} {codes[200]:>6} {sum(o.verified for o in these):>9}"
        grown, longest = max(one.grown for one in these) / 2**20, 1000 * max(one.seconds for one in these)
        failed = sum(bool(one.failures) for one in these)
        print(f"{kind:14} {numbers} {grown:>10.1f} {longest:>7.1f} ms {failed:>7}")


if __name__ == "__main__":
    run_main(main)
