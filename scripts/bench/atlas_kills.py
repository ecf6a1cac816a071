#!/usr/bin/env python3
"""Is a session ever lost or torn when llama-server is killed while it saves?

Each round, a server over the same folder brings sessions into its slots and saves some: at the end of a request
(`end`), by `POST /v1/atlas/memory/save` (`route`), because another session needs the slot (`push`), by auto-save
(`auto`), at SIGUSR1 (`signal`), at SIGTERM (`stop`). It gets SIGKILL at a random moment of that, in every other round
counted from the moment when a temporary file appears, or a file grows. Then each session's file must be whole, its
tokens must be one of the states that were saved or being saved, none older than the last that a client was told of,
and its lock must be free; the next server must load each session with these tokens, and leave no temporary file and
not more backups than it keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import re
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from atlas_common import steps
from atlas_server import Gone, MemoryServer, saved_tokens, tiny_model, workplace
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

from supervisor.atlas_file import CorruptMemory, read

WEIGHTS = {"end": 4, "route": 2, "push": 2, "stop": 1, "signal": 1, "auto": 1}
"""How often each kind of save is played; auto-save takes more than a second."""

SESSIONS = ("one", "two", "three", "four")
SLOTS, BACKUPS = 2, 2
LONG = 1200
"""Tokens after which a session is begun again, or four times as many as it begins with."""

WORDS = ["-np", str(SLOTS), "-t", "1", "--atlas-memory-backup-count", str(BACKUPS), "--atlas-auto-save-interval", "1"]
FINAL = re.compile(r"(?P<name>[a-z]+)(?:\.atlas|_\d+\.atlas\.bak)|\.[a-z]+\.lock")
PATIENCE = 5.0
"""Seconds after which an aimed kill comes without a temporary file, and within which an operation must end."""


@dataclass
class Session:
    """What may be in a session's file: the states since the last one that a client was told of, that one first."""

    name: str
    first: int = 0  # tokens that it begins with, besides those of any turn
    states: list[list[int]] = field(default_factory=lambda: [[]])
    last: int = -1
    unsure: int = 0  # kills since then that may have met a save of it; each may leave a backup too many

    def read(self, prompt: list[int]) -> Json:
        """Add the state after `prompt`, to which the session is reset when it is long; return the `atlas` object."""
        if begin := self.begins:
            self.states.append(prompt)
        else:
            self.states.append(self.states[0] + [self.last] * (self.last >= 0) + prompt)
        return {"memory_file": self.name, "append": True, "reset": "hard" if begin else "none"}

    @property
    def begins(self) -> bool:
        """Whether its next turn is its first."""
        return not self.states[0] or len(self.states[0]) > max(LONG, 4 * self.first)

    def told(self) -> None:
        """Note that the newest state is surely saved."""
        del self.states[:-1]
        self.unsure = 0


