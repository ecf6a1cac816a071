"""How much memory does each model take here? The estimate for its settings, put right by what its children took.

What was measured holds for a model's files and its settings together, for as long as the supervisor runs and, where
there is a state folder, beyond. On the CPU the peak of the resident memory counts, with the pages of the model's file
that are mapped: a model whose pages are not in memory answers at the disk's speed.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from supervisor.budget import budget_of, machine_memory
from supervisor.config import Config
from supervisor.estimate import MIB, Estimate, Flags, Shape, estimate, shape_of
from supervisor.gpu import Gpus, split
from supervisor.models.model_files import Model
from supervisor.residency import RAM, Memory

if TYPE_CHECKING:
    from supervisor.child import Child

log = logging.getLogger(__name__)

MEASURE_SECONDS = 2.0
"""Pause between two looks at a child's memory."""

BACK_SECONDS = 3.0
"""How long a GPU may take to have the memory of a child that has exited back."""

POLL_SECONDS = 0.02
STEP = 4 * MIB
"""Changes of a child's memory below this are not told."""

PROMPT_CACHE = 8192 * MIB
"""Limit of a child's prompt cache that nobody chose."""

MOST_KEPT = 1000
"""Models and settings of which the state folder remembers what they took."""


@dataclass
class Size:
    """What one model takes: `predicted` from its header, and the peaks of its children, by pool in bytes."""

    key: str
    estimate: Estimate
    predicted: dict[str, int]
    loaded: dict[str, int] = field(default_factory=dict)  # what a child took when it had just loaded
    peak: dict[str, int] = field(default_factory=dict)  # the most that a child took
    running: dict[str, int] = field(default_factory=dict)  # the most that the running one took

    @property
    def needs(self) -> dict[str, int]:
        """The bytes to count: as predicted, until a child was measured; then as that, with some work still to come.

        What the running child grew by beyond that (its prompt cache) counts for it and not for the next one.
        """
        needs = dict(self.predicted)
        for pool, number in self.loaded.items():
            needs[pool] = number + (self.estimate.later if pool == RAM else 0)
        return {pool: max(number, self.running.get(pool, 0)) for pool, number in needs.items()}

    @property
    def measured(self) -> dict[str, dict[str, int]]:
        """What is remembered."""
        return {"loaded": dict(self.loaded), "peak": dict(self.peak)}


class Sizing:
    """The sizes of all models. `budget` is what they may take together."""

    def __init__(
        self, store: Path | None, *, gpus: Gpus | None = None, memory: Callable[[], int] = machine_memory
    ) -> None:
        self.sizes: dict[str, Size] = {}
        self.memory = memory()
        self._store = store
        self._gpus = gpus
        self._known = _read(store)

    def budget(self, config: Config, *, cpu_only: bool) -> dict[str, int]:
        """Return the bytes that all children may take, by pool."""
        ram = budget_of(config.server.memory_budget, self.memory)
        return {RAM: ram} | ({} if cpu_only else self._gpu_budget())

    def _gpu_budget(self) -> dict[str, int]:
        if self._gpus is None:
            self._gpus = Gpus()
        return self._gpus.budget()

    def size(self, model: Model, command: Sequence[str], environ: Mapping[str, str], *, cpu_only: bool) -> Size:
        """Return what a child of `model` with this command line takes."""
        key = key_of(model, command, environ)
        if (known := self.sizes.get(model.id)) is not None and known.key == key:
            known.running = {}
            return known
        found = estimate_of(model, command, environ, self.memory)
        predicted = {RAM: found.total}
        if not cpu_only and model.header is not None:
            predicted = split(found, model.header, self._gpu_budget(), gpu_layers(command))
        return Size(key, found, predicted, **copy.deepcopy(self._known.get(key, {})))

    async def follow(self, child: Child, changed: Callable[[Size], None]) -> None:
        """Measure a child that has loaded for as long as it runs; `changed` is called when its model's size has."""
        size = self.sizes.get(child.model)
        if size is None:
            return
        size.loaded = self.measure(child) or size.loaded
        size.running = {}
        told: dict[str, int] = {}
        while child.exit_code is None and not child.stopping:
            self._look(child, size)
            if _coarse(size.needs) != told:
                told = _coarse(size.needs)
                self._remember(size)
                changed(size)
            with suppress(TimeoutError):
                await asyncio.wait_for(child.gone.wait(), MEASURE_SECONDS)
        size.running = {}

    def look(self, child: Child) -> None:
        """Measure a child before it goes."""
        if (size := self.sizes.get(child.model)) is not None and size.loaded:
            self._look(child, size)
            self._remember(size)

    def _look(self, child: Child, size: Size) -> None:
        for pool, number in self.measure(child).items():
            size.running[pool] = max(number, size.running.get(pool, 0))
            size.peak[pool] = max(number, size.peak.get(pool, 0))

    def _remember(self, size: Size) -> None:
        if self._known.get(size.key) != size.measured:
            self._known.pop(size.key, None)
            self._known[size.key] = size.measured
            _write(self._store, self._known)

    def status_of(self, model: str) -> dict[str, Any] | None:
        """Return the bytes that `model` takes: predicted, counted, measured; None before it was asked for."""
        if (size := self.sizes.get(model)) is None:
            return None
        return {
            "predicted_bytes": dict(size.predicted),
            "counted_bytes": size.needs,
            "measured_bytes": dict(size.peak),
            "parts": asdict(size.estimate),
        }

    def measure(self, child: Child) -> dict[str, int]:
        """Return the most bytes that a child took so far, by pool; empty when it does not run."""
        if child.pid is None or child.exit_code is not None:
            return {}
        used = self._gpus.used_by(child.pid) if self._gpus else {}
        # a model that moved to a GPU was mapped, so there the peak would count it twice
        ram = child.rss() if used else peak_memory(child.pid)
        return used | ({RAM: ram} if ram else {})

    async def until_back(self, pid: int | None) -> None:
        """Wait until the memory of a process that has exited is free. The machine's is at once, a GPU's a bit later."""
        deadline = asyncio.get_running_loop().time() + BACK_SECONDS
        while self._gpus and pid is not None and self._gpus.used_by(pid):
            if asyncio.get_running_loop().time() > deadline:
                log.warning("pid %d has exited, and its GPU memory is not free after %g s", pid, BACK_SECONDS)
                return
            await asyncio.sleep(POLL_SECONDS)


