"""How is one llama-server started, known to be ready, stopped, and found dead?

A child listens on a Unix socket. With `LLAMA_SERVER_ROUTER_PORT` set it speaks llama-server's internal child
protocol: lines `cmd_child_to_router:state:{json}` on stdout tell of loading progress and readiness,
`cmd_router_to_child:exit` on stdin stops it, and the end of its stdin makes it exit, so that it cannot outlive us.
A server that does not speak it is polled on /health and stopped by SIGTERM.
On Linux the kernel kills it when we die (PR_SET_PDEATHSIG), also while it loads.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from math import inf
from pathlib import Path
from typing import Any

import psutil

from supervisor.atlas_support import Support
from supervisor.childlog import ChildLog
from supervisor.errors import StartFailed
from supervisor.slot_cache import Kept
from supervisor.upstream import Pool, UpstreamClosed
from supervisor.watchdog import QUIET_SECONDS, Effort

log = logging.getLogger(__name__)

STATE_PREFIX = b"cmd_child_to_router:state:"
EXIT_COMMAND = b"cmd_router_to_child:exit\n"
COMMAND_SECONDS = 0.5
"""How long a child that has just loaded may take to follow the command to exit before it gets SIGTERM too."""

YOUNG_SECONDS = 5.0
"""How long after a load the command may still come too soon to be followed."""

POLL_AFTER = 0.25
"""Seconds without a word of the child protocol after which /health is polled."""

POLL_SECONDS = 0.05
LOG_LINES_IN_ERRORS = 12
MAX_LINE = 1 << 20
"""Longest line read from a child in bytes; the rest of a longer one is taken for a line of its own."""


def _load_prctl() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None, use_errno=True).prctl


_prctl = _load_prctl()
_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what makes a forked child be killed by the kernel when `parent` dies; None where that's unknown."""
    if _prctl is None:
        return None

    def before_exec() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec


