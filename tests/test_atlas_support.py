"""What `/v1/models` says of the memory of models that do not run, and of what a child reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
from tiny_models import NAMES, WITHOUT_MEMORY, make

from supervisor.atlas_support import MAX_TOKENS, Support, expected, reported
from supervisor.config import AtlasSection
from supervisor.models.gguf import read_header
from supervisor.models.model_files import Model


def model(path: Path, mmproj: Path | None = None, error: str | None = None) -> Model:
    return Model("m", path, (path,), mmproj, 1, 0.0, None if error else read_header(path), error)


def atlas(**values: Any) -> AtlasSection:
    return AtlasSection.model_validate({"enabled": "auto"} | values)


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return model(make(tmp_path / "llama.gguf", "llama"))


@pytest.mark.parametrize("name", NAMES)
def test_what_tests_run_with_a_memory_is_expected_to_have_one(tmp_path: Path, name: str) -> None:
    told = expected(model(make(tmp_path / "m.gguf", name)), atlas(), [])
    assert told == Support(True, "the child chooses window and cells when it loads", MAX_TOKENS)


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
@pytest.mark.parametrize("enabled", ["auto", "on"])
def test_what_cannot_have_one_is_not(tmp_path: Path, name: str, enabled: str) -> None:
    told = expected(model(make(tmp_path / "m.gguf", name)), atlas(enabled=enabled), [])
    assert told.enabled is False
    assert told.reason and told.max_context is None


def test_sizes_that_are_set_are_told(llama: Model) -> None:
    assert expected(llama, atlas(window=256, cells=128), []) == Support(True, None, MAX_TOKENS, 256, 128)
    assert expected(llama, atlas(cells=128), []).reason == "the child chooses window when it loads"


def test_off_is_off_unless_own_flags_ask_for_it(llama: Model) -> None:
    assert expected(llama, atlas(enabled="off"), ["--parallel", "1"]) == Support(False, "atlas.enabled is off")
    assert expected(llama, atlas(enabled="off"), ["--atlas"]).enabled is None


def test_what_is_not_certain_is_null_with_a_reason(tmp_path: Path, llama: Model) -> None:
    own_flags = expected(llama, atlas(), ["--embedding"])
    assert own_flags.enabled is None and "args" in str(own_flags.reason)
    fields = gguf_files.llama(**{"general__architecture": "strange"})
    strange = gguf_files.write(tmp_path / "s.gguf", gguf_files.gguf(fields))
    told = expected(model(strange), atlas(), [])
    assert told.enabled is None and "'strange'" in str(told.reason)


def test_keys_of_the_header_speak_against_it(tmp_path: Path, llama: Model) -> None:
    for key, reason in [("attention__causal", "causal"), ("attention__key_length_mla", "MLA")]:
        fields = {f"llama__{key}": False} if reason == "causal" else {f"llama__{key}": 64}
        if reason == "MLA":
            fields["llama__attention__value_length_mla"] = 64
        path = gguf_files.write(tmp_path / f"{reason}.gguf", gguf_files.gguf(gguf_files.llama(**fields)))
        assert reason in str(expected(model(path), atlas(), []).reason)
    assert "images" in str(expected(model(llama.path, mmproj=Path("/p.gguf")), atlas(), []).reason)
    assert expected(model(llama.path, error="damaged"), atlas(), []).enabled is False


def test_a_child_reports_its_memory_or_why_it_has_none() -> None:
    settings = {"memory_cells": 256, "window_size": 252}
    assert reported({"enabled": True, "slots": [], "config": settings}, []) == Support(True, None, MAX_TOKENS, 252, 256)
    log = ["1 ATLAS: an older reason: serving without it", "0.1 I ATLAS: M-RoPE: x: serving without it", "ready"]
    assert reported({"enabled": False}, log) == Support(False, "M-RoPE: x")
    assert reported({"enabled": False}, []).reason == "its llama-server runs without a memory"
