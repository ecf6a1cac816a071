#!/usr/bin/env python3
"""What becomes of a session that cannot be written? A full disk, and what else may be wrong with the folder.

`full`: a tmpfs of 1 MiB, for which this has to be root, or has to run in `unshare -Urm`. `limit`: files may not grow
beyond a size (RLIMIT_FSIZE), which needs no rights and fails in the same place; `grown`: the same for a long session,
whose file grows. `read-only`: nothing may be made in the folder; `closed`: it may not even be looked into; `gone`:
there is no such folder any more. `lock`: another process has the session. Root may do everything, so llama-server is
started without that right (CAP_DAC_OVERRIDE).
Each time: a request is answered and its `atlas.saved.error` has the reason, the route gives an error with it, the file
from before is whole and nothing lies beside it, others are served, and all is well again when the hindrance is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atlas_common import steps
from atlas_server import MemoryServer, saved_tokens, tiny_model, workplace
from common import BenchError, Json, machine_state, parser, print_machine, run_main, server_of

TOKENS = 400
"""Tokens that a request adds to the session."""

LIMIT = 100_000
"""Largest file in bytes in `limit`: a session of TOKENS fits, one of twice as many does not."""

LONG, LONG_LIMIT = 5000, 800_000
"""The same in `grown`, where a save goes behind what the file has."""

WRAPPER = """\
#!{python}
import ctypes, os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
if sys.platform == "linux" and os.geteuid() == 0:
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if ctypes.CDLL(None).prctl(24, capability) != 0:  # PR_CAPBSET_DROP
            sys.exit("cannot give up the right to write everywhere")
