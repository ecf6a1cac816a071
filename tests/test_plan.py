"""How a model is run: which of llama-server's own work can be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest

from supervisor import plan
from supervisor.config import Config
from supervisor.models.gguf import read_header
from supervisor.models.model_files import Model
from supervisor.setup import native

GIB = 1 << 30
KV = 2 * 2 * 32 * 2 * 131072
"""Bytes of the KV cache of `tiny_model` over its whole context: K and V, two heads of 32 in f16, one layer."""


@pytest.fixture
def tiny_model(tmp_path: Path) -> Model:
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.gguf(gguf_files.llama(**{"llama__context_length": 131072})))
    return Model("m", path, (path,), None, GIB, 0.0, read_header(path), None)


@pytest.fixture
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_cpu_build", lambda server: True)


def command(model: Model, memory: int, own: dict[str, Any] | None = None, **performance: Any) -> list[str]:
    config = Config.model_validate({"models": {"overrides": {"m": own or {}}}, "performance": performance})
    return plan.command(Path("/x/llama-server"), model, config, Path("/run/1.sock"), lambda: memory)


def fits(command: list[str]) -> bool:
    """Whether llama-server would look how much fits into memory."""
    return "--fit" not in command


@pytest.mark.usefixtures("cpu_build")
class TestFit:
    def test_is_left_out_where_everything_fits_anyway(self, tiny_model: Model):
        assert command(tiny_model, 64 * GIB)[-2:] == ["--fit", "off"]
        needed = GIB + KV + plan.FIT_MARGIN
        assert not fits(command(tiny_model, needed))
        assert fits(command(tiny_model, needed - 1))

    def test_is_left_out_where_the_context_is_given(self, tiny_model: Model):
        assert not fits(command(tiny_model, GIB, context_size=4096))
        assert not fits(command(tiny_model, GIB, {"context_size": 4096}))
        assert "--ctx-size" in command(tiny_model, KV)
        assert not fits(command(tiny_model, KV))

    def test_makes_a_context_for_each_of_several_slots(self, tiny_model: Model):
        assert fits(command(tiny_model, 64 * GIB, parallel=2))
        assert fits(command(tiny_model, 64 * GIB, {"args": ["-np", "2"]}))
        assert not fits(command(tiny_model, 64 * GIB, parallel=2, context_size=4096))

    def test_goes_on_where_the_header_says_too_little(self, tiny_model: Model):
        unknown = Model("m", tiny_model.path, tiny_model.files, None, GIB, 0.0, None, None)
        assert fits(command(unknown, 64 * GIB))

    def test_can_be_asked_for(self, tiny_model: Model):
        assert command(tiny_model, 64 * GIB, {"args": ["--fit", "on"]})[-2:] == ["--fit", "on"]


@pytest.mark.usefixtures("cpu_build")
def test_the_first_request_is_the_warm_up_on_a_cpu(tiny_model: Model):
    assert "--no-warmup" in command(tiny_model, GIB)


def test_a_server_that_may_use_a_gpu_decides_what_fits_and_warms_up(tiny_model: Model):
    assert "--no-warmup" not in command(tiny_model, GIB)
    assert fits(command(tiny_model, 64 * GIB))
