"""What the ATLAS benchmarks share: texts from Debian packages, llama-atlas-eval, a llama-server over HTTP, shares."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from common import BenchError, Json, end, free_port, wait_for

# Texts


@dataclass(frozen=True)
class Text:
    """A text: the Debian package that ships it, the file in there, where to start (characters), how it was used."""

    package: str
    member: str
    offset: int
    kind: str
    use: str


_POD = "usr/share/perl/5.*/pod/"

TEXTS = {
    "perlop": Text("perl-doc", f"{_POD}perlop.pod", 20000, "reference with code", "tuned on"),
    "perlfaq4": Text("perl-doc", f"{_POD}perlfaq4.pod", 5000, "questions and answers", "seen in the study"),
    "perlvar": Text("perl-doc", f"{_POD}perlvar.pod", 10000, "reference, entries", "seen in the study"),
    "perlguts": Text("perl-doc", f"{_POD}perlguts.pod", 60000, "C programming manual", "seen in the study"),
    "history": Text(
        "debian-history", "usr/share/doc/debian-history/docs/project-history.en.txt.gz", 20000, "prose", "chosen after"
    ),
    "dialogue": Text("fortunes", "usr/share/games/fortunes/knghtbrd", 20000, "chat", "chosen after"),
    "code": Text("libpython3.11-stdlib", "usr/lib/python3.11/mailbox.py", 20000, "code", "chosen after"),
    "man": Text("manpages", "usr/share/man/man7/capabilities.7.gz", 5000, "manual page", "chosen after"),
    "licence": Text("base-files", "usr/share/common-licenses/MPL-1.1", 2000, "licence", "chosen after"),
    "table": Text("miscfiles", "usr/share/misc/airport.gz", 3000, "table", "chosen after"),
    "glossary": Text("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", 400000, "glossary", "chosen after"),
}
"""The default texts. The parameters were tuned on the first and looked at on the next three; never on the others."""

FILES = {
    **{name: (text.package, text.member) for name, text in TEXTS.items()},
    "perlipc": ("perl-doc", f"{_POD}perlipc.pod"),
    "perlfunc": ("perl-doc", f"{_POD}perlfunc.pod"),
    "perlre": ("perl-doc", f"{_POD}perlre.pod"),
}

COPIES = (
    ("perlipc:20000", "perlfunc:90000"),
    ("history:40000", "code:5000"),
    ("dialogue:60000", "licence:1000"),
    ("glossary:700000", "man:2000"),
)
"""Passage and filler of the default copy tests; the first is one of the prototype's."""

CORPUS = Path(tempfile.gettempdir()) / "llama-supervisor-atlas-corpus"


