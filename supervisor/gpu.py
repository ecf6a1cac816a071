"""Which GPUs are there, and how much memory have they? By NVML, where the package `nvidia-ml-py` is installed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from supervisor.estimate import MIB, Estimate, layer_share
from supervisor.models.gguf import Header
from supervisor.residency import RAM

log = logging.getLogger(__name__)

SHARE = 0.95
"""Share of a GPU's memory that children may take; the driver and others need some."""

CONTEXT = 600 * MIB
"""Bytes of a GPU that a process takes to use it at all: CUDA 13 on an H100, where others may take less. It is a first
guess: what was measured of a model counts from then on."""

DRIVER = 320 * MIB
"""Bytes of the machine's memory that the driver's libraries take in a process that uses a GPU, likewise."""


class Gpus:
    """The GPUs that NVML shows. Without the package or a driver there are none."""

    def __init__(self, nvml: Any = None) -> None:
        """`nvml` stands for the module `pynvml`; None: the real one if it is there."""
        self._nvml = nvml
        self._handles: list[Any] = []
        self._error: type[Exception] = Exception
        try:
            self._nvml = self._nvml or importlib.import_module("pynvml")
            self._error = self._nvml.NVMLError
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(number) for number in range(count)]
        except (ImportError, self._error) as error:
            log.debug("no GPUs by NVML: %s", error)

    def budget(self) -> dict[str, int]:
        """Return for each GPU the bytes that children may take."""
        sizes = {}
        for number, handle in enumerate(self._handles):
            try:
                sizes[f"gpu{number}"] = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).total * SHARE)
            except self._error as error:
                log.debug("gpu%d does not tell its memory: %s", number, error)
        return sizes

    def used_by(self, pid: int) -> dict[str, int]:
        """Return the bytes that a process takes of each GPU where it takes any."""
        used: dict[str, int] = {}
        for number, handle in enumerate(self._handles):
            try:
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._error:
                continue
            mine = [int(one.usedGpuMemory or 0) for one in processes if one.pid == pid]
            if mine:
                used[f"gpu{number}"] = sum(mine)
        return used


def split(
    estimate: Estimate, header: Header, gpus: Mapping[str, int], layers: int | None, *, kv_offload: bool = True
) -> dict[str, int]:
    """Return the bytes that a child takes of the machine's memory and of each GPU.

    `gpus` are their budgets: llama-server deals the layers out by their sizes. `layers`: how many go there; None: all.
    """
    share = layer_share(header, layers)
    if not gpus or share == 0:
        return {RAM: estimate.total}
    weights = int(header.layer_bytes * share)
    if share == 1:
        weights = max(weights, estimate.weights - _embedding(estimate, header))
    kept = int(estimate.kv * share) if kv_offload else 0
    there = sum(gpus.values())
    needs = {name: int((weights + kept) * size / there) + estimate.compute + CONTEXT for name, size in gpus.items()}
    needs[RAM] = estimate.total - weights - kept - estimate.repacked + DRIVER
    return needs


def _embedding(estimate: Estimate, header: Header) -> int:
    """Return the bytes of the input embedding, which stays in the machine's memory: half of what is no layer."""
    return (estimate.weights - min(estimate.weights, header.layer_bytes)) // 2
