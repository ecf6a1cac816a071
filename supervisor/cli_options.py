"""Options that many commands share, and how their help is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from supervisor.client import Client

F = TypeVar("F", bound=Callable[..., Any])

URL_VARIABLE = "LLAMA_SUPERVISOR_URL"
KEY_VARIABLE = "LLAMA_SUPERVISOR_API_KEY"
"""Environment variable that holds the key for a running supervisor; not an option, which other users could see."""

EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1", "*": "127.0.0.1"}  # noqa: S104 (not bound here)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, errors too.")

config_option = click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration file.  [default: $LLAMA_SUPERVISOR_CONFIG, ./config.json or the user's]",
)


def client_options(command: F) -> F:
    """Add the options of commands that ask a running supervisor."""
    url = click.option(
        "--url",
        envvar=URL_VARIABLE,
        help=f"Address of the supervisor.  [default: ${URL_VARIABLE} or the configured host and port]",
    )
    return url(config_option(json_option(command)))


def example(*lines: str) -> str:
    """Return the end of a command's help: what one may type."""
    return "\n".join(
        ["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  llama-supervisor {x}" for x in lines)]
    )


def client(url: str | None, config: Path | None) -> Client:
    """Return the client of the supervisor at `url`, or at the address in the configuration."""
    from supervisor.client import Client  # noqa: PLC0415 (only commands that ask need it)

    key = os.environ.get(KEY_VARIABLE)
    if url:
        return Client(url, key)
    url, cert = _configured_url(config)
    return Client(url, key, cert)


def _configured_url(config: Path | None) -> tuple[str, Path | None]:
    """Return the address, and the certificate if it is for HTTPS."""
    from supervisor.settings import load  # noqa: PLC0415 (pydantic is slow to import)

    server = load(config).config.server
    if server.port == 0:
        raise click.UsageError("server.port is 0, chosen at start: name the supervisor's address with --url")
    host = server.host.split(",")[0].strip()
    host = EVERY_ADDRESS.get(host, host).strip("[]")
    scheme = "http" if server.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}", server.tls_cert
