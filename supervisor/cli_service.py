"""The command that makes the supervisor a service of systemd."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import click

from supervisor.cli_options import config_option, example, json_option
from supervisor.console import print_json, say


@click.command(
    "install-service",
    epilog=example("install-service", "install-service --system --run-as llama --config /etc/llama-supervisor.json"),
)
@config_option
@click.option("--system/--user", default=None, help="For the machine or for you.  [default: --system when root]")
@click.option("--run-as", metavar="USER", help="User of a system's service.  [default: who called sudo]")
@click.option("--name", default="llama-supervisor", show_default=True, help="Name of the unit.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit and write nothing.")
@json_option
def install_service(
    *, config: Path | None, system: bool | None, run_as: str | None, name: str, only_print: bool, as_json: bool
) -> None:
    """Write a systemd unit for the supervisor.

    The unit has the configuration's path in it, and its times; write it anew when `server.drain_seconds` or a folder
    changes. It is not started: the commands for that are printed.
    """
    from supervisor.settings import load  # noqa: PLC0415
    from supervisor.setup.files import write_atomic  # noqa: PLC0415
    from supervisor.setup.service import Service  # noqa: PLC0415

    is_root = os.geteuid() == 0
    system = is_root if system is None else system
    if run_as and not system:
        raise click.UsageError("--run-as is for --system: a user's service runs as that user")
    if not name or not all(letter.isalnum() or letter in "-_.@:" for letter in name):
        raise click.UsageError(f"{name!r} is no name for a unit: letters, digits and -_.@: only")
    service = Service(name, load(config), (run_as or _caller()) if system else None)
    if not only_print:
        write_atomic(service.path, service.text().encode(), 0o644)
    if as_json:
        path = None if only_print else str(service.path)
        print_json({"path": path, "unit": service.text(), "next": service.next_steps})
    elif only_print:
        print(service.text(), end="")
    else:
        say(f"{service.path} is written; now:")
        for step in service.next_steps:
            say(f"  {step}")


def _caller() -> str:
    """Return who called, also through sudo."""
    return os.environ.get("SUDO_USER") or getpass.getuser()
