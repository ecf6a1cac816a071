"""How is a wrong setting told to the person who wrote it: where, why, and what was probably meant?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from supervisor.config import Config
from supervisor.config_file import Keys, dotted

MASK = "********"

_SECRET_WORD = re.compile(
    r"(?:key|token|secret|password|passwd|passphrase|credential|authorization)s?(?:[^a-zA-Z]|$)", re.IGNORECASE
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

_NOUNS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "string_unicode": "valid text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "is_instance_of": "a path (a string)",
    "path_type": "a path (a string)",
}


def looks_secret(keys: Keys) -> bool:
    """Tell whether the keys name something secret, such as `api_key` or `env.HF_TOKEN`.

    Model ids do not count, nor do names of files, which only hold secrets.
    """
    names = keys[:2] + keys[3:] if keys[:2] == ("models", "overrides") else keys
    return any(_has_secret_word(name) and not name.endswith("_file") for name in names if isinstance(name, str))


def _has_secret_word(text: str) -> bool:
    return bool(_SECRET_WORD.search(_CAMEL.sub("_", text)))


def masked(keys: Keys, value: Any) -> Any:
    """Return a value of the configuration fit to be shown: secrets in it are replaced by asterisks."""
    if isinstance(value, dict):
        return {key: masked((*keys, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return _mask_flags(value) if not looks_secret(keys) else [MASK for _ in value]
    if looks_secret(keys) and isinstance(value, str):
        return MASK
    return value


def _mask_flags(args: list[Any]) -> list[Any]:
    """Mask the values of flags like `--api-key`, written as one argument or two."""
    result: list[Any] = []
    hide = False
    for arg in args:
        if not isinstance(arg, str):
            result.append(arg)
            hide = False
            continue
        flag, equals, _ = arg.partition("=")
        secret = arg.startswith("-") and _has_secret_word(flag)
        result.append(MASK if hide else f"{flag}={MASK}" if secret and equals else arg)
        hide = secret and not equals
    return result


def problems(error: ValidationError, where: str, data: Any) -> list[str]:
    """Turn a validation error about `data` into lines like `where: server.port: 99999 is not ...`."""
    unions: dict[Keys, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        unions.setdefault(_place(item["loc"], data), []).append(dict(item))
    lines = []
    for keys, items in unions.items():
        place = f"{where}: {dotted(keys)}" if keys else where
        lines.append(f"{place}: {_reason(keys, items)}")
    return lines


def _place(loc: tuple[int | str, ...], data: Any) -> Keys:
    """Return the part of a pydantic location that leads through the data, without the names of union members."""
    keys: Keys = ()
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break
        keys = (*keys, part)
    return keys


def _reason(keys: Keys, items: list[dict[str, Any]]) -> str:
    first = items[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        return f"unknown key; {meant(keys)}"
    value = shown(keys, first["input"])
    wanted = []
    guess = ""
    for item in items:
        message: str = item["msg"]
        if item["type"] in _NOUNS:
            wanted.append(_NOUNS[item["type"]])
        elif message.startswith("Input should be "):
            wanted.append(message.removeprefix("Input should be "))
            guess = guess or _near_choice(item)
        else:
            error = item.get("ctx", {}).get("error")
            return str(error) if error is not None else f"{value}: {message[:1].lower()}{message[1:]}"
    joint = ", " if " or " in wanted[-1] else " or "
    return f"{value} is not {joint.join(dict.fromkeys(wanted))}{guess}"


def _near_choice(item: dict[str, Any]) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
    close = get_close_matches(item["input"].lower(), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(keys: Keys, value: Any) -> str:
    """Return a short picture of a wrong value; never that of a secret, nor the content of a list or object."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if looks_secret(keys) or (isinstance(value, str) and _has_secret_word(value)):
        return "the value"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def meant(keys: Keys) -> str:
    """Return the hint for an unknown key: the nearest right name, else the names there are."""
    *parents, last = keys
    names = list(_fields(tuple(parents)))
    near = nearest(str(last), names)
    if near:
        return f"did you mean {near!r}?"
    if len(parents) <= 1:
        elsewhere = nearest(str(last), settings_by_key(), cutoff=0.8)
        if elsewhere:
            return f"did you mean {settings_by_key()[elsewhere]!r}?"
    if not names:
        return f"{dotted(tuple(parents))!r} has no settings yet"
    return f"known here: {', '.join(names)}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that looks most like `name` with case and hyphens ignored, or None."""
    close = get_close_matches(name[:80].lower().replace("-", "_"), list(names), n=1, cutoff=cutoff)
    return close[0] if close else None


@cache
def settings_by_key() -> dict[str, str]:
    """Return the dotted name of each setting by its last part; the first section wins where two share it."""
    result: dict[str, str] = {}
    for section in Config.model_fields:
        for key in _fields((section,)):
            result.setdefault(key, f"{section}.{key}")
    return result


def _fields(keys: Keys) -> Iterable[str]:
    """Return the names of the settings below `keys`; none where there is no model."""
    model: Any = Config
    for key in keys:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(key))
            model = field.annotation if field else None
        else:
            model = next(iter(get_args(model)[-1:]), None)
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()
