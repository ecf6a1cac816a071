"""Which models can have the long-context memory, and how large is it? What is not certain is null, with the reason.

A child says it of its model when it runs. Before that the GGUF's header tells some: the tables are those of llama.cpp
b11434 (`llama-arch.cpp`, `llama_model_rope_type`), and the reasons the child's own (`llama_atlas::unsupported`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from supervisor.config import AtlasSection
from supervisor.models.catalog import Model
from supervisor.models.gguf import Header

MAX_TOKENS = 1 << 22
"""Longest sequence with a memory (LLAMA_ATLAS_MAX_TOKENS)."""

TRIED = frozenset(["llama", "phi3", "gemma2", "gemma3", "qwen2", "qwen3"])
"""Architectures that tests run with a memory; of others, only loading one tells."""

REASONS = {
    "the model's attention is not causal": "dream gemma-embedding llada llada-moe rnd1",
    "encoder-decoder models have no memory that could slide": "t5 t5encoder",
    "recurrent and hybrid models keep their past in a state, not in KV cells": (
        "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h "
        "nemotron_h_moe qwen3next kimi-linear bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp deepseek4 "
        "minimax-01"
    ),
    "M-RoPE positions (vision models) cannot be rotated to another place": "qwen2vl paddleocr qwen3vl qwen3vlmoe",
    "ALiBi biases depend on the true distance": "bloom refact jina-bert-v2",
    "the model's positions are not rotary (RoPE)": "gpt2 mpt jais starcoder",
}
"""Architectures that surely cannot have a memory, by the reason."""

_BY_ARCHITECTURE = {name: reason for reason, names in REASONS.items() for name in names.split()}
_FELL_BACK = re.compile(r"ATLAS: (.*): serving without it")


@dataclass(frozen=True)
class Support:
    """What `/v1/models` says of a model's memory. Sizes in tokens, per sequence."""

    enabled: bool | None
    reason: str | None = None
    max_context: int | None = None
    window: int | None = None
    memory_cells: int | None = None


def expected(model: Model, atlas: AtlasSection, args: list[str]) -> Support:
    """Return what is certain of a model that does not run, from its header and its settings."""
    if atlas.enabled == "off":
        asked = any(arg.startswith("--atlas") for arg in args)
        return Support(None, _ARGS) if asked else Support(False, "atlas.enabled is off")
    reason = f"it cannot be served: {model.error}" if model.error else against(model)
    if reason is not None:
        return Support(False, reason)
    if args:
        return Support(None, _ARGS)
    architecture = model.header.architecture if model.header else None
    if architecture not in TRIED:
        return Support(None, f"only loading it tells whether the architecture {architecture!r} can have a memory")
    chosen = [name for name in ("window", "cells") if getattr(atlas, name) is None]
    later = f"the child chooses {' and '.join(chosen)} when it loads" if chosen else None
    return Support(True, later, MAX_TOKENS, atlas.window, atlas.cells)


_ARGS = "its own `args` may decide; loading it tells"


def against(model: Model) -> str | None:
    """Return why a model surely cannot have a memory, None when nothing is known against it."""
    header = model.header
    if header is None or header.architecture is None:
        return None
    if _number(header, "attention.causal") is False:
        return "the model's attention is not causal"
    if reason := _BY_ARCHITECTURE.get(header.architecture):
        return reason
    if _number(header, "attention.key_length_mla") and _number(header, "attention.value_length_mla"):
        return "multi-head latent attention (MLA) shares one compressed key among the heads"
    if model.mmproj is not None:
        return "images and audio take positions of their own"
    return None


def _number(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def reported(status: Mapping[str, Any], log: Iterable[str]) -> Support:
    """Return what a child says: its `/v1/atlas/status`, and in its log why it serves without a memory."""
    if not status.get("enabled"):
        told = [match[1] for line in log if (match := _FELL_BACK.search(line))]
        return Support(False, told[-1] if told else "its llama-server runs without a memory")
    settings = status.get("config") or {}
    return Support(True, None, MAX_TOKENS, settings.get("window_size"), settings.get("memory_cells"))
