"""What the `atlas` settings turn into on a child's command line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from supervisor.config import Config, ModelOverride
from supervisor.plan import atlas_flags


def flags(atlas: dict[str, Any], own: dict[str, Any] | None = None) -> list[str]:
    config = Config.model_validate({"atlas": atlas})
    return atlas_flags(config, ModelOverride.model_validate({"atlas": own}))


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", "yes"),
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
