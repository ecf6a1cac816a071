#!/usr/bin/env python3
"""Fifty clients with a session each over eight slots, through the supervisor: is anything lost, does anything leak?

For --minutes, every client appends turns to its session (some as streams, some saved later, some cut by the client),
saves it, loads it, begins it again; some clients ask without a session. Every turn names the client's code word. A
client knows its session token by token, so that it is sure what the file must hold: after the end, when the supervisor
has stopped, each file is compared with that, and searched for the code words of others, as is every answer.
Demanded: no answer is lost (200, or a documented 409, 429 or 503 that a retry heals), every session is exactly what its
client sent and got, and no code word is anywhere else. Reported: latencies, and over time the child's memory and the
files' size (`--plot FILE.png`). At the end some dialogues are asked again by one client alone; how many give the same
tokens is only reported, as sums differ with what else is in a batch.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from atlas_common import progress
from atlas_server import saved_tokens
from common import (
    REPOSITORY,
    BenchError,
    Json,
    Supervisor,
    Workspace,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    wait_for,
)

ACTIONS = {"turn": 60, "stream": 20, "later": 10, "cut": 4, "save": 8, "load": 4, "again": 2}
"""How often a client does what: a turn, as a stream, not saved at once, cut off, saved, loaded, begun again."""

HEALED = (409, 429, 503)
PATIENCE = 300.0
"""Seconds after which a request that is refused again and again is lost."""

LONG = 900
"""Tokens after which a session is begun again."""


@dataclass
class Shared:
    """What the clients have in common."""

    running: Supervisor
    model: str
    filler: list[int]
    until: float
    actions: int = 0  # of each client, 0: any number
    words: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, what: str) -> None:
        """Note what must not happen."""
        with self.lock:
            self.failures.append(what)

    def ask(self, kind: str, method: str, path: str, body: Json, *, cut: bool = False) -> Json:
        """Make a request until it is answered; a stream's events come as one answer.

        Raises `BenchError` when it is lost. With `cut` the connection is closed after the first event.
        """
        began = time.monotonic()
        while True:
            sent = time.monotonic()
            status, answer = self._once(method, path, body, cut)
            with self.lock:
                self.codes[f"{kind} {status}"] += 1
                if status == 200:
                    self.seconds.setdefault(kind, []).append(time.monotonic() - sent)
            if status == 200:
                return answer
            if status not in HEALED or time.monotonic() - began > PATIENCE:
                raise BenchError(f"{kind}: {status} {json.dumps(answer)[:300]}")
            time.sleep(0.2)

    def _once(self, method: str, path: str, body: Json, cut: bool) -> tuple[int, Json]:
        try:
            with contextlib.closing(self.running.connect(timeout=600)) as connection:
                connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                if answer.status != 200 or not body.get("stream"):
                    return answer.status, json.loads(answer.read())
                return 200, _events(answer, cut)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BenchError(f"{method} {path}: {error!r}") from error


def _events(answer: http.client.HTTPResponse, cut: bool) -> Json:
    whole: Json = {"content": "", "tokens": []}
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise BenchError(f"a stream ended with {event}")
        whole["content"] += event["content"]
        whole["tokens"] += event.get("tokens", [])
        if event.get("stop"):
            return whole | {"atlas": event["atlas"], "tokens_predicted": event["tokens_predicted"]}
        if cut:
            return whole
    raise BenchError(f"a stream was not whole: {whole}")


class Client(threading.Thread):
    """A client with a session, whose tokens it knows, or (with `plain`) without one."""

    def __init__(self, shared: Shared, number: int, seed: int, plain: bool) -> None:
        super().__init__(daemon=True)
        self.shared, self.plain, self.rng = shared, plain, random.Random(f"{seed} {number}")
        self.session = f"client{number}"
        self.word = f"{self.rng.choice(['kiwi', 'onyx', 'fjord', 'zebu'])}{number:02}-{self.rng.randrange(10**6):06}"
        shared.words[self.session] = self.word
        self.said = self._tokenized(f"\nThe code word of my diary is {self.word}. ")
        self.expected: list[int] = []
        self.last: int | None = None
        self.exact = True  # false: what was generated is not known; the session begins again before the next turn
        self.dialogue: list[tuple[list[int], int, list[int]]] = []  # prompt, tokens asked for, tokens generated
        self.acted = self.turns = 0

    def _tokenized(self, text: str) -> list[int]:
        body = {"model": self.shared.model, "content": text, "add_special": False}
        return list(self.shared.running.call("POST", "/tokenize", body)["tokens"])

    def run(self) -> None:
        """Do this and that until the time is up."""
        try:
            while time.monotonic() < self.shared.until and self.acted < (self.shared.actions or self.acted + 1):
                self.acted += 1
                if self.plain:
                    self._ask_plainly()
                    continue
                action = self.rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                if action == "save" and self.expected:
                    self._file("save")
                elif action == "load" and self.expected and self.exact:
                    self._file("save")
                    self._file("load")
                elif action not in ("save", "load"):
                    self._turn(action)
        except BenchError as error:
            self.shared.fail(f"{self.session}: {error}")

    def _ask_plainly(self) -> None:
        body = {"prompt": self._prompt(), "n_predict": 8, "model": self.shared.model, "temperature": 0}
        self._search(self.shared.ask("plain", "POST", "/completion", body)["content"])
        self.turns += 1

    def _prompt(self) -> list[int]:
        at, count = self.rng.randrange(len(self.shared.filler) - 200), self.rng.randrange(5, 60)
        return self.said + self.shared.filler[at : at + count] + self.said

    def _turn(self, action: str) -> None:
        prompt, count = self._prompt(), self.rng.randrange(4, 24)
        begin = action == "again" or not self.exact or len(self.expected) > LONG
        atlas = {"memory_file": self.session, "append": True, "reset": "hard" if begin else "none"}
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        body |= {"model": self.shared.model, "stream": action in ("stream", "cut")}
        body |= {"atlas": atlas | {"save_memory": action != "later"}}
        if begin:
            self.expected, self.last, self.dialogue = [], None, []
        self.expected = self.expected + ([] if self.last is None else [self.last]) + prompt
        self.exact = False  # unless the answer comes whole
        answer = self.shared.ask(action, "POST", "/completion", body, cut=action == "cut")
        self.turns += 1
        self._search(answer["content"])
        if action == "cut":
            return
        atlas, tokens = answer["atlas"], answer["tokens"]
        if "error" in (atlas.get("saved") or {}):
            self.shared.fail(f"{self.session} was not saved: {atlas['saved']}")
        if len(tokens) == answer["tokens_predicted"]:  # a stream leaves out what ends within a character
            self.expected, self.last, self.exact = self.expected + tokens[:-1], tokens[-1], True
            self.dialogue.append((prompt, count, tokens))
        elif action != "stream":
            self.shared.fail(f"{self.session}: {len(tokens)} of {answer['tokens_predicted']} tokens")
        if self.exact and atlas["tokens_seen"] != len(self.expected):
            self.shared.fail(f"{self.session} has {atlas['tokens_seen']} tokens instead of {len(self.expected)}")

    def _file(self, what: str) -> None:
        body = {"model": self.shared.model, "filename": self.session}
        answer = self.shared.ask(what, "POST", f"/v1/atlas/memory/{what}", body)
        if self.exact and answer["n_tokens"] != len(self.expected):
            self.shared.fail(f"{self.session}: {what} of {answer['n_tokens']} tokens, not {len(self.expected)}")

    def _search(self, text: str) -> None:
        for session, word in self.shared.words.items():
            if session != self.session and word in text:
                self.shared.fail(f"{self.session} was told the code word of {session}: {text!r}")

    def check(self, path: Path, text: str) -> list[str]:
        """Return what is wrong with the session's file, whose tokens are `text`, after everything has stopped."""
        if not self.expected:
            return []
        tokens, _ = saved_tokens(path)
        wrong = [
            f"{path.name} has the code word of {session}"
            for session, word in self.shared.words.items()
            if session != self.session and word in text
        ]
        if self.exact and tokens != self.expected:
            same = next(
                (n for n, pair in enumerate(zip(tokens, self.expected, strict=False)) if pair[0] != pair[1]), -1
            )
            wrong.append(
                f"{path.name} has {len(tokens)} tokens, not {len(self.expected)}; the first other one is {same}"
            )
        if not self.exact and tokens[: len(self.expected)] != self.expected:
            wrong.append(f"{path.name} does not begin as its client's session")
        return wrong


