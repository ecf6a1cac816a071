"""How is one environment variable read? By pydantic-settings, which is large, so only where there is one."""

from __future__ import annotations

import json
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from supervisor import config_file
from supervisor.config import DELIMITER, ENV_PREFIX, Config


def parsed(name: str, value: str) -> dict[str, Any]:
    """Return the setting that the variable `name` gives, by section and key. Raises ValueError with all mistakes."""
    try:
        return _Variable(name, value)()
    except SettingsError as error:
        raise ValueError(str(error.__cause__ or error)) from None


class _Variables(BaseSettings, Config):
    """The configuration as pydantic-settings sees it."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter=DELIMITER)


class _Variable(EnvSettingsSource):
    """One environment variable; lists and objects in it are strict JSON, as in the file."""

    def __init__(self, name: str, value: str) -> None:
        super().__init__(_Variables)
        self.env_vars = {name.lower(): value}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Parse a list or an object; raises ValueError with all mistakes."""
        try:
            data, problems = config_file.parse(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'not JSON at character {error.pos + 1}: {error.msg}; example: ["a", "b"]') from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if problems:
            raise ValueError("; ".join(problems))
        return data
