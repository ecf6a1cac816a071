"""How does the process run? Signals, the service manager, the first words to a person, the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import ipaddress
import logging
import os
import shlex
import signal
from urllib.parse import urlsplit

from supervisor import logs
from supervisor.app import Load, Supervisor, supervisor
from supervisor.errors import ConfigInvalid, ModelNotFound, SupervisorError
from supervisor.notify import Notifier
from supervisor.runtime import RuntimeFolderError
from supervisor.settings import Settings

log = logging.getLogger(__name__)

DOUBLE_SIGNAL = 0.5
"""Seconds within which a second signal counts as the first: `timeout` and shells send both to us and our group."""


def run(settings: Settings, load: Load | None = None) -> int:
    """Run until SIGTERM or SIGINT and return the exit code: 0 after a clean stop, 1 when it could not start.

    `load` reads the settings anew, for SIGHUP, a changed file and the API.
    """
    logs.set_up(settings.config.logging)
    try:
        import uvloop  # noqa: PLC0415 (optional)
    except ImportError:
        return asyncio.run(serve(settings, load))
    return uvloop.run(serve(settings, load))


async def serve(settings: Settings, load: Load | None = None) -> int:
    """See `run`."""
    stop = asyncio.Event()
    notifier = Notifier()
    running: list[Supervisor] = []
    loop = asyncio.get_running_loop()
    first = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first
        if not stop.is_set():
            drain = (running[0].config if running else settings.config).server.drain_seconds
            log.info("%s: draining for up to %g s; once more stops at once", number.name, drain)
            first = loop.time()
            stop.set()
        elif loop.time() - first > DOUBLE_SIGNAL:
            log.warning("%s again: stopping at once", number.name)
            for one in running:
                one.fleet.hurry()

    in_terminal = has_terminal()

    def on_hangup() -> None:
        if in_terminal and not has_terminal():
            on_signal(signal.SIGHUP)  # it was closed, and nobody could stop us any more
        elif running and not stop.is_set():
            task = loop.create_task(reload(running[0], notifier))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    reloads: set[asyncio.Task[None]] = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        async with supervisor(settings, load) as one:
            running.append(one)
            announce(one)
            gc.collect()
            gc.freeze()  # what is here stays: collections need not walk it while streams run
            give_back()
            notifier.ready(summary(one))
            reports = loop.create_task(report(one, notifier))
            await stop.wait()
            notifier.stopping("running answers may finish")
    except RuntimeFolderError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        where = f"{settings.config.server.host}:{settings.config.server.port}"
        hint = "; choose another with --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        log.error("cannot listen on %s: %s%s", where, os.strerror(error.errno or 0), hint)
        return 1
    reports.cancel()
    log.info("stopped")
    return 0


async def reload(one: Supervisor, notifier: Notifier) -> None:
    """Take over the settings anew, as SIGHUP asks; a bad configuration is logged and changes nothing."""
    notifier.reloading()
    try:
        with contextlib.suppress(ConfigInvalid):
            await one.live.reload("SIGHUP")
    finally:
        notifier.ready(summary(one))


async def report(one: Supervisor, notifier: Notifier) -> None:
    """Tell systemd again and again how we do; its watchdog hears of us only while models are started as they must."""
    while notifier.is_on:
        await asyncio.sleep(notifier.pause)
        if one.fleet.scheduler.closing:
            notifier.alive("running answers may finish")
        elif problems := one.fleet.problems():
            notifier.ill("; ".join(problems))
        else:
            notifier.alive(summary(one))


def summary(one: Supervisor) -> str:
    """Return in a few words what goes on."""
    entries = one.fleet.scheduler.entries.values()
    running, waiting = (sum(len(getattr(entry, name)) for entry in entries) for name in ("leases", "waiters"))
    models = ", ".join(one.fleet.running()) or "no model"
    text = f"{models} loaded; {running} requests run, {waiting} wait"
    return f"bad configuration, see the log; {text}" if one.live.problems else text


def has_terminal() -> bool:
    """Tell whether this process has a terminal whose closing sends it SIGHUP."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return to the system what starting took and no longer needs, where the C library can (glibc): a few MiB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def announce(one: Supervisor) -> None:
    """Tell a person where to go."""
    for url in one.urls:
        log.info("listening on %s", url)
    if warning := one.access.warning(all(map(is_loopback, one.urls))):
        log.warning("%s", warning)
    try:
        model = one.catalog.resolve(None).id
    except ModelNotFound:
        log.warning(
            "no model yet: put a GGUF file into %s, or run `llama-supervisor pull smollm2`", one.config.models.directory
        )
        return
    except SupervisorError as error:
        log.warning("%s", error.message)
        return
    count = len(one.catalog.models)
    noun = "model" if count == 1 else "models"
    log.info("%d %s in %s; the default is %s", count, noun, one.config.models.directory, model)
    body = '{"messages": [{"role": "user", "content": "Say hello."}], "stream": true}'
    cert = one.config.server.tls_cert
    trust = f" --cacert {shlex.quote(str(cert))}" if cert is not None else ""
    print(f"\nTry it:\n  curl -N{trust} {one.urls[0]}/v1/chat/completions -d '{body}'\n", flush=True)


def is_loopback(url: str) -> bool:
    """Tell whether only this machine reaches `url`."""
    return ipaddress.ip_address(urlsplit(url).hostname or "").is_loopback
