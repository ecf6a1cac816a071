"""Commands about memory files: which are there, what is in one, is it whole, which can go?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supervisor.cli_atlas_eval import evaluate
from supervisor.cli_atlas_prune import prune
from supervisor.cli_atlas_sessions import files_of, load, model_option, remove, reset, save, status, wanted_models
from supervisor.cli_options import client, client_options, example, json_option
from supervisor.console import print_json, say, table

if TYPE_CHECKING:
    from supervisor.client import Client

Json = dict[str, Any]


@click.group("atlas", epilog=example("atlas status", "atlas eval --model smollm2.gguf --text book.txt"))
def atlas() -> None:
    """Look after the long-context memory and its files."""


for command in (evaluate, load, prune, remove, reset, save, status):
    atlas.add_command(command)

folder_argument = click.argument(
    "folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="[FOLDER]"
)
files_argument = click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE..."
)


@atlas.command("list", epilog=example("atlas list", "atlas list --model tiny", "atlas list memory"))
@folder_argument
@model_option
@client_options
def list_files(folder: Path | None, model: str | None, url: str | None, config: Path | None, as_json: bool) -> None:
    """List memory files.

    Those in FOLDER and below; without FOLDER those of the running supervisor's models.
    """
    if folder is None:
        _list_models(client(url, config), model, as_json)
        return
    from supervisor import atlas_file  # noqa: PLC0415 (zstandard is slow to import)

    rows: list[Json] = []
    for path in atlas_file.find_below(folder):
        row: Json = {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size}
        row["backups"] = len(atlas_file.backups(path))
        try:
            header = atlas_file.read(path).header
            row |= {"tokens": header.session.n_tokens, "saved": header.session.saved}
            row |= {"model": str(header.model.get("description", ""))}
        except atlas_file.CorruptMemory as error:
            row["error"] = str(error)
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    cells = [
        [row["file"], str(row.get("tokens", "-")), f"{row['bytes'] / 1e6:.1f} MB", str(row["backups"])]
        + ([row["error"]] if "error" in row else [f"{_time(row['saved'])}  {row['model']}"])
        for row in rows
    ]
    table(["FILE", ">TOKENS", ">SIZE", ">BACKUPS", "SAVED"], cells)


def _list_models(supervisor: Client, model: str | None, as_json: bool) -> None:
    rows: list[Json] = []
    for id in wanted_models(supervisor, model):
        rows += [{"model_id": id, **file} for file in files_of(supervisor, id)]
    if as_json:
        print_json(rows)
        return
    cells = [
        [
            row["model_id"],
            row.get("file", ""),
            str(row.get("n_tokens", "-")),
            _size(row.get("bytes")),
            _time(row["saved"]) if "saved" in row else "-",
            _remark(row),
        ]
        for row in rows
    ]
    table(["MODEL", "FILE", ">TOKENS", ">SIZE", "SAVED", "REMARK"], cells)


def _remark(row: Json) -> str:
    return str(row.get("reason") or "") if row.get("compatible") is False else ""


def _size(count: Any) -> str:
    return f"{count / 1e6:.1f} MB" if isinstance(count, int) else "-"


@atlas.command("inspect", epilog=example("atlas inspect memory/book.atlas --json"))
@files_argument
@json_option
def inspect(files: tuple[Path, ...], as_json: bool) -> None:
    """Show what memory files say about themselves."""
    from supervisor import atlas_file  # noqa: PLC0415 (zstandard is slow to import)

    found = [atlas_file.read(path).summary() for path in files]
    if as_json:
        print_json(found)
        return
    for about in found:
        session = about["session"]
        say(f"{about['file']}: {session['n_tokens']} tokens, {session['n_archived']} of them archived")
        say(f"  model    {about['model'].get('description', '')} ({about['model'].get('hash', '')})")
        grown = f", {about['generations'] - 1} of its saves behind the first" if about["generations"] > 1 else ""
        say(f"  created  {_time(session['created'])}, saved {_time(session['saved'])}{grown}")
        say(f"  cells    {about['params'].get('cells')} memory cells, window {about['params'].get('window')}")
        for purpose, part in about["parts"].items():
            say(f"  {purpose:8} {part['stored'] / 1e6:.1f} of {part['raw'] / 1e6:.1f} MB in {part['frames']} frames")


@atlas.command("verify", epilog=example("atlas verify memory/*.atlas"))
@files_argument
@json_option
def verify(files: tuple[Path, ...], as_json: bool) -> None:
    """Read memory files completely: exit with 1 when one is corrupt."""
    from supervisor import atlas_file  # noqa: PLC0415 (zstandard is slow to import)

    results: list[Json] = []
    for path in files:
        result: Json = {"file": str(path), "ok": True}
        try:
            atlas_file.read(path).verify()
        except atlas_file.CorruptMemory as error:
            result |= {"ok": False, "error": str(error)}
        results.append(result)
        if not as_json:
            say(f"{path}: {'ok' if result['ok'] else result['error']}")
    if as_json:
        print_json(results)
    if not all(result["ok"] for result in results):
        raise SystemExit(1)


def _time(unix: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))
    except (ValueError, OverflowError, OSError):
        return "?"