def corpus(folder: Path) -> dict[str, Path]:
    """Return the default texts as plain files in `folder`; what is missing is fetched with `apt-get download`.

    Nothing is installed: the packages are only unpacked. Raises `BenchError` when a package cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: folder / f"{name}.txt" for name in FILES}
    for name, (package, member) in FILES.items():
        if not found[name].is_file():
            data = next(iter(_unpacked(folder, package).glob(member))).read_bytes()
            if member.endswith(".gz"):
                data = gzip.decompress(data)
            found[name].write_text(data.decode("utf-8", "replace"), encoding="utf-8")
    return found


def _unpacked(folder: Path, package: str) -> Path:
    target = folder / "packages" / package
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temp:
            try:
                subprocess.run(["apt-get", "-q", "download", package], cwd=temp, check=True, capture_output=True)
                archive = next(Path(temp).glob("*.deb"))
                subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise BenchError(
                    f"cannot get the Debian package {package}: name texts of your own ({error})"
                ) from error
    return target


def place(spec: str, files: dict[str, Path]) -> str:
    """Return FILE[:OFFSET] for a spec whose file may be the name of a default text (then with its offset)."""
    name, _, offset = spec.partition(":")
    if name in files:
        return f"{files[name]}:{offset or (TEXTS[name].offset if name in TEXTS else 0)}"
    if not (Path(spec).is_file() or Path(spec.rpartition(":")[0]).is_file()):
        raise BenchError(f"{spec}: neither a file nor one of {', '.join(files)}")
    return spec


# llama-atlas-eval


def evaluate(tool: Path, model: Path, arguments: list[str], note: str = "") -> list[Json]:
    """Run llama-atlas-eval and return its results. Raises `BenchError` when it fails."""
    command = [str(tool), "-m", str(model), *arguments]
    results: list[Json] = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{") and (event := json.loads(line)).get("event") == "result":
                    results.append(event)
                    progress(f"{note}{event['test']} {event['mode']}: {event['nll']:.4f}")
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        errors.seek(0)
        said = errors.read()
    progress("")
    if code:
        raise BenchError(f"{' '.join(command)} exited with {code}:\n{said[-2000:]}")
    return results


def add_tool(options: argparse.ArgumentParser) -> None:
    """Add the options of the scripts that use llama-atlas-eval."""
    options.add_argument("--tool", type=Path, help="llama-atlas-eval; default: beside llama-server")
    options.add_argument("--threads", "-t", type=int, default=0, help="0: the tool's default")
    options.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the default texts")


def tool_of(options: argparse.Namespace, server: Path) -> Path:
    """Return the llama-atlas-eval to use. Raises `BenchError` when there is none."""
    tool = Path(options.tool or server.resolve().parent / "llama-atlas-eval")
    if not tool.is_file():
        raise BenchError(f"{tool}: no such file; name llama-atlas-eval with --tool")
    return tool


# llama-server over HTTP


class Server:
    """A llama-server on a port of its own, with its log; use it as a context."""

    def __init__(self, binary: Path, model: Path, arguments: list[str]) -> None:
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["-np", "1", "--no-warmup", *arguments]

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        try:
            wait_for(self._healthy, 120, lambda: "llama-server does not become healthy")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process, 10)
        self.log.close()

    def _healthy(self) -> bool:
        if self.process.poll() is not None:
            raise BenchError(f"{' '.join(self.command)} exited with {self.process.returncode}:\n{self.tail()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._request("GET", "/health", None, 5)[0] == 200
        return False

    def tail(self) -> str:
        """Return the end of its log."""
        self.log.seek(0)
        return self.log.read()[-2000:]

    def call(self, path: str, body: Json, timeout: float = 3600) -> Json:
        """POST `body` and return the JSON answer. Raises `BenchError` on an error status or a broken connection."""
        try:
            status, data = self._request("POST", path, json.dumps(body), timeout)
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"POST {path}: {error!r}\n{self.tail()}") from error
        if status != 200:
            raise BenchError(f"POST {path}: {status} {data[:500]!r}")
        return dict(json.loads(data))

    def _request(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of `text`, without the BOS."""
        return list(self.call("/tokenize", {"content": text, "add_special": False})["tokens"])

    def peak_bytes(self) -> int:
        """Return the peak of its resident memory (VmHWM; where there is no /proc, what is resident now)."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process(self.process.pid).memory_info().rss)


# Small things


def share(right: int, of: int) -> tuple[float, float, float]:
    """Return a share and its 95 % interval (Wilson's)."""
    if not of:
        return 0.0, 0.0, 1.0
    z, p = 1.96, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return p, max(0.0, middle - half), min(1.0, middle + half)


_started = time.monotonic()


def progress(note: str, done: int = 0, of: int = 0) -> None:
    """Show a line of progress on stderr where that is a terminal; an empty note removes it."""
    if sys.stderr.isatty():
        bar = f"[{'#' * (20 * done // of):20}] {done}/{of} " if of else ""
        head = f"{time.monotonic() - _started:5.0f} s {bar}" if note else ""
        print(f"\r\033[K{head}{note}"[:120], end="", file=sys.stderr, flush=True)


_T = TypeVar("_T")


def steps(items: list[_T], note: str) -> Iterator[_T]:
    """Yield the items with a progress bar."""
    for number, item in enumerate(items):
        progress(note, number, len(items))
        yield item
    progress("")
