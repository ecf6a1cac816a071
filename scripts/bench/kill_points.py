#!/usr/bin/env python3
"""What is left when the supervisor is stopped or killed at a random moment?

Each round starts a real supervisor, always in the same runtime folder and on the same port, brings it into a phase
(starting up, loading its first model, streaming, swapping A for B, idle), and at a random moment sends SIGTERM or
SIGKILL to it alone. After SIGTERM: exit code 0, no process, nothing in the runtime and temporary folders, and a
request that ran ended with [DONE] or an error. After SIGKILL: no process within 2 s; what files are left the next
round's start must clean up. A supervisor that gets SIGTERM while Python still imports may die of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from common import (
    BenchError,
    Supervisor,
    Workspace,
    chat,
    first_byte,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    wait_for,
    warm_page_cache,
)

PHASES = ("startup", "load", "stream", "swap", "idle")
SIGNALS = (signal.SIGTERM, signal.SIGKILL)

DRAIN_SECONDS = 1.0
EXIT_SECONDS = 15.0
"""Longest time from SIGTERM to the exit: the drain, a child that ignores SIGTERM, a busy machine."""
ORPHAN_SECONDS = 2.0
"""Longest time from SIGKILL until no child lives any more."""


@dataclass
class Round:
    """What happened in one round; `client` is how the request that ran ended: done, error, cut, none."""

    phase: str
    signal: str
    delay: float  # seconds from the beginning of the phase to the signal
    exit_code: int | None = None
    seconds: float = 0.0  # from the signal until all is gone
    client: str = "none"
    stubborn: int = 0  # children that would not stop and had to be killed
    before: list[str] = field(default_factory=list)  # files that an earlier round left
    failures: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """A streaming request in a thread of its own."""

    def __init__(self, running: Supervisor, model: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.connection = running.connect()
        self.body = chat(model, tokens, ignore_eos=True)
        self.streaming = threading.Event()
        self.outcome = "hangs"
        self.detail = ""
        self.start()

    def run(self) -> None:
        """Make the request and read its answer; `outcome` tells how it ended."""
        text = b""
        try:
            with contextlib.closing(self.connection):
                self.connection.request("POST", "/v1/chat/completions", self.body)
                answer = self.connection.getresponse()
                while data := answer.read1(65536):
                    text += data
                    self.streaming.set()
                whole = b"[DONE]" in text[-50:]
                self.outcome = "error" if b'"error":' in text[-20000:] else "done" if whole else "cut"
                self.detail = f"{answer.status} {text[-200:]!r}"
        except (OSError, http.client.HTTPException) as error:
            self.outcome = "cut"
            self.detail = f"{error!r} after {text[-200:]!r}"


def make_workspace(model_a: Path, model_b: Path, server: Path) -> Workspace:
    """Return a workspace with the models a and b, of which one may run at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overlay = {
        "server": {"port": port, "drain_seconds": DRAIN_SECONDS},
        "models": {"max_loaded_models": 1},
        "performance": {"context_size": 1024, "parallel": 1},  # for quick starts
    }
    return Workspace({"a": model_a, "b": model_b}, server, overlay)


def calibrate(workspace: Workspace) -> dict[str, float]:
    """Return the seconds within which a signal meets each phase."""
    began = time.perf_counter()
    running = workspace.start()
    try:
        _ = running.url
        startup = time.perf_counter() - began
        load = first_byte(running.connect(), chat("a"))
        swap = first_byte(running.connect(), chat("b"))
    finally:
        running.stop()
    return {"startup": startup, "load": load, "stream": 0.5, "swap": swap, "idle": 0.2}


def play(workspace: Workspace, phase: str, number: signal.Signals, delay: float) -> Round:
    """Start a supervisor, bring it into `phase`, wait `delay` seconds, send the signal, look what is left."""
    played = Round(phase, number.name, delay, before=leftovers(workspace))
    running = workspace.start()
    try:
        with enter(running, phase, played) as client:
            time.sleep(delay)
            sent = time.monotonic()
            try:
                played.exit_code = running.stop(number, EXIT_SECONDS)
                played.failures += left_behind(workspace, played, number)
            except subprocess.TimeoutExpired:
                played.failures.append(f"still runs {EXIT_SECONDS:g} s after {number.name}")
                running.stop(signal.SIGKILL)
            played.seconds = time.monotonic() - sent
            played.stubborn = running.output().count(", killing it")
            if client is not None:
                client.join(5)
                played.client = client.outcome
                if client.outcome == "hangs" or (client.outcome == "cut" and number is signal.SIGTERM):
                    played.failures.append(f"the request that ran: {client.outcome} {client.detail}")
    except BenchError as error:
        played.failures.append(str(error))
    finally:
        for process in workspace.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        running.process.wait()
    if played.failures:
        played.failures.append("its log:\n" + running.tail(40))
    return played


@contextlib.contextmanager
def enter(running: Supervisor, phase: str, played: Round) -> Iterator[Client | None]:
    """Bring a supervisor that has just been started into `phase`; the client, if any, is in it too."""
    if phase == "startup":
        yield None
        return
    _ = running.url
    played.failures += [f"the start left {name}" for name in leftovers(running.workspace, running.process.pid)]
    if phase in ("swap", "idle"):
        first_byte(running.connect(), chat("a"))
    if phase == "idle":  # a listener must not keep it from ending
        with contextlib.closing(running.connect()) as listener:
            listener.request("GET", "/models/sse")
            listener.getresponse()
            yield None
        return
    client = Client(running, "b" if phase == "swap" else "a", 2000 if phase == "stream" else 1)
    if phase == "stream" and not client.streaming.wait(60):
        raise BenchError(f"no stream: {client.detail}")
    yield client


