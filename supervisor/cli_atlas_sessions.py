"""Commands about the sessions of a running supervisor: how they are, save, load, reset and remove them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from supervisor.cli_options import client, client_options, example
from supervisor.console import print_json, say, size, table
from supervisor.errors import ModelNotFound

if TYPE_CHECKING:
    from supervisor.client import Client

Json = dict[str, Any]

FAILED = 1
NO_FOLDER = 501
"""HTTP status of a child without a folder for memory files."""

model_option = click.option("--model", "-m", metavar="MODEL", help="Only this one.  [default: all]")
one_model_option = click.option("--model", "-m", metavar="MODEL", help="Whose session.  [default: the default model]")
slot_option = click.option("--slot", type=click.IntRange(0), metavar="N", help="The slot.")


def path_of(route: str, model: str | None, **query: str) -> str:
    """Return the path of a route of the memory."""
    words = ({"model": model} if model else {}) | query
    return f"/v1/atlas/{route}" + (f"?{urlencode(words)}" if words else "")


def wanted_models(supervisor: Client, name: str | None) -> list[str]:
    """Return the ids of all models that can be served, or of the one with this name. Raises `ModelNotFound`."""
    listed = supervisor.models()
    if name is None:
        return [str(model["id"]) for model in listed if (model.get("status") or {}).get("value") != "invalid"]
    found = supervisor.find(name)
    if found is None:
        raise ModelNotFound(name, [], len(listed))
    return [str(found["id"])]


def files_of(supervisor: Client, model: str) -> list[Json]:
    """Return the memory files of a model; none where its llama-server has no folder for them."""
    from supervisor.client import ApiError  # noqa: PLC0415 (only commands that ask need it)

    try:
        files: list[Json] = supervisor.get(path_of("memory", model)).get("files") or []
    except ApiError as error:
        if error.status != NO_FOLDER:
            raise
        files = []
    return files


@click.command(epilog=example("atlas status", "atlas status --model tiny --json"))
@model_option
@client_options
def status(model: str | None, url: str | None, config: Path | None, as_json: bool) -> None:
    """Show which models have a memory, and the sessions in their slots."""
    supervisor = client(url, config)
    wanted = wanted_models(supervisor, model)
    listed = [one for one in supervisor.models() if one["id"] in wanted]
    found = [{"id": one["id"], "atlas_support": one.get("atlas_support"), **_asked(supervisor, one)} for one in listed]
    if as_json:
        print_json({"models": found})
        return
    rows = [_row(one["id"], slot) for one in found for slot in (one["status"] or {}).get("slots") or []]
    if rows:
        table(["MODEL", ">SLOT", "SESSION", ">TOKENS", ">ARCHIVED", ">MEMORY", "STATE"], rows)
        say("")
    for one in found:
        support = one["atlas_support"] or {}
        can = {True: "has a memory", False: "has no memory", None: "may have a memory"}[support.get("enabled")]
        reason = f": {support['reason']}" if support.get("reason") else ""
        say(f"{one['id']} ({one['state']}) {can}{reason}")


def _asked(supervisor: Client, model: Json) -> Json:
    """Return the state of a model and what its child says of its slots, None where there is nothing to ask."""
    from supervisor.client import ApiError  # noqa: PLC0415 (only commands that ask need it)

    state = str((model.get("status") or {}).get("value"))
    told = None
    if state == "loaded" and (model.get("atlas_support") or {}).get("enabled") is not False:
        try:
            told = supervisor.get(path_of("status", model["id"]))
        except ApiError as error:
            if error.code != "model_not_loaded":
                raise
            state = "unloaded"  # meanwhile
    return {"state": state, "status": told}


def _row(model: str, slot: Json) -> list[str]:
    session = slot.get("memory_file")
    state = "busy" if slot.get("is_processing") else ("saved" if slot.get("saved") else "not saved") if session else "-"
    return [
        model,
        str(slot.get("slot", "-")),
        str(session or "-"),
        str(slot.get("tokens_seen", "-")),
        str(slot.get("tokens_archived", "-")),
        size(slot.get("memory_bytes")),
        state,
    ]


@click.command(epilog=example("atlas save book", "atlas save --slot 0 copy-of-book"))
@click.argument("name", required=False, metavar="[NAME]")
@slot_option
@one_model_option
@client_options
def save(
    *, name: str | None, slot: int | None, model: str | None, url: str | None, config: Path | None, as_json: bool
) -> None:
    """Save a session now.

    Without NAME that of the slot used last.
    """
    body = _given(filename=name, slot=slot)
    _tell(client(url, config).post(path_of("memory/save", model, autoload="false"), body), "saved", as_json)


@click.command(epilog=example("atlas load book"))
@click.argument("name")
@slot_option
@one_model_option
@client_options
def load(
    *, name: str, slot: int | None, model: str | None, url: str | None, config: Path | None, as_json: bool
) -> None:
    """Bring a session into a slot, as its file has it.

    The model starts if need be.
    """
    body = _given(filename=name, slot=slot)
    _tell(client(url, config).post(path_of("memory/load", model), body), "loaded", as_json)


def _given(**values: Any) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def _tell(answer: Json, done: str, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    seconds = answer.get("ms", 0) / 1e3
    say(
        f"{answer.get('file')}: {answer.get('n_tokens')} tokens, {size(answer.get('bytes'))}, {done} in {seconds:.2f} s"
    )
    if answer.get("backup"):
        say(f"from the backup {answer['backup']}: the file is missing or corrupt")


@click.command(epilog=example("atlas reset --slot 0", "atlas reset --hard"))
@click.option("--hard", is_flag=True, help="Empty the slot; its file stays.")
@slot_option
@one_model_option
@client_options
def reset(
    *, hard: bool, slot: int | None, model: str | None, url: str | None, config: Path | None, as_json: bool
) -> None:
    """Let a slot forget which tokens got attention, or everything.

    Without --slot the one used last.
    """
    body = {"reset_type": "hard" if hard else "soft"} | _given(slot=slot)
    answer = client(url, config).delete(path_of("memory/reset", model, autoload="false"), body)
    if as_json:
        print_json(answer)
    else:
        say(f"slot {answer.get('slot')}: {answer.get('reset_type')} reset")


@click.command("rm", epilog=example("atlas rm book", "atlas rm --model tiny book letters"))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@one_model_option
@client_options
def remove(names: tuple[str, ...], model: str | None, url: str | None, config: Path | None, as_json: bool) -> int:
    """Delete sessions by name: exit with 1 when one stays.

    Their files go, the backups, and what a slot holds of them.
    """
    supervisor = client(url, config)
    results = [remove_one(supervisor, model, name) for name in names]
    if as_json:
        print_json(results)
    else:
        for result in results:
            say(f"{result['name']}: {result.get('error') or plural(result['deleted'], 'file') + ' deleted'}")
    return FAILED if any("error" in result for result in results) else 0


def remove_one(supervisor: Client, model: str | None, name: str) -> Json:
    """Delete one session; return how many files that were, or the error. Raises what concerns all of them."""
    from supervisor.client import ApiError  # noqa: PLC0415 (only commands that ask need it)

    try:
        return {"name": name, "deleted": int(supervisor.delete(path_of("memory", model, file=name)).get("deleted", 0))}
    except ApiError as error:
        if error.code == "model_not_found":
            raise
        return {"name": name, "error": error.message}


def plural(count: int, noun: str) -> str:
    """Return `1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