@dataclass
class Round:
    """What happened in one round."""

    operation: str
    aimed: bool
    delay: float  # seconds, from the operation's beginning, or from the temporary file when aimed
    during: bool = False  # the kill left a temporary file, or a save that was not completed behind a session's file
    done: bool = False  # the operation had ended before, or was stronger than the kill
    old: int = 0  # sessions with a state to be saved whose file has the one before
    new: int = 0
    backups: int = 0  # sessions that were loaded from a backup
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Servers one after the other over one folder, and what its files may hold."""

    def __init__(self, binary: Path, model: Path, folder: Path, rng: random.Random, first: int = 0) -> None:
        self.binary, self.model, self.folder, self.rng = binary, model, folder, rng
        self.words = ["-c", str(SLOTS * 256), *WORDS]
        self.memory = folder / "memory"
        self.sessions = {name: Session(name, first) for name in SESSIONS}

    def prepare(self) -> dict[str, float]:
        """Save every session once, measure; return the seconds of a save and of each operation. A server runs then."""
        self.start()
        saves = []
        for session in self.sessions.values():
            answer = self._request(session, True)
            saves.append(answer["atlas"]["saved"]["ms"] / 1000)
            session.told()
        self.running.kill()
        self._expect_nothing(self.look)
        spans = {"save": 1.5 * statistics.median(saves), "auto": 1.3}
        for operation in [operation for operation in WEIGHTS if operation not in spans]:
            times = []
            for _ in range(3):
                self._expect_nothing(self.check)
                began = time.perf_counter()
                self._begin(operation).join(PATIENCE)
                times.append(time.perf_counter() - began)
                self.running.kill()
                self._expect_nothing(self.look)
            spans[operation] = 1.1 * statistics.median(times)
        self._expect_nothing(self.check)
        return spans

    def _expect_nothing(self, look: Callable[[Round], list[str]]) -> None:
        if wrong := look(Round("", False, 0)):
            raise BenchError("before anything is killed in a save: " + "; ".join(wrong))

    def start(self) -> None:
        """Start a server."""
        self.running = MemoryServer(self.binary, self.model, self.folder, *self.words)
        self.running.until_healthy()

    def play(self, operation: str, aimed: bool, spans: dict[str, float]) -> Round:
        """Kill the running server during `operation`, and check what that left with the next one."""
        played = Round(operation, aimed, self.rng.uniform(0, spans["save" if aimed else operation]))
        sizes = self.sizes()
        thread = self._begin(operation)
        if aimed:
            until = time.monotonic() + PATIENCE
            while thread.is_alive() and not self.temporary() and self.sizes() == sizes and time.monotonic() < until:
                pass
        _wait(played.delay)
        self.running.process.send_signal(signal.SIGKILL)
        self.running.process.wait()
        thread.join(PATIENCE)
        if thread.is_alive():
            played.failures.append("the request hangs")
        if thread.error:
            played.failures.append(thread.error)
        played.done = thread.done
        played.during = bool(self.temporary()) or self.unfinished()
        played.failures += self.look(played)
        played.failures += self.check(played)
        return played

    def _begin(self, operation: str) -> Operation:
        return Operation(getattr(self, f"_{operation}")())

    def _tokens(self, session: Session) -> list[int]:
        count = self.rng.randrange(20, 400) + session.first * session.begins
        return [self.rng.randrange(40, 120) for _ in range(count)]

    def _request(self, session: Session, save: bool) -> Json:
        prompt = self._tokens(session)
        answer = self.running.complete(prompt, 1, **session.read(prompt), save_memory=save)
        return self.running.want(answer)

    def _chosen(self, count: int) -> list[Session]:
        return self.rng.sample(list(self.sessions.values()), count)

    # The operations: what comes before is done at once, what is returned ends in a thread.

    def _end(self) -> Callable[[], None]:
        (session,) = self._chosen(1)
        prompt = self._tokens(session)
        atlas = session.read(prompt)

        def request() -> None:
            answer = self.running.want(self.running.complete(prompt, 1, **atlas))
            if "error" in answer["atlas"]["saved"]:
                raise BenchError(f"not saved: {answer['atlas']['saved']}")
            session.told()

        return request

    def _route(self) -> Callable[[], None]:
        (session,) = self._chosen(1)
        self._request(session, False)

        def save() -> None:
            self.running.want(self.running.ask("POST", "/v1/atlas/memory/save", {"filename": session.name}))
            session.told()

        return save

    def _push(self) -> Callable[[], None]:
        first, second, third = self._chosen(SLOTS + 1)
        self._request(first, False)
        self._request(second, False)
        prompt = self._tokens(third)
        atlas = third.read(prompt)

        def request() -> None:
            self.running.want(self.running.complete(prompt, 1, **atlas))
            first.told()
            third.told()

        return request

    def _auto(self) -> Callable[[], None]:
        (session,) = self._chosen(1)
        self._request(session, False)

        def request() -> None:
            self.running.want(self.running.complete([70, 71, 72], 20000))

        return request

    def _signal(self) -> Callable[[], None]:
        dirty = self._chosen(SLOTS)
        for session in dirty:
            self._request(session, False)

        def save() -> None:
            self.running.process.send_signal(signal.SIGUSR1)
            while not all(slot["saved"] for slot in self.running.ask("GET", "/v1/atlas/status")[1]["slots"]):
                time.sleep(0.002)
            for session in dirty:
                session.told()

        return save

    def _stop(self) -> Callable[[], None]:
        dirty = self._chosen(SLOTS)
        for session in dirty:
            self._request(session, False)

        def stop() -> None:
            self.running.process.terminate()
            if self.running.process.wait() == 0:
                for session in dirty:
                    session.told()

        return stop

    # What is left

    def temporary(self) -> list[str]:
        """Return the files that are neither a session, nor a backup, nor a lock."""
        return sorted(path.name for path in self.memory.iterdir() if not FINAL.fullmatch(path.name))

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the sessions' files."""
        found = {}
        for name in self.sessions:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self.memory / f"{name}.atlas").stat().st_size
        return found

    def unfinished(self) -> bool:
        """Tell whether there is a save behind a session's file that was not completed."""
        for name, size in self.sizes().items():
            with contextlib.suppress(CorruptMemory):  # which is found by look()
                if read(self.memory / f"{name}.atlas").end < size:
                    return True
        return False

    def look(self, played: Round) -> list[str]:
        """Look at the files after a kill: return what is wrong, and take what is there as the state that holds."""
        wrong = []
        for lock in self.memory.glob(".*.lock"):
            with lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    wrong.append(f"{lock.name} is held")
        for backup in self.memory.glob("*.atlas.bak"):
            try:
                saved_tokens(backup)
            except Exception as error:
                wrong.append(f"{backup.name}: {error!r}")
        for session in self.sessions.values():
            path = self.memory / f"{session.name}.atlas"
            tokens: list[int] = []
            try:
                tokens, session.last = saved_tokens(path)
            except FileNotFoundError:
                pass
            except Exception as error:
                wrong.append(f"{path.name}: {error!r}")
            if tokens not in session.states:
                lengths = [len(state) for state in session.states]
                wrong.append(
                    f"{path.name} has {len(tokens)} tokens that were never saved, or older ones; not {lengths}"
                )
            elif len(session.states) > 1:
                played.new += tokens == session.states[-1]
                played.old += tokens != session.states[-1]
                session.unsure += 1
            session.states = [tokens]
        return wrong

    def check(self, played: Round) -> list[str]:
        """Start a server and have it load every session; return what is wrong."""
        self.start()
        wrong = []
        for name in self.temporary():
            wrong.append(f"the start left {name}")
            (self.memory / name).unlink()
        for name, session in self.sessions.items():
            status, answer = self.running.ask("POST", "/v1/atlas/memory/load", {"filename": name})
            want = 200 if session.states[0] else 404
            if status != want or (status == 200 and answer["n_tokens"] != len(session.states[0])):
                wrong.append(f"{name}: {len(session.states[0])} tokens, but the server says {status} {answer}")
            played.backups += "backup" in answer
            kept = len(list(self.memory.glob(f"{name}_*.atlas.bak")))
            if kept > BACKUPS + session.unsure:
                wrong.append(f"{name} has {kept} backups")
        return wrong


