"""What the benchmarks share: a supervisor in a temporary folder, a raw llama-server, timed requests, machine state."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

POLL = 0.005
"""Pause in seconds between two looks at something that is awaited."""

Json = dict[str, Any]


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


# The machine


def machine_state() -> Json:
    """Return what a figure depends on: cores, load, CPU model, memory, versions."""
    memory = psutil.virtual_memory()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_available_gib": round(memory.available / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()


def warm_page_cache(path: Path) -> None:
    """Read a file once, so that the first start does not pay for the disk."""
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass


# A supervisor

COMPILED = tempfile.TemporaryDirectory(prefix="lsb-pycache")
"""Where supervisors keep their compiled modules: the first one makes them, as the first start of an installation."""


class Workspace:
    """A temporary folder with a models folder, a runtime folder and a configuration; short enough for sockets."""

    def __init__(self, models: dict[str, Path], server: Path, overlay: Json | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lsb"))
        self.runtime = self.root / "run"
        self.temp = self.root / "tmp"
        self.log = self.root / "supervisor.log"
        self.config = self.root / "config.json"
        for folder in (self.root / "models", self.root / "home", self.temp):
            folder.mkdir()
        for name, path in models.items():
            (self.root / "models" / f"{name}.gguf").symlink_to(path.resolve())
        config: Json = {
            "server": {"port": 0, "llama_server": str(server.resolve()), "runtime_dir": str(self.runtime)},
            "models": {"directory": str(self.root / "models")},
            "logging": {"directory": str(self.root / "logs")},
        }
        for section, values in (overlay or {}).items():
            config[section] = config.get(section, {}) | values
        self.config.write_text(json.dumps(config))

    def environ(self) -> dict[str, str]:
        """Return an environment in which nothing is written outside the folder and nothing outside has a say."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "XDG_", "PYTHONDONTWRITE"))}
        return kept | {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.temp),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONPYCACHEPREFIX": COMPILED.name,
        }

    def start(self) -> Supervisor:
        """Start a supervisor here; it may still be on its way to listening."""
        return Supervisor(self)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes whose command line names this folder: the supervisor and its children."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and any(str(self.root) in word for word in process.cmdline()):
                    found.append(process)
        return found

    def remove(self) -> None:
        """Kill what is left and remove the folder."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


class Supervisor:
    """A running `llama-supervisor start`, its log in the workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._url: str | None = None
        self._from = workspace.log.stat().st_size if workspace.log.exists() else 0
        with workspace.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor", "start", "--config", str(workspace.config)],
                cwd=workspace.root,
                env=workspace.environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        """Where it listens. Raises `BenchError` when it has ended or does not say so within 30 s."""
        if self._url is None:

            def listening() -> re.Match[str] | None:
                if self.process.poll() is not None:
                    raise BenchError(f"the supervisor exited with {self.process.returncode}:\n{self.tail()}")
                return re.search(r"listening on (http://\S+)", self.output())

            self._url = wait_for(listening, 30, lambda: f"the supervisor does not listen:\n{self.tail()}")[1]
        return self._url

    def output(self) -> str:
        """Return what it has written to its log."""
        with self.workspace.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode("utf-8", "replace")

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.output().splitlines()[-lines:])

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        """Return a new connection to it."""
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=timeout)

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Make a request and return its JSON answer. Raises `BenchError` on an error status."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), _JSON)
            answer = connection.getresponse()
            data = answer.read()
        if answer.status >= 400:
            raise BenchError(f"{method} {path}: {answer.status} {data[:500]!r}")
        return dict(json.loads(data))

    def state(self, model: str) -> str:
        """Return the state of `model`: absent, starting, ready, ..."""
        known = {entry["id"]: entry["state"] for entry in self.call("GET", "/api/v1/status")["models"]}
        return str(known.get(model, "absent"))

    def unload(self, model: str) -> None:
        """Unload `model` and wait until it is gone."""
        self.call("POST", "/models/unload", {"model": model})
        wait_for(lambda: self.state(model) == "absent", 30, lambda: f"{model} is not unloaded")

    def child_command(self, model: str) -> list[str]:
        """Return the command line with which the supervisor runs `model`, which must be loaded."""
        status = self.call("GET", f"/v1/models/{model}")["status"]
        if status["value"] != "loaded":
            raise BenchError(f"{model} is {status['value']}, not loaded")
        return list(status["args"])

    def stop(self, number: int = signal.SIGTERM, patience: float = 60) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(patience)


@contextlib.contextmanager
def supervisor(models: dict[str, Path], server: Path, overlay: Json | None = None) -> Iterator[Supervisor]:
    """Run a supervisor over `models` in a temporary folder for as long as the context lasts."""
    workspace = Workspace(models, server, overlay)
    try:
        running = workspace.start()
        try:
            _ = running.url
            yield running
        finally:
            running.stop()
    finally:
        workspace.remove()


# A raw llama-server


class RawServer:
    """llama-server started by hand with `command`, on a Unix socket of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.socket = folder / f"raw{time.monotonic_ns()}.sock"
        at = command.index("--host") + 1
        command = [*command[:at], str(self.socket), *command[at + 1 :]]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def until_healthy(self) -> float:
        """Poll /health and return the seconds from the start to the first 200."""

        def healthy() -> bool:
            if self.process.poll() is not None:
                raise BenchError(f"llama-server exited with {self.process.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(self.connect()) as probe:
                probe.request("GET", "/health")
                return probe.getresponse().status == 200
            return False

        wait_for(healthy, 120, lambda: "llama-server does not become healthy")
        return time.perf_counter() - self.started

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection to it."""
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(self.socket))
        return connection

    def stop(self) -> None:
        """End it; no request may be in flight."""
        end(self.process, 5)
        self.socket.unlink(missing_ok=True)


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ask a process to end, and make it end after `patience` seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# Requests

