"""Commands about API keys: they change the keys file, which a running supervisor follows."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supervisor.cli_options import config_option, example, json_option
from supervisor.console import print_json, say, table
from supervisor.errors import SupervisorError

if TYPE_CHECKING:
    from supervisor.api_keys import ApiKey, KeysFile

SCOPES = ("infer", "manage", "admin")
PRIORITIES = ("low", "normal", "high")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class NoSuchKey(SupervisorError):
    """No key has that name or id."""

    type = "key_not_found"


class NameTaken(SupervisorError):
    """Another key has that name."""

    type = "name_taken"


def expiry(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return seconds since 1970: from a time span (`90d`), or a date or time, UTC unless it says otherwise."""
    if value is None:
        return None
    try:
        if span := re.fullmatch(r"(\d{1,6})([mhdw])", value):
            when = datetime.now(UTC) + timedelta(**{UNITS[span[2]]: int(span[1])})
        else:
            when = datetime.fromisoformat(value)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = int(when.timestamp())
    except (ValueError, OverflowError):
        hint = "is neither a time span like 90d or 12h nor a date like 2030-01-31"
        raise click.BadParameter(f"{value!r} {hint}", ctx, param) from None
    if seconds <= time.time():
        raise click.BadParameter(f"{value!r} is over already", ctx, param)
    return seconds


@click.group("key", epilog=example("key add laptop", "key list", "key revoke laptop"))
def key() -> None:
    """Make, list and revoke API keys.

    As soon as there is a key, requests need one. A running supervisor takes changes over within a second.
    """


@key.command(
    epilog=example(
        "key add laptop",
        "key add ci --model tiny --requests-per-minute 60 --tokens-per-minute 20000 --expires 90d",
        "key add prometheus --scope manage",
        "key add laptop-2 --like laptop",
    )
)
@click.argument("name")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="Repeatable.  [default: infer]")
@click.option("--model", "models", metavar="MODEL", multiple=True, help="May use this one; repeatable.  [default: all]")
@click.option("--requests-per-minute", type=click.IntRange(1, 10**9), help="Most requests.  [default: any number]")
@click.option("--tokens-per-minute", type=click.IntRange(1, 10**9), help="Most tokens, prompts too.  [default: any]")
@click.option(
    "--priority", type=click.Choice(PRIORITIES), help="Of its requests; they may ask for less.  [default: normal]"
)
@click.option("--expires", callback=expiry, metavar="WHEN", help="90d, 12h or 2030-01-31.  [default: never]")
@click.option("--like", metavar="KEY", help="Take everything but the expiry from it, its ATLAS sessions too.")
@config_option
@json_option
def add(config: Path | None, as_json: bool, name: str, like: str | None, **given: Any) -> None:
    """Make a key called NAME and show it, this once.

    The key goes to standard output alone; the file holds only its hash. Scopes: `infer` asks models, `manage` loads
    and unloads them and sees status, logs and metrics, `admin` may do everything.
    """
    from supervisor import api_keys  # noqa: PLC0415 (pydantic is slow to import)

    path = _path(config)
    with api_keys.locked(path) as file:
        if file.find(name) is not None:
            raise NameTaken(f"there is a key {name!r} already; `llama-supervisor key revoke {name}` removes it")
        model = _found(file, like).model_dump() if like is not None else {}
        secret, new_id = api_keys.new_secret(), api_keys.new_id(file)
        values = {"scopes": ["infer"], "owner": new_id} | model
        values |= {field: list(value) if isinstance(value, tuple) else value for field, value in given.items() if value}
        values |= {"id": new_id, "name": name, "hash": file.digest(secret)}
        values |= {"created": int(time.time()), "expires": given["expires"]}
        made = _checked(values)
        api_keys.save(path, file, [*file.keys, made])
    if as_json:
        print_json({"key": secret, "file": str(path), **made.public()})
        return
    print(secret)
    click.echo(f"This is the key {name!r}; it cannot be shown again. Requests carry it as", err=True)
    click.echo("  Authorization: Bearer <key>", err=True)
    if not file.keys:
        click.echo(f"From now on supervisors whose keys are in {path} ask for one.", err=True)


def _checked(values: dict[str, Any]) -> ApiKey:
    from pydantic import ValidationError  # noqa: PLC0415

    from supervisor.api_keys import ApiKey  # noqa: PLC0415

    try:
        return ApiKey.model_validate(values)
    except ValidationError as error:
        if any(item["loc"] == ("name",) for item in error.errors()):
            raise click.UsageError("a name has 1 to 64 of A-Z a-z 0-9 . _ @ + -") from None
        raise


@key.command("list", epilog=example("key list", "key list --json"))
@config_option
@json_option
def list_keys(config: Path | None, as_json: bool) -> None:
    """List the keys, not the secrets themselves: those are nowhere."""
    from supervisor import api_keys  # noqa: PLC0415

    path = _path(config)
    file = api_keys.load(path)
    keys = file.keys if file else []
    if as_json:
        print_json({"file": str(path), "keys": [one.public() for one in keys]})
        return
    if not keys:
        say(f"No keys in {path}.")
        return
    table(
        ["NAME", "ID", "OWNER", "SCOPES", "MODELS", ">REQUESTS/MIN", ">TOKENS/MIN", "PRIORITY", "CREATED", "EXPIRES"],
        [
            [
                one.name,
                one.id,
                one.owner if one.owner != one.id else "itself",
                ",".join(one.scopes),
                ",".join(one.models or ["all"]),
                str(one.requests_per_minute or "-"),
                str(one.tokens_per_minute or "-"),
                one.priority or "normal",
                _time(one.created),
                _expiry(one.expires),
            ]
            for one in keys
        ],
    )


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _expiry(seconds: int | None) -> str:
    if seconds is None:
        return "never"
    return _time(seconds) + (" (over)" if seconds <= time.time() else "")


@key.command(epilog=example("key revoke laptop"))
@click.argument("name", metavar="KEY")
@config_option
@json_option
def revoke(config: Path | None, as_json: bool, name: str) -> None:
    """Revoke the key with this name or id.

    Requests that run go on, new ones are refused. Its ATLAS sessions stay; a key made with --like before this
    reaches them.
    """
    from supervisor import api_keys  # noqa: PLC0415

    path = _path(config)
    with api_keys.locked(path) as file:
        gone = _found(file, name)
        left = [one for one in file.keys if one.id != gone.id]
        api_keys.save(path, file, left)
    if as_json:
        print_json({"file": str(path), "revoked": gone.public(), "left": len(left)})
        return
    say(f"Revoked {gone.name}.")
    if not left:
        say(f"No key is left, and requests still need one. To do without: delete {path} and start anew.")


def _path(config: Path | None) -> Path:
    from supervisor.api_keys import path_of  # noqa: PLC0415
    from supervisor.settings import load  # noqa: PLC0415

    return path_of(load(config).config.api)


def _found(file: KeysFile, name: str) -> ApiKey:
    found = file.find(name)
    if found is None:
        names = ", ".join(one.name for one in file.keys) or "none"
        raise NoSuchKey(f"there is no key {name!r}; there are: {names}")
    return found