@contextlib.contextmanager
def watched(workspace: Workspace, seconds: float, samples: list[Json]) -> Iterator[None]:
    """Note the memory of llama-server, and size and number of the memory files, every so many seconds."""
    over = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while not over.wait(seconds):
            rss = 0
            for process in workspace.processes():
                with contextlib.suppress(psutil.Error):
                    if process.name() == "llama-server":
                        rss += process.memory_info().rss
            sizes = []
            for path in (workspace.root / "memory").rglob("*"):
                with contextlib.suppress(OSError):
                    sizes.append(path.stat().st_size)
            samples.append({"seconds": time.monotonic() - began, "rss": rss, "files": len(sizes), "bytes": sum(sizes)})
            progress(f"{samples[-1]['seconds']:.0f} s, {rss >> 20} MiB, {sum(sizes) >> 20} MiB in {len(sizes)} files")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        progress("")


def make_workspace(model: Path, server: Path, slots: int, context: int, threads: int | None = None) -> Workspace:
    """Return a workspace with the model `a`, with memory in so many slots of `context` cells."""
    workspace = Workspace({"a": model}, server)
    config = json.loads(workspace.config.read_text())
    config["atlas"] = {"enabled": "on", "memory_directory": str(workspace.root / "memory"), "memory_backup_count": 1}
    config["atlas"] |= {"auto_save_seconds": 5, "archive_max_mb": 4096}
    config["performance"] = {"context_size": slots * context, "parallel": slots, "threads": threads}
    config["models"] |= {"settle_seconds": 0.2}
    workspace.config.write_text(json.dumps(config))
    return workspace


