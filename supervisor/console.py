"""What do commands print? Tables and lines for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(document: Any) -> None:
    """Print the one JSON document of a command with --json."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Print a line on standard output as it is; control characters are escaped, terminals obey nothing in it."""
    print(safe(text))


def safe(text: str) -> str:
    """Return the text with control characters and lone surrogates escaped; tabs stay."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: aligned and never cut in a pipe; in a terminal fitted to its width, long cells folded.

    A column whose name starts with `>` is aligned to the right; a last column without content is left out.
    """
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    right = [name.startswith(">") for name in columns]
    names = [name.removeprefix(">") for name in columns]
    cells = [[safe(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _terminal_table(names, right, cells)
        return
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in [names, *cells]:
        line = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(line).rstrip())


def _terminal_table(names: list[str], right: list[bool], rows: list[list[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415 (pipes need no rich)
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, to_right in zip(names, right, strict=True):
        drawn.add_column(name, justify="right" if to_right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    console().print(drawn)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a rich console that prints what it is given; it respects NO_COLOR and pipes."""
    from rich.console import Console  # noqa: PLC0415 (many commands need none)

    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def size(count: Any) -> str:
    """Return a number of bytes for people: `4.1 GiB`."""
    if not isinstance(count, int | float):
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: Any) -> str:
    """Return a time span for people: `2.4 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
