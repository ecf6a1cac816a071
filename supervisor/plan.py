"""How should this model run on this machine? From the GGUF's header and the settings to a command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

from supervisor import atlas_folder
from supervisor.config import AtlasSection, Config, ModelOverride, PerformanceSection
from supervisor.models.catalog import Model
from supervisor.models.gguf import Header
from supervisor.setup import native

KV_SHARE = 0.25
"""Share of the machine's memory that one model's KV cache may take when no context is configured."""

MIN_CONTEXT = 2048
"""Context in tokens below which the automatic choice does not go, unless the model's own is smaller."""

FIT_MARGIN = 2 << 30
"""Bytes of the machine's memory that must be left beside weights and KV cache for `--fit` to have nothing to do."""


def kv_bytes_per_token(header: Header) -> int:
    """Return the bytes of K and V for one token in f16, over all layers; 0 when the header does not tell."""
    if not (header.block_count and header.head_count_kv and header.embedding_length and header.head_count):
        return 0
    default = header.embedding_length // header.head_count
    per_head = (header.key_length or default) + (header.value_length or default)
    return header.block_count * header.head_count_kv * per_head * 2


def choose_context(header: Header, memory: int) -> int:
    """Return the context in tokens for a machine with `memory` bytes: the model's own, halved until it fits."""
    context = header.context_length or 0
    per_token = kv_bytes_per_token(header)
    while context > MIN_CONTEXT and context * per_token > memory * KV_SHARE:
        context = max(MIN_CONTEXT, context // 2)
    return context


def needs_no_fit(model: Model, override: ModelOverride, performance: PerformanceSection, memory: int) -> bool:
    """Return whether llama-server's `--fit` would change nothing on a machine without a GPU and `memory` bytes.

    There it only cuts a context that nobody set (and makes one for several slots), and to find out it loads the
    vocabulary a second time: a third of the start of a small model, nearly half with 260,000 tokens.
    """
    header = model.header
    if override.context_size or performance.context_size:
        return True
    if performance.parallel is not None or {"-np", "--parallel"} & set(override.args):
        return False
    if header is None or not header.context_length or not (per_token := kv_bytes_per_token(header)):
        return False
    context = choose_context(header, memory)
    return context != header.context_length or model.size + context * per_token + FIT_MARGIN <= memory


def command(
    binary: Path,
    model: Model,
    config: Config,
    socket: Path,
    total_memory: Callable[[], int] = lambda: psutil.virtual_memory().total,
    *,
    folder: Path | None = None,
    slots: Path | None = None,
    budget: int | None = None,
) -> list[str]:
    """Return the argument vector that starts `model` on `socket`. Later flags win over earlier ones.

    `folder` is where its memory files are, `slots` where the prompts of its slots go; without one it has none. `budget`
    is what all models may take together, in bytes; None: the machine's memory.
    """
    override = override_for(config, model)
    performance = config.performance
    args = [str(binary), "--model", str(model.path), "--host", str(socket)]
    args += ["--alias", ",".join([_alias(model.id), *(_alias(alias) for alias in model.aliases)])]
    args += ["--cors-origins", "localhost"]
    if model.mmproj is not None:
        args += ["--mmproj", str(model.mmproj)]
    context = override.context_size or performance.context_size
    if context is None and model.header is not None:
        memory = total_memory()
        chosen = choose_context(model.header, memory if budget is None else min(budget, memory))
        context = chosen if chosen != model.header.context_length else None
    if context:
        args += ["--ctx-size", str(context)]
    if performance.threads is not None:
        args += ["--threads", str(performance.threads)]
    if performance.batch_size is not None:
        args += ["--batch-size", str(performance.batch_size)]
    if performance.gpu_layers != "auto":
        args += ["--n-gpu-layers", str(performance.gpu_layers)]
    if performance.parallel is not None:
        args += ["--parallel", str(performance.parallel)]
    args += atlas_flags(atlas_of(config, model), folder)
    if slots is not None:
        args += [SLOT_PATH, str(slots)]
    if config.monitoring.child_metrics:
        args.append("--metrics")
    if native.is_cpu_build(binary):
        # the first request warms the model up just as well, and it is waiting
        args.append("--no-warmup")
        if needs_no_fit(model, override, performance, total_memory()) or "--ctx-size" in args:
            args += ["--fit", "off"]
    return args + override.args


ATLAS_FLAGS = {
    "cells": "--atlas-cells",
    "window": "--atlas-window",
    "recall": "--atlas-recall",
    "refresh": "--atlas-refresh",
    "blend": "--atlas-blend",
    "archive_max_mb": "--atlas-archive-max",
}
"""The child's flag for each parameter of the `atlas` section."""

MEMORY_FLAGS = {
    "memory_backup_count": "--atlas-memory-backup-count",
    "memory_compress_level": "--atlas-memory-compress",
    "memory_max_sessions": "--atlas-memory-max-sessions",
    "memory_max_mb": "--atlas-memory-max-mb",
    "memory_max_age_hours": "--atlas-memory-max-age",
    "auto_save_seconds": "--atlas-auto-save-interval",
}
"""The child's flag for each setting of its memory files."""


def atlas_of(config: Config, model: Model) -> AtlasSection:
    """Return the `atlas` settings of one model."""
    own = override_for(config, model).atlas
    return config.atlas if own is None else config.atlas.model_copy(update=own.model_dump(exclude_none=True))


MEMORY_DIR = "--atlas-memory-dir"


def memory_folder(config: Config, model: Model) -> Path:
    """Return the folder of the memory files of `model`, whether or not it is there."""
    own = override_for(config, model).args
    if MEMORY_DIR in own[:-1]:
        return Path(own[len(own) - own[::-1].index(MEMORY_DIR)])
    return atlas_folder.folder_of(config.atlas.memory_directory, model.id)


def atlas_flags(atlas: AtlasSection, folder: Path | None = None) -> list[str]:
    """Return the child's flags for the long-context memory; none when it is off, so any llama-server starts."""
    if atlas.enabled == "off":
        return []
    args = ["--atlas" if atlas.enabled == "on" else "--atlas-auto"]
    flags = ATLAS_FLAGS
    if folder is not None:
        args += [MEMORY_DIR, str(folder)]
        args += ["--atlas-memory-persist"] if atlas.memory_persist else []
        flags = ATLAS_FLAGS | MEMORY_FLAGS
    for name, flag in flags.items():
        if (value := getattr(atlas, name)) is not None:
            args += [flag, str(value)]
    return args


SLOT_PATH = "--slot-save-path"


def with_parameters(config: Config, model: str, parameters: PerformanceSection | None) -> Config:
    """Return the settings with what was asked for when `model` was loaded; the model's own `args` still win."""
    if parameters is None:
        return config
    asked = parameters.model_dump(exclude_unset=True)
    overrides = dict(config.models.overrides)
    if model in overrides and "context_size" in asked:
        overrides[model] = overrides[model].model_copy(update={"context_size": None})
    models = config.models.model_copy(update={"overrides": overrides})
    return config.model_copy(
        update={"performance": config.performance.model_copy(update=asked), "models": models},
    )


def has_own_context(config: Config, model: Model) -> bool:
    """Tell whether somebody said how large the context of `model` is."""
    own = override_for(config, model)
    flags = {"-c", "--ctx-size"} & set(own.args) or "LLAMA_ARG_CTX_SIZE" in own.env
    return bool(own.context_size or config.performance.context_size or flags)


def stop_seconds(config: Config, model: Model) -> float:
    """Return how long the child of `model` may take to exit: one with a memory may have much to save."""
    saves = atlas_of(config, model).enabled != "off"
    return config.server.stop_seconds + (config.atlas.save_seconds if saves else 0)


def override_for(config: Config, model: Model) -> ModelOverride:
    """Return the settings of one model, empty when it has none."""
    return config.models.overrides.get(model.id) or ModelOverride()


def idle_unload(config: Config, model: Model) -> float:
    """Return after how many idle seconds `model` is unloaded; 0: never."""
    own = override_for(config, model).idle_unload_seconds
    return config.models.idle_unload_seconds if own is None else own


def _alias(name: str) -> str:
    """llama-server separates aliases by commas, so a name cannot hold one."""
    return name.replace(",", "_")
