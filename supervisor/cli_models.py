"""Commands that ask a running supervisor: how it does, which models there are, load, unload, show logs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from supervisor.cli_options import client, client_options, example
from supervisor.console import console, duration, print_json, safe, say, size, table

Json = dict[str, Any]

DEFAULT_LINES = 100


@click.command(epilog=example("status", "status --url http://192.168.1.5:8080 --json"))
@client_options
def status(url: str | None, config: Path | None, as_json: bool) -> None:
    """Show how the supervisor does and which models run."""
    found = client(url, config).get("/api/v1/status")
    if as_json:
        print_json(found)
        return
    _print_supervisor(found)
    running = found.get("models") or []
    if not running:
        say("No model runs; the first request for one starts it.")
        return
    say("")
    table(
        ["MODEL", "STATE", ">REQUESTS", ">WAITING", ">PID", ">MEMORY", ">IDLE", ">RESTARTS"],
        [
            [
                str(model.get("id")),
                _state(model),
                str(model.get("leases", "-")),
                _waiting(model),
                str(model.get("pid") or "-"),
                size(model.get("rss_bytes")),
                duration(model.get("idle_seconds")),
                str(model.get("restarts", "-")),
            ]
            for model in running
        ],
    )
    _print_reasons({str(model.get("id")): model.get("error") for model in running})


def _print_supervisor(found: Json) -> None:
    native = found.get("native") or {}
    build = " ".join(
        [
            str(native.get("path") or "not built; run `llama-supervisor build`"),
            *([f"build {native['build']}"] if native.get("build") else []),
            *(["(not ours)"] if native.get("ours") is False else []),
        ]
    )
    lines = {
        "Supervisor": f"{found.get('version')}, {found.get('state')} for {duration(found.get('uptime_seconds'))}, "
        f"pid {found.get('pid')}",
        "Addresses": ", ".join(map(str, found.get("addresses") or [])) or "-",
        "Configuration": str(found.get("config") or "defaults"),
        "llama-server": build,
        "Models folder": str(found.get("models_directory") or "-"),
        "Running": f"{found.get('loaded', 0)} of at most {found.get('max_loaded', '-')}",
    }
    memory = found.get("memory") or {}
    for pool, most in (memory.get("budget_bytes") or {}).items():
        name = "Memory" if pool == "ram" else str(pool)
        lines[name] = f"{size((memory.get('counted_bytes') or {}).get(pool))} of at most {size(most)}"
    for name, value in lines.items():
        say(f"{name + ':':<15}{value}")
    for problem in found.get("problems") or []:
        say(f"{'Problem:':<15}{problem}")
    if needed := found.get("restart_needed"):
        say(f"{'New start for:':<15}{', '.join(map(str, needed))}")


def _waiting(model: Json) -> str:
    """Return how many requests wait, and for how long the oldest of those that are told has."""
    waited = [place.get("waited_seconds") or 0 for place in model.get("queue") or []]
    return f"{model.get('waiting', '-')}" + (f" ({duration(max(waited))})" if waited else "")


def _state(model: Json) -> str:
    state = str(model.get("state"))
    progress = model.get("progress")
    if state != "starting" or not isinstance(progress, int | float):
        return f"{state}, pinned" if model.get("pinned") else state
    stage = f" {model['stage']}" if model.get("stage") else ""
    return f"{state}{stage} {progress:.0%}"


def _print_reasons(reasons: dict[str, Any]) -> None:
    """Print why models failed, below a table."""
    told = {model: reason for model, reason in reasons.items() if reason}
    if told:
        say("")
    for model, reason in told.items():
        first, *more = str(reason).splitlines() or [""]
        say(f"{model}: {first}")
        for line in more:
            say(f"    {line}")


@click.command(epilog=example("models", "models --reload"))
@click.option("--reload", is_flag=True, help="Look into the models folder first.")
@client_options
def models(url: str | None, config: Path | None, as_json: bool, reload: bool) -> None:
    """List all models, running or not."""
    found = client(url, config).models(reload=reload)
    if as_json:
        print_json({"models": found})
        return
    if not found:
        say("No models; put GGUF files into the models folder, or run `llama-supervisor pull`.")
        return
    table(
        ["MODEL", "STATUS", ">SIZE", ">CONTEXT", "ARCH", "QUANT", "ALSO CALLED"],
        [
            [
                str(model.get("id")),
                _status(model),
                size(model.get("size")),
                str(model.get("context_length") or "-"),
                str(model.get("architecture_name") or "-"),
                str(model.get("quantization") or "-"),
                ", ".join(str(name) for name in model.get("aliases") or [] if name != model.get("id")),
            ]
            for model in found
        ],
    )
    _print_reasons({str(model.get("id")): (model.get("status") or {}).get("error") for model in found})


def _status(model: Json) -> str:
    value = model.get("status") or {}
    progress = value.get("progress")
    text = str(value.get("value", "-"))
    return f"{text} {progress:.0%}" if isinstance(progress, int | float) else text


@click.command(epilog=example("load SmolLM2-135M-Instruct-Q4_K_M"))
@click.argument("model")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ready.")
@client_options
def load(model: str, url: str | None, config: Path | None, as_json: bool, no_wait: bool) -> None:
    """Start MODEL and wait until it is ready."""
    supervisor = client(url, config)
    entry = supervisor.find(model) or {}
    name = str(entry.get("id", model))
    started = time.monotonic()
    if no_wait or not entry or (entry.get("status") or {}).get("value") in ("loaded", "invalid"):
        supervisor.post("/models/load", {"model": name})
    else:
        _load(supervisor, name, quiet=as_json)
    seconds = time.monotonic() - started
    if as_json:
        print_json({"model": name, "status": "loading" if no_wait else "loaded", "seconds": round(seconds, 3)})
    else:
        say(f"{name} is loading" if no_wait else f"{name} is ready ({duration(seconds)})")


def _load(supervisor: Any, name: str, *, quiet: bool) -> None:
    from supervisor.client import Load  # noqa: PLC0415
    from supervisor.setup.progress import Meter  # noqa: PLC0415 (rich is slow to import)

    with Meter(console(stderr=True, quiet=quiet), f"Loading {safe(name)}") as meter:
        Load(supervisor, name, lambda value: meter.update(round(value * 100), 100)).wait()


@click.command(epilog=example("unload SmolLM2-135M-Instruct-Q4_K_M"))
@click.argument("model")
@click.option("--force", is_flag=True, help="Do not wait for its running requests.")
@client_options
def unload(model: str, url: str | None, config: Path | None, as_json: bool, force: bool) -> None:
    """Stop MODEL after its running requests."""
    client(url, config).post("/models/unload", {"model": model, "force": force})
    if as_json:
        print_json({"model": model, "status": "unloading"})
    else:
        say(f"{model} is being unloaded")


@click.command(epilog=example("logs SmolLM2-135M-Instruct-Q4_K_M", "logs -f -n 20 SmolLM2-135M-Instruct-Q4_K_M"))
@click.argument("model")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(0, 1_000_000), default=DEFAULT_LINES, show_default=True, help="Last lines."
)
@client_options
def logs(*, model: str, url: str | None, config: Path | None, as_json: bool, follow: bool, lines: int) -> None:
    """Show what MODEL's llama-server wrote."""
    from supervisor.client import logs_path  # noqa: PLC0415

    if as_json and follow:
        raise click.UsageError("--json prints one document, so it does not go with --follow")
    found = client(url, config).lines(logs_path(model, lines, follow=follow))
    if as_json:
        print_json({"model": model, "lines": list(found)})
        return
    in_terminal = sys.stdout.isatty()
    for line in found:
        print(safe(line) if in_terminal else line, flush=follow)