_JSON = {"Content-Type": "application/json"}


def chat(model: str, max_tokens: int = 1, **more: Any) -> bytes:
    """Return the body of a streaming chat request."""
    messages = [{"role": "user", "content": "Say hello."}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True} | more).encode()


def first_byte(connection: http.client.HTTPConnection, body: bytes) -> float:
    """POST a chat request, read the whole answer, and return the seconds to the first byte of its body."""
    with contextlib.closing(connection):
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, _JSON)
        answer = connection.getresponse()
        first = answer.read(1)
        seconds = time.perf_counter() - started
        rest = answer.read()
    if answer.status != 200 or b"[DONE]" not in rest:
        raise BenchError(f"the answer is not a complete stream: {answer.status} {(first + rest)[:500]!r}")
    return seconds


# Starts, ours against raw

Round = tuple[float, float, float]
"""Seconds: raw healthy, raw first byte, ours first byte."""

PAUSE = 0.3
"""Seconds of quiet before each measurement."""

BUSY = 1.6
"""Greatest ratio between two raw starts on a quiet machine."""


def stock(command: list[str]) -> list[str]:
    """Return a child's command without what only makes the supervisor's start faster: llama-server as by hand."""
    kept = [word for word in command if word != "--no-warmup"]
    if "--fit" in kept:
        del kept[kept.index("--fit") : kept.index("--fit") + 2]
    return kept


def raw_start(command: list[str], folder: Path, body: bytes) -> tuple[float, float]:
    """Return the seconds from the spawn of a raw llama-server to healthy, and to the first byte of an answer."""
    time.sleep(PAUSE)
    server = RawServer(command, folder)
    try:
        healthy = server.until_healthy()
        return healthy, healthy + first_byte(server.connect(), body)
    finally:
        server.stop()


def interleave(raw: Callable[[], tuple[float, float]], ours: Callable[[], float], rounds: int) -> list[Round]:
    """Measure both in turn, each going first every other round; one round before does not count."""
    measured: list[Round] = []
    for number in range(rounds + 1):
        if number % 2:
            by_us = ours()
            measured.append((*raw(), by_us))
        else:
            by_hand = raw()
            measured.append((*by_hand, ours()))
    return measured[1:]


def report_starts(name: str, rounds: list[Round], target: float, before: Json, as_json: bool) -> int:
    """Print what `interleave` measured; return 0 when ours is at most raw healthy + `target` s, 1 otherwise."""
    columns = dict(zip(("raw healthy", "raw first byte", "ours first byte"), zip(*rounds, strict=True), strict=True))
    medians = {column: statistics.median(values) for column, values in columns.items()}
    over_healthy = medians["ours first byte"] - medians["raw healthy"]
    over_first = medians["ours first byte"] - medians["raw first byte"]
    in_pairs = statistics.median(ours - healthy for healthy, _, ours in rounds)
    busy = max(columns["raw healthy"]) > BUSY * min(columns["raw healthy"])
    met = over_healthy <= target
    if as_json:
        result = {
            "benchmark": name,
            "rounds_ms": {column: [_ms(value) for value in values] for column, values in columns.items()},
            "median_ms": {column: _ms(value) for column, value in medians.items()},
            "ours_minus_raw_healthy_ms": _ms(over_healthy),
            "ours_minus_raw_healthy_median_of_pairs_ms": _ms(in_pairs),
            "ours_minus_raw_first_byte_ms": _ms(over_first),
            "machine_was_busy": busy,
            "target_ms": _ms(target),
            "met": met,
            "machine": {"before": before, "after": machine_state()},
        }
        print(json.dumps(result, indent=2))
        return 0 if met else 1
    print(f"{name}: {len(rounds)} interleaved rounds")
    print(f"  {'':16}{'median':>10}{'min':>10}{'max':>10}   ms")
    for column, values in columns.items():
        print(f"  {column:16}{_ms(medians[column]):>10}{_ms(min(values)):>10}{_ms(max(values)):>10}")
    verdict = f"target <= {_ms(target):g} ms: {'met' if met else 'MISSED'}; median of pairs {_ms(in_pairs):+} ms"
    print(f"ours first byte - raw healthy:    {_ms(over_healthy):+} ms ({verdict})")
    print(f"ours first byte - raw first byte: {_ms(over_first):+} ms (what the supervisor adds)")
    if busy:
        print(f"the raw starts differ by more than {BUSY} times: the machine was busy, run this again")
    print_machine(before)
    return 0 if met else 1


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


# Small things


def wait_for(look: Callable[[], Any], seconds: float, complaint: Callable[[], str]) -> Any:
    """Call `look` until it returns something true, and return that. Raises `BenchError` after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise BenchError(complaint())
        time.sleep(POLL)
    return found


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--server", type=Path, help="llama-server; default: the one that `build` made")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def server_of(options: argparse.Namespace) -> Path:
    """Return the llama-server to use. Raises `BenchError` when there is none."""
    if options.server is None:
        sys.path.insert(0, str(REPOSITORY))
        from supervisor.setup import native

        options.server = native.find_server()
    if options.server is None or not options.server.is_file():
        raise BenchError("no llama-server: run `llama-supervisor build` or name one with --server")
    return Path(options.server)


def model_file(text: str) -> Path:
    """Return the path of a GGUF file given on the command line."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def print_machine(machine: Json) -> None:
    """Print the machine state in one line."""
    print("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()))


def run_main(main: Callable[[], int]) -> None:
    """Run a benchmark and exit with its code; 2 when it could not be carried out."""
    # so that a `timeout` in front ends the children too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = main()
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
