"""What the `atlas` settings turn into on a child's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from supervisor.config import Config
from supervisor.models.model_files import Model
from supervisor.plan import atlas_flags, atlas_of, stop_seconds

MODEL = Model("m", Path("/m.gguf"), (Path("/m.gguf"),), None, 1, 0.0, None, None)
MEMORY = Path("/memory/m")


def flags(atlas: dict[str, Any], own: dict[str, Any] | None = None, folder: Path | None = None) -> list[str]:
    return atlas_flags(atlas_of(config(atlas, own), MODEL), folder)


def config(atlas: dict[str, Any], own: dict[str, Any] | None = None) -> Config:
    return Config.model_validate({"atlas": atlas, "models": {"overrides": {"m": {"atlas": own}}}})


def test_off_is_the_default_and_adds_nothing() -> None:
    assert flags({}) == []
    assert flags({"cells": 256, "blend": 0.5}) == []


def test_only_what_is_set_becomes_a_flag() -> None:
    assert flags({"enabled": "on"}) == ["--atlas"]
    assert flags({"enabled": "auto", "refresh": 32}) == ["--atlas-auto", "--atlas-refresh", "32"]


def test_every_parameter_has_its_flag() -> None:
    values = {"cells": 256, "window": 128, "recall": 0.5, "refresh": 16, "blend": 0.0, "archive_max_mb": 512}
    assert (
        flags({"enabled": "on", **values})
        == (
            "--atlas --atlas-cells 256 --atlas-window 128 --atlas-recall 0.5 --atlas-refresh 16 "
            "--atlas-blend 0.0 --atlas-archive-max 512"
        ).split()
    )


def test_a_model_overrides_single_keys() -> None:
    assert flags({"enabled": "auto", "cells": 256}, {"cells": 64}) == ["--atlas-auto", "--atlas-cells", "64"]
    assert flags({"enabled": "on"}, {"enabled": "off"}) == []
    assert flags({}, {"enabled": "on"}) == ["--atlas"]


def test_memory_files_have_their_flags_where_there_is_a_folder() -> None:
    values = {"enabled": "auto", "memory_backup_count": 5, "memory_compress_level": -2, "auto_save_seconds": 0}
    assert flags({"enabled": "on"}, folder=MEMORY) == ["--atlas", "--atlas-memory-dir", "/memory/m"]
    assert (
        flags(values | {"memory_persist": True}, folder=MEMORY)
        == (
            "--atlas-auto --atlas-memory-dir /memory/m --atlas-memory-persist --atlas-memory-backup-count 5 "
            "--atlas-memory-compress -2 --atlas-auto-save-interval 0"
        ).split()
    )
    assert flags(values) == ["--atlas-auto"]
    assert flags(values, {"enabled": "off"}, MEMORY) == []
    own = {"memory_persist": True, "memory_backup_count": 0}
    assert flags({"enabled": "on"}, own, MEMORY)[3:] == ["--atlas-memory-persist", "--atlas-memory-backup-count", "0"]


def test_limits_of_memory_files_have_their_flags() -> None:
    limits = {"memory_max_sessions": 100, "memory_max_mb": 2048, "memory_max_age_hours": 0}
    assert (
        flags({"enabled": "on"} | limits, folder=MEMORY)[3:]
        == "--atlas-memory-max-sessions 100 --atlas-memory-max-mb 2048 --atlas-memory-max-age 0".split()
    )


def test_a_child_with_a_memory_has_the_time_to_save_it() -> None:
    assert stop_seconds(config({}), MODEL) == 5
    assert stop_seconds(config({"enabled": "auto", "save_seconds": 7}), MODEL) == 12
    assert stop_seconds(config({"enabled": "auto"}, {"enabled": "off"}), MODEL) == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", "yes"),
        ("memory_persist", 2),
        ("memory_backup_count", -1),
        ("memory_backup_count", 1001),
        ("memory_compress_level", 20),
        ("memory_compress_level", -8),
        ("auto_save_seconds", -1),
        ("memory_max_sessions", -1),
        ("memory_max_mb", 1 << 25),
        ("memory_max_age_hours", 0.5),
        ("cells", -16),
        ("cells", 17),
        ("window", 63),
        ("recall", 1.1),
        ("refresh", 0),
        ("refresh", 260),
        ("blend", -0.1),
        ("blend", float("nan")),
        ("archive_max_mb", 0),
    ],
)
def test_ranges(key: str, value: Any) -> None:
    for where in ({"atlas": {key: value}}, {"models": {"overrides": {"m": {"atlas": {key: value}}}}}):
        with pytest.raises(ValidationError, match=key):
            Config.model_validate(where)
