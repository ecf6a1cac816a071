"""How does a compiler run go? Started, logged, shown as progress, stopped whole, and explained when it fails."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from supervisor.setup.fetch import SetupError
from supervisor.setup.progress import Meter

if TYPE_CHECKING:
    from rich.console import Console


STOP_SECONDS = 10
"""How long ninja may take to stop its compilers before it is killed."""

SHOWN_LINES = 12
"""How many lines of the log an error message ends with."""

STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
TROUBLE = re.compile(r"error:|CMake Error|FAILED:|fatal|No space left|Killed|undefined reference")

FULL_DISK = "No space left on device"


class BuildFailed(SetupError):
    """cmake or the compiler failed. The message holds the last error lines and the log's path."""

    code = "build_failed"


def environment(folder: Path, ninja: Path) -> dict[str, str]:
    """Return the environment for a build in `folder`: plain messages, and hits in ccache across folders."""
    changes = {
        "PATH": f"{ninja.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "LANGUAGE": "C",  # English messages; LC_ALL would do too, but ccache counts it as a difference
        "NINJA_STATUS": "[%f/%t] ",
    }
    # ccache keeps objects by their paths relative to the base, so a new key's folder still finds the old ones.
    return {"CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"} | dict(os.environ) | changes


def parse_step(line: str) -> tuple[int, int] | None:
    """Return (done, total) of a status line of ninja such as `[12/208] Building ...`; None for other lines."""
    match = STEP.match(line)
    return (int(match[1]), int(match[2])) if match else None


def no_lines(line: str) -> None:
    """Take no interest in a line of output."""


def run_ninja(command: list[str], log: Path, environ: dict[str, str], console: Console) -> None:
    """Run ninja with its progress shown; raises BuildFailed."""
    with Meter(console, "building llama-server") as meter:

        def show(line: str) -> None:
            step = parse_step(line)
            if step is not None:
                meter.update(*step)

        run(command, log, environ, show)


def run(command: list[str], log: Path, environ: dict[str, str], on_line: Callable[[str], None]) -> None:
    """Run a command, append its output to `log`, hand each line to `on_line`; raises BuildFailed.

    The command has a process group of its own. When this process is interrupted, told to end, or loses its
    terminal, the group is stopped before KeyboardInterrupt goes up.
    """
    output: list[str] = []
    with log.open("a", errors="replace") as file, _stop_signals_interrupt():
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environ,
            process_group=0,
        )
        with process:
            try:
                for line in process.stdout or ():
                    file.write(line)
                    output.append(line.rstrip())
                    on_line(line)
                process.wait()
            except BaseException:
                _stop(process)
                raise
    if process.returncode != 0:
        raise BuildFailed(_explain(command, process.returncode, output, log))


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop ninja, which stops its compilers and removes what they left half-written."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)


def _explain(command: list[str], code: int, output: list[str], log: Path) -> str:
    name = Path(command[0]).name
    telling = [line for line in output if TROUBLE.search(line) and parse_step(line) is None]
    lines = (telling or output)[-SHOWN_LINES:]
    advice = ""
    if any(FULL_DISK in line for line in output):
        advice = "\nThe disk is full: make room, then build again; it goes on where it stopped."
    elif any("Killed" in line for line in output):
        advice = "\nThe compiler was killed, likely for want of memory: build again with fewer --jobs."
    return "\n".join([f"{name} failed with code {code}:", *lines, f"The whole log: {log}"]) + advice


@contextmanager
def _stop_signals_interrupt() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt: a group of its own does not get the terminal's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