class Child:
    """One llama-server process. `start` once, then `wait` for its end or `stop` it."""

    def __init__(self, model: str, command: list[str], socket: Path, log_: ChildLog, patience: float) -> None:
        """`patience`: how many seconds it may take to stop."""
        self.model = model
        self.patience = patience
        self.command = command
        self.planned = command  # what the settings alone make
        self.slots: Path | None = None  # the folder that it was given for the prompts of its slots
        self.socket = socket
        self.log = log_
        self.pool = Pool(str(socket))
        self.progress: dict[str, Any] | None = None
        self.info: dict[str, Any] = {}
        self.patches: str | None = None
        self.atlas: Support | None = None
        self.kept: Kept | None = None  # None: its slots are left alone
        self.forced = False  # it ends at once, without saving its slots
        self.stopping = False
        self.hung: str | None = None  # why it was killed
        self.gone = asyncio.Event()  # nobody gets it any more
        self.environ: dict[str, str] = {}
        self._process: Process | None = None
        self._turn = asyncio.Lock()  # a stop waits for a spawn under way
        self._pumps: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._ready_at = inf
        self._spoke = False
        self._last_sign = 0.0
        self._on_progress: Callable[[], None] = lambda: None

    @property
    def pid(self) -> int | None:
        """The process id, None before the start."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """The exit code (negative: killed by that signal), None while it runs."""
        return self._process.returncode if self._process else None

    def rss(self) -> int | None:
        """Return its resident memory in bytes, None when it does not run."""
        if self._process is None or self._process.returncode is not None:
            return None
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return None

    async def spawn(self, environ: Mapping[str, str]) -> int:
        """Start the process and return its pid. Raises `StartFailed` when it cannot be executed."""
        async with self._turn:
            if self.stopping:
                raise StartFailed(f"model {self.model!r} was stopped before it started", param="model")
            return await self._spawn(environ)

    async def _spawn(self, environ: Mapping[str, str]) -> int:
        self.environ = dict(environ)
        env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_SUPERVISOR_")}
        env |= {"LLAMA_SERVER_ROUTER_PORT": "1"} | dict(environ)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=env,
                start_new_session=True,  # Ctrl-C in the terminal is for us
                preexec_fn=_die_with(os.getpid()),
            )
        except (OSError, ValueError) as error:
            raise StartFailed(f"llama-server cannot be started: {error}", param="model") from error
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pumps = [
            asyncio.create_task(self._pump_states(self._process.stdout)),
            asyncio.create_task(self._pump_log(self._process.stderr)),
        ]
        return self._process.pid

    async def until_ready(self, stall_seconds: float, on_progress: Callable[[], None]) -> None:
        """Wait until the child can serve.

        Raises `StartFailed` with its last log lines when it exits before, or shows no sign of progress (a
        state, a log line) for `stall_seconds`, or was stopped.
        """
        assert self._process is not None
        loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._last_sign = started = moved = loop.time()
        ready = asyncio.create_task(self._ready.wait())
        exited = asyncio.create_task(self._process.wait())
        try:
            while True:
                polling = not self._spoke and loop.time() - started >= POLL_AFTER
                timeout = POLL_SECONDS if polling else POLL_AFTER
                await asyncio.wait({ready, exited}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if self._ready.is_set():
                    return
                if exited.done():
                    await self._finish_pumps()
                    raise self.failure(f"llama-server {describe_exit(exited.result())} while loading")
                if polling and await self._healthy():
                    return
                effort = self.effort()
                if effort is None or effort.status != psutil.STATUS_STOPPED:
                    moved = loop.time()
                elif loop.time() - moved >= QUIET_SECONDS:
                    self.kill()  # it would not follow any other signal
                    raise self.failure(f"stopped (SIGSTOP) for {loop.time() - moved:.1f} s while loading")
                if loop.time() - self._last_sign > stall_seconds:
                    raise self.failure(f"loading made no progress for {stall_seconds:.0f} s")
        finally:
            ready.cancel()
            exited.cancel()
            self._on_progress = lambda: None

    async def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        assert self._process is not None
        code = await self._process.wait()
        await self._finish_pumps()
        return code

    async def stop(self) -> None:
        """End the process: cut its connections, ask it to exit, SIGKILL when its patience is over."""
        self.stopping = True
        self.pool.cut()  # llama-server hangs on SIGTERM while a request is in flight
        async with self._turn:
            process = self._process
            if process is None:
                return
            if process.returncode is None and not await self._exits(process):
                log.warning("model %s: pid %d did not stop in %g s, killing it", self.model, self.pid, self.patience)
                self.kill()
                await process.wait()
            await self._finish_pumps()

    async def _exits(self, process: Process) -> bool:
        """Ask the process to exit and say whether it did.

        Where the protocol is spoken, the command comes first, for there SIGTERM alone waits for the end of stdin.
        SIGTERM follows only if the command may have been lost, as one right after the load is (b11434): a child that
        saves its memory is left alone, and one that got a SIGTERM from somebody else would die of the second.
        """
        ended = asyncio.ensure_future(process.wait())
        try:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)  # one that was stopped could neither save nor exit
            stdin = process.stdin
            if self._spoke and self._ready.is_set() and stdin is not None and not stdin.is_closing():
                stdin.write(EXIT_COMMAND)
                young = asyncio.get_running_loop().time() - self._ready_at < YOUNG_SECONDS
                await asyncio.wait({ended}, timeout=min(COMMAND_SECONDS, self.patience / 2) if young else self.patience)
                if not young:
                    return ended.done()
            if not ended.done():
                with suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait({ended}, timeout=self.patience)
            return ended.done()
        finally:
            ended.cancel()

    def kill(self) -> None:
        """SIGKILL the process and what it started."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def failure(self, what: str) -> StartFailed:
        """Return an error for `what` with the child's last log lines."""
        tail = "\n".join(self.log.tail(LOG_LINES_IN_ERRORS))
        message = f"model {self.model!r}: {what}"
        return StartFailed(f"{message}; its last log lines:\n{tail}" if tail else message, param="model")

    async def call(self, method: str, path: str, body: bytes = b"", *, fresh: bool = False) -> tuple[int, bytes]:
        """Make a request to the child, on a new connection if that must be: (status, body).

        Raises `OSError` or `UpstreamClosed`.
        """
        connection = await self.pool.acquire(fresh=fresh)
        try:
            await connection.send(method, path, [("Host", "localhost")], body)
            await connection.head()
            answer = b""
            while chunk := await connection.read():
                answer += chunk
            return connection.status, answer
        finally:
            if fresh:
                connection.close()
            self.pool.release(connection)

    async def answers(self, seconds: float) -> bool:
        """Tell whether it shows life within so many seconds: it answers /health, or sends something to anybody."""
        try:
            await asyncio.wait_for(self.call("GET", "/health", fresh=True), seconds)
        except (OSError, UpstreamClosed, TimeoutError):
            return self.pool.heard()
        return True

    def busy(self) -> bool:
        """Tell whether requests are in flight."""
        return self.pool.busy

    def waits(self) -> bool:
        """Tell whether requests are in flight and none has got a byte since the last time."""
        return self.pool.busy and not self.pool.heard()

    async def decodes(self) -> None:
        """Return when its decoding thread, which knows the slots, has answered; also when it cannot be asked."""
        with suppress(OSError, UpstreamClosed):
            await self.call("GET", "/slots", fresh=True)

    def effort(self) -> Effort | None:
        """Return what the system tells of the process, None when it does not run or is being stopped."""
        if self._process is None or self._process.returncode is not None or self.stopping:
            return None
        try:
            process = psutil.Process(self._process.pid)
            with process.oneshot():
                times = process.cpu_times()
                return Effort(times.user + times.system, process.status(), _bytes_read(process))
        except psutil.Error:
            return None

    async def _healthy(self) -> bool:
        try:
            status, _ = await asyncio.wait_for(self.call("GET", "/health"), 1.0)
        except (OSError, UpstreamClosed, TimeoutError):
            return False
        return status == HTTPStatus.OK

    async def _pump_states(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            if not line.startswith(STATE_PREFIX):
                self._sign_of_life()
                self.log.write(line + b"\n")
                continue
            try:
                message = json.loads(line[len(STATE_PREFIX) :])
                state, payload = message["state"], message.get("payload") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # not the protocol that we know
            self._spoke = True
            self._sign_of_life()
            if state == "loading":
                self.progress = payload
                self._on_progress()
            elif state == "ready":
                self.progress = None
                if payload:
                    self.info = payload
                self._ready_at = self._last_sign
                self._ready.set()

    async def _pump_log(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._sign_of_life()
            self.log.write(line + b"\n")

    def _sign_of_life(self) -> None:
        self._last_sign = asyncio.get_running_loop().time()

    async def _finish_pumps(self) -> None:
        """Let the last log lines come in; bounded, for a grandchild may hold the pipe."""
        if self._pumps:
            _, late = await asyncio.wait(self._pumps, timeout=0.5)
            for task in late:
                task.cancel()
            self._pumps = []


def _bytes_read(process: psutil.Process) -> int:
    """Return the bytes that a process has read from disk; 0 where the system does not tell."""
    try:
        return int(process.io_counters().read_bytes)
    except (psutil.AccessDenied, AttributeError):
        return 0


def describe_exit(code: int) -> str:
    """Say in words how a process ended."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a pipe without their ends."""
    rest = b""
    while data := await stream.read(65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest
