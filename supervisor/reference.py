"""Which parts of docs/ are generated, and from what? `python -m supervisor.reference` writes them anew."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supervisor.config import AtlasOverride, ModelOverride, Section, sections

BEGIN, END = "<!-- generated: do not edit, run scripts/docs -->", "<!-- /generated -->"

_LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def reference_markdown() -> str:
    """Return the reference of all settings: a heading and a table for each section."""
    parts = []
    for name, section in sections().items():
        parts += _section_markdown(f"`{name}`", section, name)
        if name == "models":
            parts += _section_markdown("`models.overrides.<model id>`", ModelOverride, None)
            parts += _section_markdown("`models.overrides.<model id>.atlas`", AtlasOverride, None)
    return "\n".join(parts).strip() + "\n"


def _section_markdown(title: str, section: type[Section], env_name: str | None) -> list[str]:
    """Return the heading and the table of one section; without `env_name` its keys have no variables."""
    lines = [f"### {title}", "", (section.__doc__ or "").strip(), ""]
    described = section.model_json_schema()
    properties = described.get("properties", {})
    if not properties:
        return lines
    variable = "Environment variable" if env_name else None
    lines += _row(["Key", "Type", "Default", variable, "Meaning"])
    lines += _row(["---"] * (5 if variable else 4))
    for key, field in properties.items():
        default = json.dumps(field.get("default"))
        env = f"`LLAMA_SUPERVISOR_{env_name}__{key}`".upper() if env_name else None
        lines += _row([f"`{key}`", kind(field), f"`{default}`", env, field.get("description", "")])
    return [*lines, ""]


def _row(cells: list[str | None]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells if cell is not None) + " |"]


def kind(field: dict[str, Any]) -> str:  # noqa: PLR0911 (one return for each type)
    """Return the type and limits of a JSON schema property in words: `whole number, ≥ 0, ≤ 65535`."""
    if "anyOf" in field:
        return " or ".join(kind(option) for option in field["anyOf"])
    if "enum" in field:
        return " or ".join(f'`"{choice}"`' for choice in field["enum"])
    if "$ref" in field:
        return "object"
    match field.get("type"):
        case "array":
            return f"list of {kind(field['items'])}s"
        case "object":
            values = field.get("additionalProperties", {})
            return "objects by name" if "$ref" in values else f"{kind(values)}s by name"
        case "string":
            return "path" if field.get("format") == "path" else "string"
        case "boolean":
            return "`true` or `false`"
        case "integer":
            name = "whole number"
        case other:
            name = str(other)
    limits = [text.format(_plain(field[limit])) for limit, text in _LIMITS.items() if limit in field]
    return ", ".join([name, *limits])


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def cli_markdown() -> str:
    """Return the `--help` output of every command."""
    import click  # noqa: PLC0415 (only the CLI and this need it)

    from supervisor.cli import cli  # noqa: PLC0415

    parts = []
    root = click.Context(cli, info_name="llama-supervisor", terminal_width=78, **cli.context_settings)
    for path, context in _commands(cli, root):
        parts += [f"## {path}", "", "```console", f"$ {path} --help", context.get_help(), "```", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


def _commands(command: Any, context: Any) -> Iterator[tuple[str, Any]]:
    """Yield each command's full name and context, a group before its commands."""
    import click  # noqa: PLC0415

    yield context.command_path, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, click.Context(child, info_name=name, parent=context))


def filled(text: str, generated: str) -> str:
    """Return the page with what is between its markers replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    page, count = pattern.subn(lambda _: f"{BEGIN}\n\n{generated.strip()}\n\n{END}", text)
    if count != 1:
        raise ValueError(f"the page must have the markers {BEGIN} and {END} once; found {count}")
    return page


def stale(folder: Path, *, write: bool = False) -> list[Path]:
    """Return the pages in `folder` whose generated part is out of date; with `write` bring them up to date."""
    pages = {"configuration.md": reference_markdown, "cli.md": cli_markdown}
    changed = []
    for name, generate in pages.items():
        path = folder / name
        old = path.read_text(encoding="utf-8")
        new = filled(old, generate())
        if new.split() != old.split():
            changed.append(path)
        if write and new != old:
            path.write_text(new, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for page in stale(Path("docs"), write="--check" not in sys.argv):
        print(f"{page}: out of date" if "--check" in sys.argv else f"{page}: written")