def campaign(
    workspace: Workspace, clients: int, plain: int, seconds: float, seed: int, replay: int, actions: int = 0
) -> Json:
    """Let the clients do what they do, for so many seconds and so often; stop the supervisor, look into the files."""
    samples: list[Json] = []
    running = workspace.start()
    try:
        wait_for(lambda: running.call("GET", "/v1/models")["data"], 30, lambda: "the model is not found")
        text = (REPOSITORY / "tests" / "data" / "text.txt").read_text()
        filler = running.call("POST", "/tokenize", {"model": "a", "content": text})["tokens"]
        shared = Shared(running, "a", filler, 0.0, actions)
        made = [Client(shared, number, seed, number >= clients) for number in range(clients + plain)]
        shared.until = time.monotonic() + seconds
        with watched(workspace, min(5.0, seconds / 4), samples):
            for client in made:
                client.start()
            for client in made:
                client.join(seconds + 2 * PATIENCE)
                if client.is_alive():
                    shared.fail(f"{client.session} hangs")
        same = [_again(shared, client) for client in made[: min(replay, clients)] if client.dialogue]
        texts = _texts(shared, workspace, made)
        stopped = running.stop()
    finally:
        running.stop(9)
    if stopped:
        shared.fail(f"the supervisor's exit code is {stopped}:\n{running.tail()}")
    for client in made[:clients]:
        path = workspace.root / "memory" / "a" / f"{client.session}.atlas"
        try:
            shared.failures += client.check(path, texts.get(client.session, ""))
        except Exception as error:
            shared.fail(f"{path.name}: {error!r}")
    latency = {
        kind: {"count": len(all_), "p50": statistics.median(all_), "p95": sorted(all_)[int(0.95 * len(all_))]}
        for kind, all_ in sorted(shared.seconds.items())
    }
    result: Json = {"requests": sum(len(all_) for all_ in shared.seconds.values()), "latency_seconds": latency}
    result |= {"codes": dict(sorted(shared.codes.items())), "least_turns": min(client.turns for client in made)}
    result |= {"again": [list(pair) for pair in same], "samples": samples, "failures": shared.failures}
    return result