class Operation(threading.Thread):
    """An operation in a thread of its own; `done` when it was carried out before the kill."""

    def __init__(self, carry_out: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.carry_out, self.done, self.error = carry_out, False, ""
        self.start()

    def run(self) -> None:
        """Carry it out; that the server is gone is no error."""
        try:
            self.carry_out()
            self.done = True
        except Gone:
            pass
        except Exception as error:
            self.error = repr(error)


def _wait(seconds: float) -> None:
    until = time.perf_counter() + seconds
    if seconds > 0.005:
        time.sleep(seconds - 0.002)
    while time.perf_counter() < until:
        pass


def plan(count: int, rng: random.Random) -> list[tuple[str, bool]]:
    """Return `count` rounds: the operations by their weights, every other one aimed, in random order."""
    kinds = [operation for operation, weight in WEIGHTS.items() for _ in range(weight)]
    rounds = [(kinds[number // 2 % len(kinds)], number % 2 == 1) for number in range(count)]
    rng.shuffle(rounds)
    return rounds


def campaign(binary: Path, model: Path | None, folder: Path, count: int, seed: int, first: int = 0) -> list[Round]:
    """Play `count` rounds; sessions begin with `first` tokens besides those of any turn."""
    rng = random.Random(seed)
    made = Campaign(binary, model or tiny_model(folder), folder, rng, first)
    try:
        spans = made.prepare()
        return [made.play(*one, spans) for one in steps(plan(count, rng), "kills")]
    finally:
        made.running.kill()


def main() -> int:
    """Play all rounds; 0 when no session was ever lost or torn, 1 otherwise."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, help="GGUF file; default: a tiny one with random weights")
    options.add_argument("--count", type=int, default=500, help="kills")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--first", type=int, default=0, help="tokens a session begins with; 5000: its file grows")
    given = options.parse_args()
    before, began = machine_state(), time.monotonic()
    with workplace() as folder:
        rounds = campaign(server_of(given), given.model, folder, given.count, given.seed, given.first)
    failed = sum(bool(one.failures) for one in rounds)
    seconds = round(time.monotonic() - began, 1)
    if given.json:
        result: Json = {"benchmark": "atlas kills", "seed": given.seed, "rounds": [asdict(one) for one in rounds]}
        result |= {"failed": failed, "seconds": seconds}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if failed else 0
    print(f"{'operation':10} {'kills':>6} {'in a save':>10} {'old':>6} {'new':>6} {'backup':>7} {'failures':>9}")
    for operation in WEIGHTS:
        these = [one for one in rounds if one.operation == operation]
        sums = [sum(getattr(one, key) for one in these) for key in ("during", "old", "new", "backups")]
        wrong = sum(bool(one.failures) for one in these)
        print(f"{operation:10} {len(these):>6} {sums[0]:>10} {sums[1]:>6} {sums[2]:>6} {sums[3]:>7} {wrong:>9}")
    reasons = Counter(re.sub(r"\d+", "N", failure) for one in rounds for failure in one.failures)
    for reason, times in reasons.most_common(20):
        print(f"  {times} times: {reason}")
    print(f"\n{len(rounds)} kills, seed {given.seed}, {seconds:.0f} s: {failed} failed")
    print_machine(before)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