def cache_bound(size: Size, budget: Memory, args: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return the flag that keeps a child's prompt cache from growing over the budget, where nobody chose its limit."""
    room = budget[RAM] - size.needs[RAM]
    if {"-cram", "--cache-ram"} & set(args) or "LLAMA_ARG_CACHE_RAM" in environ or room >= PROMPT_CACHE:
        return []
    return ["--cache-ram", str(max(0, room // MIB))]


def _coarse(needs: Memory) -> dict[str, int]:
    return {pool: number // STEP for pool, number in needs.items()}


def estimate_of(model: Model, command: Sequence[str], environ: Mapping[str, str], memory: int) -> Estimate:
    """Return what a child takes; of a model whose header was not read, its size on disk."""
    if model.header is None:
        return Estimate(weights=model.size)
    projector = 0
    if model.mmproj is not None:
        with suppress(OSError):
            projector = model.mmproj.stat().st_size
    shape: Shape = shape_of(command, environ, model.header, memory)
    return estimate(model.header, model.size, shape, projector=projector)


def gpu_layers(command: Sequence[str]) -> int | None:
    """Return how many layers a command line sends to GPUs; None: as many as fit."""
    found = Flags(command).number("-ngl", "--gpu-layers", "--n-gpu-layers")
    return found if found is not None and found >= 0 else None


def key_of(model: Model, command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return what stands for a model's files and its settings, but not where its socket is."""
    about = [arg for before, arg in zip(["", *command], command, strict=False) if before != "--host"]
    text = json.dumps([model.id, model.size, model.mtime, about, sorted(environ.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def peak_memory(pid: int) -> int | None:
    """Return the most bytes that a process had resident so far; where the system keeps no peak, what it has now."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _read(store: Path | None) -> dict[str, dict[str, dict[str, int]]]:
    """Return what the state folder remembers; a file that is not as we write it is left alone and not used."""
    if store is None:
        return {}
    try:
        known = json.loads(store.read_text())
        return {
            str(key): {part: {str(pool): int(number) for pool, number in one[part].items()} for part in PARTS}
            for key, one in known.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is not used: %s", store, error)
        return {}


PARTS = ("loaded", "peak")


def _write(store: Path | None, known: dict[str, dict[str, dict[str, int]]]) -> None:
    if store is None:
        return
    kept = dict(list(known.items())[-MOST_KEPT:])
    temporary = store.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(kept))
        temporary.replace(store)
    except OSError as error:
        log.debug("%s cannot be written: %s", store, error)
