"""How is JSON that a person wrote read, so that every mistake has a place and a reason?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.errors import ConfigError

MAX_BYTES = 1 << 20
"""Largest configuration file; a real one has a few KiB."""

MAX_DEPTH = 32
MAX_DIGITS = 20

Keys = tuple[str | int, ...]
"""Where a value stands: object keys and list positions from the top."""

Repeated = dict[int, tuple[dict[str, Any], list[str]]]
"""Objects with repeated keys by `id`; the object is kept beside its keys so that the id stays its own."""


@dataclass(frozen=True)
class Refused:
    """Stands where a number stood that JSON or Python cannot hold; `reason` says why."""

    reason: str


def dotted(keys: Keys) -> str:
    """Return the keys as people write them: `models.overrides.tiny.args[0]`; odd characters are escaped."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
            continue
        name = key if key.isprintable() and key else repr(key)
        name = name if len(name) <= 80 else name[:77] + "..."
        text += f".{name}" if text else name
    return text


def read(path: Path, label: str) -> tuple[dict[str, Any], list[str]]:
    """Read a configuration file; return its object and one line for each mistake, starting with `label`.

    Values with a mistake are left out of the object, so that the rest can still be checked. Raises ConfigError
    when there is no object to check.
    """
    text = _text(path, label)
    try:
        data, problems = parse(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{label}:{error.lineno}:{error.colno}: {error.msg}"]) from None
    except RecursionError:
        raise ConfigError([f"{label}: nested too deeply"]) from None
    problems = [f"{label}: {problem}" for problem in problems]
    if not isinstance(data, dict):
        raise ConfigError(problems or [f'{label}: the top must be an object: {{"server": {{...}}, ...}}'])
    return data, problems


def _text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError([f"{label}: larger than 1 MiB, so it is no configuration"])
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        reason = "no such file"
    except IsADirectoryError:
        reason = "is a folder, not a file"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text at byte {error.start + 1}"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except ValueError as error:
        reason = f"cannot be read: {error}"
    raise ConfigError([f"{label}: {reason}"])


def parse(text: str) -> tuple[Any, list[str]]:
    """Parse strict JSON; return the value and its mistakes (repeated keys, impossible numbers, depth).

    Raises json.JSONDecodeError for text that is no JSON, and RecursionError for thousands of brackets.
    """
    repeated: Repeated = {}

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                repeated.setdefault(id(result), (result, []))[1].append(key)
            result[key] = value
        return result

    data = json.loads(
        text,
        object_pairs_hook=pairs,
        parse_constant=lambda name: Refused(f"{name} is not a JSON number"),
        parse_int=_whole_number,
        parse_float=_number,
    )
    problems: list[str] = []
    return _clean(data, (), repeated, problems), problems


def _whole_number(text: str) -> int | Refused:
    digits = len(text.lstrip("-"))
    return int(text) if digits <= MAX_DIGITS else Refused(f"a number of {digits} digits is too large")


def _number(text: str) -> float | Refused:
    value = float(text)
    shown = text if len(text) <= MAX_DIGITS else text[:MAX_DIGITS] + "..."
    return value if abs(value) != float("inf") else Refused(f"{shown} is too large for a number")


def _clean(value: Any, keys: Keys, repeated: Repeated, problems: list[str]) -> Any:
    """Return the value without its refused parts, which are added to `problems` with their place."""
    if len(keys) > MAX_DEPTH:
        problems.append(f"{dotted(keys[:2])}: nested too deeply")
        return None
    if isinstance(value, Refused):
        problems.append(f"{dotted(keys)}: {value.reason}" if keys else value.reason)
        return None
    if isinstance(value, list):
        items = [_clean(item, (*keys, index), repeated, problems) for index, item in enumerate(value)]
        return [item for item, old in zip(items, value, strict=True) if not _dropped(item, old)]
    if isinstance(value, dict):
        _, twice = repeated.get(id(value), (value, []))
        problems += [f"{dotted((*keys, key))}: appears twice" for key in dict.fromkeys(twice)]
        cleaned = {key: _clean(item, (*keys, key), repeated, problems) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if not _dropped(item, value[key])}
    return value


def _dropped(cleaned: Any, original: Any) -> bool:
    return cleaned is None and original is not None
