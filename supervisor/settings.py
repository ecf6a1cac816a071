"""Which settings hold? Defaults, the configuration file, the environment and the command line, made into one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from supervisor import config_file, explain
from supervisor.config import DELIMITER, ENV_PREFIX, Config, ModelOverride, sections
from supervisor.config_file import Keys, dotted
from supervisor.errors import ConfigError

__all__ = ["ENV_PREFIX", "Row", "Settings", "changed", "load", "locate", "show"]

MAX_PROBLEMS = 50

OVERRIDES = ("models", "overrides")

Values = dict[Keys, Any]
"""Settings that one layer names: `("server", "port")`, and `("models", "overrides", id, key)` below it."""


@dataclass(frozen=True)
class Settings:
    """The configuration in force and where it came from.

    `path` is the configuration file, if there is one; relative paths in it and the default models folder are
    relative to `base`. `sources` gives for each dotted key "default", the file's name, "env NAME" or
    "command line".
    """

    config: Config
    path: Path | None
    base: Path
    sources: dict[str, str]


class Row(NamedTuple):
    """One line of `show`: a setting, its value as JSON with secrets masked, its source and its meaning."""

    key: str
    value: str
    source: str
    description: str


def load(
    path: Path | None = None,
    cli: Mapping[str, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Return the settings in force; the command line wins over the environment, the file and the defaults.

    `path` is the file to read; without one see `locate`. `cli` holds what the command line gave, by section
    and key; None counts as not given. Raises ConfigError with every mistake in every layer at once.
    """
    cwd = Path.cwd()
    path = path or locate(environ)
    base = cwd
    problems: list[str] = []
    values: Values = {}
    sources: dict[str, str] = {}

    if path is not None:
        path = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 (resolve would follow symlinks)
        base = path.parent
        label = str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
        found = _from_file(path, label, problems)
        values.update(found)
        sources.update(dict.fromkeys(map(dotted, found), path.name))
    for name, value in environ.items():
        if name.upper().startswith(ENV_PREFIX) and DELIMITER in name[len(ENV_PREFIX) :] and value:
            found = _from_variable(name, value, cwd, problems)
            values.update(found)
            sources.update(dict.fromkeys(map(dotted, found), f"env {name}"))
    given = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in (cli or {}).items()
    }
    found = _validated(given, cwd, "command line", problems)
    values.update(found)
    sources.update(dict.fromkeys(map(dotted, found), "command line"))

    if problems:
        raise ConfigError(_bounded(problems))
    values.setdefault(("models", "directory"), base / Config().models.directory)
    try:
        config = Config.model_validate(_nested(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_bounded(explain.problems(error, "configuration", _nested(values)))) from None
    names = [dotted(keys) for keys in _in_force(config)]
    return Settings(config, path, base, {name: sources.get(name, "default") for name in names})


def locate(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the configuration file used when none is named: LLAMA_SUPERVISOR_CONFIG, ./config.json, the user's."""
    named = environ.get(f"{ENV_PREFIX}CONFIG")
    if named:
        return Path(named)
    user = platformdirs.user_config_path("llama-supervisor", appauthor=False)
    for path in (Path("config.json"), user / "config.json"):
        if path.exists():
            return path
    return None


def show(settings: Settings) -> list[Row]:
    """Return every setting with its value, source and meaning, secrets masked, in the order of the schema."""
    rows = []
    for keys, value in _in_force(settings.config).items():
        plain = int(value) if isinstance(value, float) and value.is_integer() else explain.masked(keys, value)
        text = json.dumps(plain, ensure_ascii=False)
        name = dotted(keys)
        rows.append(Row(name, text, settings.sources.get(name, "default"), _field(keys).description or ""))
    return rows


def changed(old: Config, new: Config) -> list[str]:
    """Return the dotted keys of the settings that differ, in the order of the schema."""
    before, after = _in_force(old), _in_force(new)
    differing = (keys for keys in {**before, **after} if before.get(keys) != after.get(keys))
    return [dotted(keys) for keys in differing if keys != OVERRIDES]  # which stands there only when it is empty


def _field(keys: Keys) -> FieldInfo:
    """Return the declaration of a setting."""
    if keys[:2] == OVERRIDES and len(keys) > 3:
        return ModelOverride.model_fields[str(keys[3])]
    return sections()[str(keys[0])].model_fields[str(keys[1])]


def _from_file(path: Path, label: str, problems: list[str]) -> Values:
    """Return what the configuration file sets, or add its mistakes to `problems`."""
    try:
        data, mistakes = config_file.read(path, label)
    except ConfigError as error:
        problems += error.problems
        return {}
    problems += mistakes
    return _validated(data, path.parent, label, problems)


def _from_variable(name: str, value: str, cwd: Path, problems: list[str]) -> Values:
    """Return the setting that one environment variable gives."""
    label = f"env {name}"
    section, _, key = name[len(ENV_PREFIX) :].lower().partition(DELIMITER)
    names = {_variable_name(*keys): keys for keys in _leaves(Config().model_dump())}
    if name.upper() not in names:
        near = explain.nearest(f"{section}{DELIMITER}{key}", [known[len(ENV_PREFIX) :].lower() for known in names])
        hint = f"did you mean {ENV_PREFIX}{near.upper()}?" if near else "docs/configuration.md lists the names"
        problems.append(f"{label}: names no setting; {hint}")
        return {}
    if value == "null":
        return _validated({section: {key: None}}, cwd, label, problems, named=True)
    from supervisor.variables import parsed  # noqa: PLC0415 (large, and most have no variables)

    try:
        data = parsed(name, value)
    except ValueError as error:
        problems.append(f"{label}: {error}")
        return {}
    is_text = isinstance(data[section][key], str)
    return _validated(data, cwd, label, problems, strict=not is_text, named=True)


def _variable_name(section: str | int, key: str | int) -> str:
    return f"{ENV_PREFIX}{section}{DELIMITER}{key}".upper()


def _validated(
    data: dict[str, Any], base: Path, label: str, problems: list[str], *, strict: bool = True, named: bool = False
) -> Values:
    """Check one layer; return what it sets, or add its mistakes to `problems`. `named`: the label names the key."""
    mistakes: list[str] = []
    resolved = _with_paths(data, base, mistakes)
    values: Values = {}
    try:
        config = Config.model_validate(resolved, strict=strict)
        values = _leaves(config.model_dump(exclude_unset=True))
    except ValidationError as error:
        mistakes += explain.problems(error, "", resolved)
    for mistake in mistakes:
        line = mistake.removeprefix(": ")
        if named:
            keys = next(f"{section}.{key}" for section, keys in data.items() for key in keys)
            line = line.removeprefix(keys).removeprefix(": ").removeprefix(".")
        problems.append(f"{label}: {line}")
    return values if not mistakes else {}


def _with_paths(data: dict[str, Any], base: Path, mistakes: list[str]) -> dict[str, Any]:
    """Return the data with its path settings absolute, relative ones starting at `base`."""
    result = dict(data)
    for section, model in sections().items():
        keys = result.get(section)
        if not isinstance(keys, dict):
            continue
        result[section] = keys = dict(keys)
        for key, option in model.model_fields.items():
            if option.annotation not in (Path, Path | None) or not isinstance(keys.get(key), str | Path):
                continue
            text = str(keys[key])
            home = os.path.expanduser(text)  # noqa: PTH111 (Path.expanduser raises for unknown users)
            if not text or home.startswith("~") or not _is_file_name(text):
                mistakes.append(f"{section}.{key}: {explain.shown((section, key), text)} is not a usable path")
                del keys[key]
            else:
                keys[key] = Path(os.path.abspath(base / home))  # noqa: PTH100 (resolve would follow symlinks)
    return result


def _is_file_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _leaves(data: dict[str, Any]) -> Values:
    """Return the settings in a dumped configuration by their keys."""
    leaves: Values = {}
    for section, keys in data.items():
        for key, value in keys.items():
            if (section, key) != OVERRIDES or not value:
                leaves[section, key] = value
                continue
            for model, settings in value.items():
                leaves.update({(*OVERRIDES, model, name): item for name, item in settings.items()})
                if not settings:
                    leaves[(*OVERRIDES, model)] = {}
    return leaves


def _in_force(config: Config) -> Values:
    """Return all settings as JSON values; of a model's overrides only those that are set."""
    data = config.model_dump(mode="json")
    data["models"]["overrides"] = {
        model: override.model_dump(mode="json", exclude_unset=True)
        for model, override in config.models.overrides.items()
    }
    return _leaves(data)


def _nested(values: Values) -> dict[str, Any]:
    """Return settings by key as nested objects; the opposite of `_leaves`."""
    result: dict[str, Any] = {}
    for keys, value in sorted(values.items(), key=lambda item: len(item[0])):
        node = result
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = dict(value) if isinstance(value, dict) else value
    return result


def _bounded(problems: list[str]) -> list[str]:
    lines = list(dict.fromkeys(problems))
    more = len(lines) - MAX_PROBLEMS
    return lines if more <= 0 else [*lines[:MAX_PROBLEMS], f"... and {more} more"]