def _again(shared: Shared, client: Client) -> tuple[int, int]:
    """Ask a client's last dialogue again, alone: return the turns that gave the same tokens, and all."""
    same = 0
    for number, (prompt, count, tokens) in enumerate(client.dialogue):
        body = {"model": shared.model, "prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True}
        atlas: Json = {"memory_file": f"again-{client.session}", "append": True}
        atlas |= {"reset": "none" if number else "hard", "save_memory": False}
        answer = shared.ask("replay", "POST", "/completion", body | {"return_tokens": True, "atlas": atlas})
        same += answer["tokens"] == tokens
        if answer["tokens"] != tokens:
            break  # the rest is another dialogue
    return same, len(client.dialogue)


def _texts(shared: Shared, workspace: Workspace, clients: list[Client]) -> dict[str, str]:
    """Return the text of each session's file."""
    texts = {}
    for client in clients:
        with contextlib.suppress(FileNotFoundError):
            tokens, _ = saved_tokens(workspace.root / "memory" / "a" / f"{client.session}.atlas")
            body: dict[str, Any] = {"model": shared.model, "tokens": tokens}
            texts[client.session] = str(shared.running.call("POST", "/detokenize", body)["content"])
    return texts


def main() -> int:
    """Run the campaign; 0 when nothing was lost and nothing leaked, 1 otherwise."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--clients", type=int, default=50, help="with a session each")
    options.add_argument("--plain", type=int, default=4, help="clients without a session, besides")
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--context", type=int, default=512, help="cells of a slot")
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--replay", type=int, default=8, help="dialogues that are asked again at the end")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--plot", type=Path, metavar="FILE", help="write memory and file sizes over time as PNG")
    given = options.parse_args()
    if given.plot and not find_spec("matplotlib"):  # said now, not after ten minutes
        raise BenchError("--plot needs matplotlib: run pip install 'llama-supervisor[plot]'")
    before = machine_state()
    workspace = make_workspace(given.model, server_of(given), given.slots, given.context)
    try:
        result = campaign(workspace, given.clients, given.plain, 60 * given.minutes, given.seed, given.replay)
    finally:
        workspace.remove()
    if given.plot:
        _plot(given.plot, result["samples"])
    failures = result["failures"]
    if given.json:
        about = {"benchmark": "atlas clients", "clients": given.clients, "slots": given.slots, "seed": given.seed}
        print(json.dumps(about | result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if failures else 0
    print(f"{'request':8} {'answered':>9} {'p50':>9} {'p95':>9}  other answers")
    for kind, row in result["latency_seconds"].items():
        others = {code.split()[1]: n for code, n in result["codes"].items() if code.split()[0] == kind}
        told = ", ".join(f"{n} times {code}" for code, n in others.items() if code != "200")
        print(f"{kind:8} {row['count']:>9} {row['p50']:>7.2f} s {row['p95']:>7.2f} s  {told}")
    for sample in result["samples"][:: max(1, len(result["samples"]) // 8)]:
        sizes = f"{sample['rss'] / 2**20:6.0f} MiB, {sample['bytes'] / 2**20:6.0f} MiB in {sample['files']} files"
        print(f"after {sample['seconds']:4.0f} s: llama-server {sizes}")
    same, turns = (sum(pair[place] for pair in result["again"]) for place in (0, 1))
    print(f"asked again alone: {same} of {turns} turns give the same tokens")
    for failure in failures[:30]:
        print(f"FAILED: {failure}")
    print(f"{result['requests']} answers, seed {given.seed}: {len(failures)} failures")
    print_machine(before)
    return 1 if failures else 0


def _plot(path: Path, samples: list[Json]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = [sample["seconds"] for sample in samples]
    figure, axes = pyplot.subplots(figsize=(9, 4))
    axes.plot(seconds, [sample["rss"] / 2**20 for sample in samples], label="resident memory of llama-server, MiB")
    axes.plot(seconds, [sample["bytes"] / 2**20 for sample in samples], label="memory files with backups, MiB")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