def left_behind(workspace: Workspace, played: Round, number: signal.Signals) -> list[str]:
    """Return what is wrong after the supervisor has ended."""
    if number is signal.SIGTERM:
        importing = played.phase == "startup" and played.exit_code == -signal.SIGTERM
        wrong = [] if played.exit_code == 0 or importing else [f"exit code {played.exit_code}"]
        wrong += [f"left {name}" for name in leftovers(workspace) if not (importing and name in played.before)]
        return wrong + [f"left process {describe(process)}" for process in workspace.processes()]
    try:
        wait_for(lambda: not workspace.processes(), ORPHAN_SECONDS, lambda: "")
    except BenchError:
        return [f"{ORPHAN_SECONDS:g} s later lives {describe(process)}" for process in workspace.processes()]
    return []


def leftovers(workspace: Workspace, pid: int | None = None) -> list[str]:
    """Return what lies in the runtime and temporary folders and does not belong to the supervisor `pid`."""
    own = workspace.runtime / str(pid)
    found = [path for folder in (workspace.runtime, workspace.temp) for path in folder.rglob("*")]
    return [str(path.relative_to(workspace.root)) for path in found if own != path and own not in path.parents]


def describe(process: psutil.Process) -> str:
    """Return pid, state and command line of a process."""
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline()[:6])}"
    return f"{process.pid} (gone by now)"


def check_service(workspace: Workspace) -> list[str]:
    """Start once more, have both models answer, stop. Return what is wrong."""
    played = Round("final", "SIGTERM", 0.0)
    running = workspace.start()
    try:
        _ = running.url
        wrong = [f"the start left {name}" for name in leftovers(workspace, running.process.pid)]
        first_byte(running.connect(), chat("a"))
        first_byte(running.connect(), chat("b"))
        played.exit_code = running.stop()
        return wrong + left_behind(workspace, played, signal.SIGTERM)
    except BenchError as error:
        return [str(error)]
    finally:
        running.stop(signal.SIGKILL)


def plan(count: int, seed: int, spans: dict[str, float]) -> list[tuple[str, signal.Signals, float]]:
    """Return `count` rounds: all phases and signals equally often, in random order, at random moments."""
    chance = random.Random(seed)
    cases = [(phase, number) for phase in PHASES for number in SIGNALS]
    rounds = [cases[index % len(cases)] for index in range(count)]
    chance.shuffle(rounds)
    return [(phase, number, chance.uniform(0, spans[phase])) for phase, number in rounds]


def print_table(rounds: list[Round]) -> None:
    """Print by phase and signal: rounds, failures, seconds from the signal until all was gone, children killed."""
    heads = f"{'phase':8} {'signal':8} {'rounds':>6} {'failures':>8} {'median':>8} {'longest':>8} {'stubborn':>8}"
    print(f"{heads}  request ended with")
    for phase in PHASES:
        for number in SIGNALS:
            these = [one for one in rounds if (one.phase, one.signal) == (phase, number.name)]
            if not these:
                continue
            ends = [one.client for one in these]
            how = ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends) - {"none"}))
            if phase == "startup" and number is signal.SIGTERM:
                how = f"({sum(one.exit_code == -number for one in these)} died of it while importing)"
            failed, stubborn = sum(bool(one.failures) for one in these), sum(one.stubborn for one in these)
            seconds = [one.seconds for one in these]
            times = f"{statistics.median(seconds):>6.2f} s {max(seconds):>6.2f} s"
            print(f"{phase:8} {number.name:8} {len(these):>6} {failed:>8} {times} {stubborn:>8}  {how}")
    for index, one in enumerate(rounds):
        if one.failures:
            print(f"\nround {index}: {one.phase} {one.signal} after {one.delay:.3f} s, exit code {one.exit_code}")
            print("\n".join(f"  {failure}" for failure in one.failures))


def main() -> int:
    """Run all rounds; 0 when nothing was ever left behind, 1 otherwise."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file A")
    options.add_argument("--model-b", type=model_file, help="GGUF file B; default: A under another name")
    options.add_argument("--count", type=int, default=200, help="rounds")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    warm_page_cache(given.model)
    before, began = machine_state(), time.monotonic()
    workspace = make_workspace(given.model, given.model_b or given.model, server_of(given))
    try:
        lengths = [calibrate(workspace) for _ in range(3)]
        spans = {phase: 1.1 * min(length[phase] for length in lengths) for phase in PHASES}
        rounds = [play(workspace, *one) for one in plan(given.count, given.seed, spans)]
        at_end = check_service(workspace)
    finally:
        workspace.remove()
    failed = sum(bool(one.failures) for one in rounds)
    seconds = time.monotonic() - began
    if given.json:
        result = {
            "benchmark": "kill_points",
            "seed": given.seed,
            "rounds": [asdict(one) for one in rounds],
            "failed": failed,
            "at_end": at_end,
            "spans_seconds": spans,
            "seconds": round(seconds, 1),
            "machine": {"before": before, "after": machine_state()},
        }
        print(json.dumps(result, indent=2))
    else:
        print_table(rounds)
        print(f"\n{len(rounds)} kill points, seed {given.seed}, {seconds:.0f} s: {failed} failed")
        print("after all: " + ("\n".join(at_end) or "a new start answers for both models and leaves nothing"))
        print_machine(before)
    return 1 if failed or at_end else 0


if __name__ == "__main__":
    run_main(main)
