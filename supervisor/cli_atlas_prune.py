"""`atlas prune`: delete the sessions that are too old, too many or too large."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supervisor.cli_atlas_sessions import FAILED, files_of, model_option, plural, remove_one, wanted_models
from supervisor.cli_options import client, client_options, example
from supervisor.console import duration, print_json, say, size, table
from supervisor.errors import SupervisorError

if TYPE_CHECKING:
    from supervisor.atlas_folder import Stored
    from supervisor.client import Client

Json = dict[str, Any]


TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SIZES = {
    prefix + unit: 1 << 10 * power for power, prefix in enumerate(["", "k", "m", "g", "t"]) for unit in ("", "b", "ib")
}


def seconds(text: str) -> float:
    """Return a time like `90m` in seconds."""
    return _amount(text, TIMES, "90m, 12h or 30d")


def bytes_of(text: str) -> int:
    """Return a size like `500M` in bytes."""
    return int(_amount(text, SIZES, "500M or 2G"))


def _amount(text: str, units: dict[str, int], example: str) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([a-z]*)", text.strip().lower(), re.ASCII)
    unit = units.get(match[2]) if match else None
    if match is None or unit is None:
        raise click.BadParameter(f"{text!r} is not like {example}")
    return float(match[1]) * unit


@click.command(epilog=example("atlas prune --older-than 30d --dry-run", "atlas prune --keep-count 10 memory"))
@click.argument(
    "folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="[FOLDER]"
)
@click.option("--older-than", type=seconds, metavar="TIME", help="Those saved longer ago: 90m, 12h, 30d.")
@click.option("--keep-count", type=click.IntRange(0), metavar="N", help="All but the N newest.")
@click.option("--max-bytes", type=bytes_of, metavar="SIZE", help="The oldest, until the others fit: 500M, 2G.")
@click.option("--dry-run", is_flag=True, help="Only show which.")
@model_option
@client_options
def prune(folder: Path | None, model: str | None, url: str | None, config: Path | None, **options: Any) -> int:
    """Delete sessions that are too old, too many or too large.

    Those in FOLDER and below; without FOLDER those of the running supervisor's models. Their backups go too. The
    limits hold for each model, or folder, on its own; SIZE is without backups. What cannot be read stays.
    """
    limits = {name: options[name] for name in ("older_than", "keep_count", "max_bytes")}
    if all(limit is None for limit in limits.values()):
        raise click.UsageError("say what goes: --older-than, --keep-count or --max-bytes")
    if folder is not None and model is not None:
        raise click.UsageError("--model asks the supervisor, which FOLDER goes without")
    place = _Folder(folder) if folder is not None else _Models(client(url, config), model)
    gone = _pruned(place, limits, dry_run=options["dry_run"])
    failed = any("error" in one for one in gone)
    if options["as_json"]:
        print_json({"dry_run": options["dry_run"], "sessions": gone})
    else:
        _print(gone, dry_run=options["dry_run"])
    return FAILED if failed else 0


def _pruned(place: _Folder | _Models, limits: Json, *, dry_run: bool) -> list[Json]:
    """Delete what is beyond the limits; return the sessions, each with the error when it stays."""
    from supervisor.atlas_folder import expendable  # noqa: PLC0415 (zstandard is slow to import)

    now = time.time()
    gone: list[Json] = []
    for where, files in place.stored().items():
        for file in expendable(files, now, **limits):
            row: Json = {"in": where, "name": file.name, "saved": round(file.saved), "bytes": file.bytes}
            result = {} if dry_run else place.remove(where, file.name)
            gone.append(row | ({"error": result["error"]} if "error" in result else {}))
    return gone


class _Models:
    """The sessions of a running supervisor, by model."""

    def __init__(self, supervisor: Client, model: str | None) -> None:
        self._supervisor = supervisor
        self._models = wanted_models(supervisor, model)

    def stored(self) -> dict[str, list[Stored]]:
        from supervisor.atlas_folder import Stored  # noqa: PLC0415 (zstandard is slow to import)

        return {
            model: [
                Stored(file["name"], file["saved"], file["bytes"])
                for file in files_of(self._supervisor, model)
                if "saved" in file
            ]
            for model in self._models
        }

    def remove(self, model: str, name: str) -> Json:
        return remove_one(self._supervisor, model, name)


class _Folder:
    """The sessions in a folder and below, by folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def stored(self) -> dict[str, list[Stored]]:
        from supervisor import atlas_file  # noqa: PLC0415 (zstandard is slow to import)
        from supervisor.atlas_folder import Stored  # noqa: PLC0415

        found: dict[str, list[Stored]] = {}
        for path in atlas_file.find_below(self._root):
            with suppress(atlas_file.CorruptMemory, OSError):
                memory = atlas_file.read(path)
                stored = Stored(path.stem, memory.header.session.saved, path.stat().st_size)
                found.setdefault(str(path.parent), []).append(stored)
        return found

    def remove(self, folder: str, name: str) -> Json:
        from supervisor import atlas_folder  # noqa: PLC0415 (zstandard is slow to import)

        try:
            return {"deleted": atlas_folder.remove(Path(folder), name)}
        except SupervisorError as error:
            return {"error": error.message}


def _print(gone: list[Json], *, dry_run: bool) -> None:
    now = time.time()
    if gone:
        rows = [
            [one["in"], one["name"], size(one["bytes"]), duration(max(0, now - one["saved"])), one.get("error", "")]
            for one in gone
        ]
        table(["IN", "SESSION", ">SIZE", ">AGE", "STAYS"], rows)
    done = sum("error" not in one for one in gone)
    say(f"{plural(done, 'session')} {'would be deleted' if dry_run else 'deleted'}")