os.execv({server!r}, [{server!r}, *sys.argv[1:]])
"""


class Scene:
    """A server that has saved the session `book` once, and what is checked while it cannot save it again."""

    def __init__(self, binary: Path, folder: Path, limit: int = 0, turn: int = TOKENS) -> None:
        program = folder / "llama-server"
        program.write_text(WRAPPER.format(python=sys.executable, limit=limit, server=str(binary)))
        program.chmod(0o755)
        words = ["-c", "512", "-np", "2", "-t", "1", "--atlas-memory-backup-count", "0"]
        self.running = MemoryServer(program, tiny_model(folder), folder, *words)
        self.memory = self.running.memory
        self.book = self.memory / "book.atlas"
        self.turn = turn
        self.wrong: list[str] = []

    def __enter__(self) -> Scene:
        self.running.__enter__()
        self.saves()
        return self

    def __exit__(self, *error: object) -> None:
        self.running.__exit__(*error)

    def read(self, name: str = "book", tokens: int = 0, **atlas: Any) -> tuple[int, Json]:
        """Add tokens to a session."""
        prompt = [40 + number % 50 for number in range(tokens or self.turn)]
        return self.running.complete(prompt, 1, memory_file=name, **atlas)

    def demand(self, what: bool, complaint: str, answer: object = "") -> None:
        """Note a complaint when something is not as it should be."""
        if not what:
            self.wrong.append(f"{complaint}: {str(answer)[:300]}")

    def saves(self) -> None:
        """Demand that the session can be read and saved, and is whole; it is what has to be kept from now on."""
        answer = self.running.want(self.read(append=True))
        self.demand("bytes" in (answer["atlas"]["saved"] or {}), "not saved", answer["atlas"])
        self.saved = self.book.read_bytes()
        self.tokens = saved_tokens(self.book)[0]
        self.demand(len(self.tokens) >= answer["atlas"]["tokens_seen"] - 1, "other tokens", answer["atlas"])
        self.files = sorted(path.name for path in self.memory.iterdir())

    def cannot(self, *reasons: str, status: int = 500) -> None:
        """Demand that saving fails with one of the `reasons`, and says so, and that others are served."""
        code, answer = self.read(append=True)
        self.demand(code == 200 and len(answer.get("tokens", [])) == 1, "the request was not answered", (code, answer))
        said = (answer.get("atlas", {}).get("saved") or {}).get("error", "")
        self.demand(any(reason in said for reason in reasons), f"the error does not say {reasons}", answer.get("atlas"))
        code, answer = self.running.ask("POST", "/v1/atlas/memory/save", {"filename": "book"})
        self.demand(code == status, f"the route's status is not {status}", (code, answer))
        said = answer.get("error", {}).get("message", "")
        self.demand(any(reason in said for reason in reasons), f"the route does not say {reasons}", answer)
        code, answer = self.running.complete([50] * 20, 4)
        self.demand(code == 200, "a request without a session is not served", (code, answer))
        code, answer = self.running.ask("GET", "/v1/atlas/status")
        held = [slot for slot in answer.get("slots", []) if slot["memory_file"] == "book"]
        self.demand(len(held) == 1 and not held[0]["saved"], "the session is not kept as unsaved", answer)

    def whole(self) -> None:
        """Demand that the file is what it was, and nothing else lies in the folder."""
        self.demand(self.book.read_bytes() == self.saved, "the file has changed")
        left = sorted(path.name for path in self.memory.iterdir())
        self.demand(left == self.files, f"other files than {self.files}", left)

    def loads(self) -> None:
        """Demand that the file can still be loaded, as it was."""
        code, answer = self.running.ask("POST", "/v1/atlas/memory/load", {"filename": "book"})
        self.demand(code == 200 and answer.get("n_tokens") == len(self.tokens), "it does not load", (code, answer))

    def drop(self) -> None:
        """Empty the slot of the session."""
        for slot in self.running.ask("GET", "/v1/atlas/status")[1]["slots"]:
            if slot["memory_file"]:
                self.running.ask("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard", "slot": slot["slot"]})

    def refused(self, method: str, path: str, body: Json | None, status: int, reason: str) -> None:
        """Demand an error with this status and reason."""
        code, answer = self.running.ask(method, path, body)
        said = answer.get("error", {}).get("message", "")
        self.demand(code == status and reason in said, f"{method} {path}: not {status}, {reason!r}", (code, answer))


def limit(binary: Path, folder: Path) -> list[str]:
    """Files may not grow beyond LIMIT."""
    with Scene(binary, folder, LIMIT) as scene:
        scene.cannot("File too large")
        scene.whole()
        scene.loads()
        answer = scene.running.want(scene.read(tokens=20, append=True))  # fits
        scene.demand("bytes" in answer["atlas"]["saved"], "a smaller session is not saved", answer["atlas"])
    return scene.wrong


def grown(binary: Path, folder: Path) -> list[str]:
    """A file that grows may not grow beyond LONG_LIMIT."""
    with Scene(binary, folder, LONG_LIMIT, LONG) as scene:
        answer = scene.running.want(scene.read(tokens=20, append=True))
        saved = answer["atlas"]["saved"]
        scene.demand(saved.get("written", 0) < saved.get("bytes", 0), "the file does not grow", saved)
        scene.saved = scene.book.read_bytes()
        scene.tokens = saved_tokens(scene.book)[0]
        scene.cannot("File too large")
        scene.whole()
        scene.loads()
        answer = scene.running.want(scene.read(tokens=20, append=True))  # fits
        scene.demand("bytes" in answer["atlas"]["saved"], "a smaller session is not saved", answer["atlas"])
        scene.demand(scene.book.read_bytes().startswith(scene.saved), "the file has not grown")
    return scene.wrong


def full(binary: Path, folder: Path) -> list[str]:
    """The folder is a tmpfs of 1 MiB, with a file that leaves no room."""
    with _mounted(folder / "memory"), Scene(binary, folder) as scene:
        filler = scene.memory / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        scene.files.append("filler")
        scene.cannot("No space left on device")
        scene.files.sort()
        scene.whole()
        scene.loads()
        scene.cannot("No space left on device")
        filler.unlink()
        scene.saves()
    return scene.wrong


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}: run this as root, or in `unshare -Urm`")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def read_only(binary: Path, folder: Path) -> list[str]:
    """Nothing may be made or deleted in the folder."""
    with Scene(binary, folder) as scene:
        scene.memory.chmod(0o555)
        scene.cannot("Permission denied")
        scene.whole()
        scene.loads()
        scene.cannot("Permission denied")
        scene.refused("DELETE", "/v1/atlas/memory?file=book", None, 500, "Permission denied")
        scene.whole()
        _stop_without_saving(scene, 0o755)
    return scene.wrong


def closed(binary: Path, folder: Path) -> list[str]:
    """The folder may not be looked into."""
    with Scene(binary, folder) as scene:
        scene.memory.chmod(0)
        scene.cannot("Permission denied")
        for method, path, body in (
            ("POST", "/v1/atlas/memory/load", {"filename": "book"}),
            ("POST", "/v1/atlas/memory/load", {"filename": "other"}),
            ("GET", "/v1/atlas/memory", None),
            ("GET", "/v1/atlas/memory/info?file=book", None),
            ("DELETE", "/v1/atlas/memory?file=book", None),
        ):
            scene.refused(method, path, body, 500, "Permission denied")
        code, answer = scene.read("other")
        scene.demand(code == 500, "a session that cannot be looked for", (code, answer))
        scene.memory.chmod(0o755)
        scene.whole()
        scene.saves()
    return scene.wrong


def _stop_without_saving(scene: Scene, mode: int) -> None:
    scene.running.want(scene.read(append=True))
    scene.running.process.terminate()
    code = scene.running.process.wait(60)
    scene.demand(code == 0, "it does not stop well", code)
    scene.memory.chmod(mode)
    scene.whole()


def gone(binary: Path, folder: Path) -> list[str]:
    """There is no such folder any more."""
    with Scene(binary, folder) as scene:
        away = scene.memory.rename(folder / "away")
        scene.cannot("No such file or directory")
        scene.refused("POST", "/v1/atlas/memory/load", {"filename": "book"}, 404, "book")
        away.rename(scene.memory)
        scene.whole()
        scene.loads()
        scene.saves()
    return scene.wrong


def lock(binary: Path, folder: Path) -> list[str]:
    """Another process reads or writes the session."""
    with Scene(binary, folder) as scene, (scene.memory / ".book.lock").open("rb+") as file:
        reason = "in use by another process"
        fcntl.flock(file, fcntl.LOCK_EX)
        scene.cannot(reason, status=409)
        for method, path, body in (
            ("POST", "/v1/atlas/memory/load", {"filename": "book"}),
            ("DELETE", "/v1/atlas/memory?file=book", None),
        ):
            scene.refused(method, path, body, 409, reason)
        scene.drop()
        code, answer = scene.read()
        scene.demand(code == 409, "a session whose file is in use", (code, answer))
        scene.whole()
        fcntl.flock(file, fcntl.LOCK_SH)  # another reader
        scene.loads()
        scene.cannot(reason, status=409)
        scene.whole()
        fcntl.flock(file, fcntl.LOCK_UN)
        scene.loads()
        scene.saves()
    return scene.wrong


SCENES: dict[str, Callable[[Path, Path], list[str]]] = {
    "full": full, "limit": limit, "grown": grown, "read-only": read_only, "closed": closed, "gone": gone, "lock": lock,
}  # fmt: skip


def main() -> int:
    """Play the scenes; 0 when all went as it should, 1 otherwise."""
    options = parser(__doc__)
    options.add_argument("--scenes", nargs="*", choices=list(SCENES), default=list(SCENES))
    given = options.parse_args()
    before, began = machine_state(), time.monotonic()
    found: dict[str, list[str]] = {}
    for name in steps(given.scenes, "scenes"):
        with workplace() as folder:
            try:
                found[name] = SCENES[name](server_of(given), folder)
            except BenchError as error:
                found[name] = [str(error)]
    failed = sum(bool(wrong) for wrong in found.values())
    seconds = round(time.monotonic() - began, 1)
    if given.json:
        result = {"benchmark": "atlas disk", "scenes": found, "failed": failed, "seconds": seconds}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if failed else 0
    for name, wrong in found.items():
        print(f"{name:10} {'as it should be' if not wrong else 'WRONG'}")
        print("".join(f"  {one}\n" for one in wrong), end="")
    print(f"{len(found)} scenes, {seconds:.0f} s: {failed} failed")
    print_machine(before)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
