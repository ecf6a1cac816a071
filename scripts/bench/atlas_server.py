"""What the scripts about memory files share: a llama-server with `--atlas` on a Unix socket, and a model of 0.4 MB."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import zstandard
from common import REPOSITORY, BenchError, Json, end, wait_for

sys.path.append(str(REPOSITORY))
sys.path.append(str(REPOSITORY / "tests"))

SANITIZER = re.compile(r"ERROR: \w+Sanitizer|runtime error:|DEADLYSIGNAL")
"""What a build with sanitizers writes when it finds something."""


class Gone(BenchError):
    """The server did not answer: it died, or the connection broke."""


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Make a folder whose path is short enough for sockets, with an empty folder `memory`; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="lsm") as made:
        memory = Path(made) / "memory"
        memory.mkdir()
        try:
            yield Path(made)
        finally:
            memory.chmod(0o755)  # so that it can be removed, whatever was tried


def tiny_model(folder: Path) -> Path:
    """Write a model of two layers with random weights, whose tokens are bytes: 256 bytes of KV cache a token."""
    source = REPOSITORY / "tests" / "tiny_models.py"  # this folder has one of that name too
    spec = importlib.util.spec_from_file_location("tests_tiny_models", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.make(folder / "tiny.gguf", "llama"))


def saved_tokens(path: Path) -> tuple[list[int], int]:
    """Return the tokens of a memory file, and the one that was sampled after them (-1: none), after verifying it.

    Raises `supervisor.atlas_file.CorruptMemory`.
    """
    from supervisor import atlas_file

    memory = atlas_file.read(path)
    memory.verify()
    raw = bytearray()
    with path.open("rb") as file:
        for frame in memory.header.frames:
            if frame.purpose == "tokens":
                file.seek(frame.offset)
                shuffled = zstandard.decompress(file.read(frame.stored))
                part, n = bytearray(frame.raw), frame.raw // 4
                for place in range(4):
                    part[place::4] = shuffled[place * n : (place + 1) * n]
                raw += part
    return list(struct.unpack(f"<{len(raw) // 4}i", raw)), memory.header.session.last


class MemoryServer:
    """A llama-server on a Unix socket in `folder`, its memory files in `folder`/memory; use it as a context.

    Several may follow one another in the same folder; `said` is the log of this one.
    """

    def __init__(self, binary: Path, model: Path, folder: Path, *words: str) -> None:
        number = len(list(folder.glob("*.log")))
        self.memory = folder / "memory"
        self.socket = folder / f"{number}.sock"
        self._log = folder / f"{number}.log"
        self._heard = 0
        command = [str(binary), "-m", str(model), "--host", str(self.socket), "--no-warmup", "--fit", "off", "--atlas"]
        self.command = [*command, "--atlas-memory-dir", str(self.memory), *words]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> MemoryServer:
        try:
            self.until_healthy()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process, 20)

    def until_healthy(self) -> None:
        """Wait until it serves. Raises `BenchError` when it ends or takes two minutes."""

        def healthy() -> bool:
            if self.process.poll() is not None:
                raise BenchError(f"llama-server exited with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(Gone):
                return self.ask("GET", "/health", timeout=5)[0] == 200
            return False

        wait_for(healthy, 120, lambda: f"llama-server does not become healthy:\n{self.tail()}")

    def kill(self) -> None:
        """Send SIGKILL and reap it."""
        self.process.kill()
        self.process.wait()

    def connect(self, timeout: float = 600) -> http.client.HTTPConnection:
        """Return a new connection to it."""
        connection = http.client.HTTPConnection("localhost", timeout=timeout)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        try:
            connection.sock.connect(str(self.socket))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, method: str, path: str, body: Json | None = None, timeout: float = 600) -> tuple[int, Json]:
        """Make a request; return the status and the JSON answer. Raises `Gone`."""
        try:
            with contextlib.closing(self.connect(timeout)) as connection:
                connection.request(method, path, None if body is None else json.dumps(body))
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Gone(f"{method} {path}: {error!r}") from error

    def complete(self, prompt: str | list[int], tokens: int = 1, **atlas: Any) -> tuple[int, Json]:
        """Ask for `tokens` greedy tokens, with the fields of the `atlas` object."""
        body: Json = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_tokens": True} | ({"atlas": atlas} if atlas else {})
        return self.ask("POST", "/completion", body, timeout=3600)  # a prompt may be long and the machine slow

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of `text`, without the BOS."""
        return list(self.want(self.ask("POST", "/tokenize", {"content": text, "add_special": False}))["tokens"])

    def want(self, answer: tuple[int, Json]) -> Json:
        """Return the body of an answer that must be 200. Raises `BenchError`."""
        if answer[0] != 200:
            raise BenchError(f"{answer[0]} {json.dumps(answer[1])[:500]}\n{self.tail()}")
        return answer[1]

    def said(self) -> str:
        """Return its log."""
        return self._log.read_text(errors="replace")

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.said().splitlines()[-lines:])

    def complaints(self) -> list[str]:
        """Return the lines that a sanitizer wrote since the last call."""
        with self._log.open(errors="replace") as log:
            log.seek(self._heard)
            lines = log.read().splitlines()
            self._heard = log.tell()
        return [line for line in lines if SANITIZER.search(line)]

    def rss(self) -> int:
        """Return its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def forget_peak(self) -> None:
        """Let `peak` count from now on, where the system can do that (Linux)."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak of its resident memory in bytes since `forget_peak`; what is resident now without /proc."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return self.rss()
