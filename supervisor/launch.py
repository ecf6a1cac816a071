"""How is the next child of a model started, and what will it take? Settings and models in, command lines out.

Nothing is started here; `fleet.py` does that. What is asked for while the supervisor runs, and what a model needs to
start at all, is kept here beside the settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor import atlas_folder, plan, shortage
from supervisor.config import Config, PerformanceSection
from supervisor.errors import StartFailed
from supervisor.models.catalog import Model
from supervisor.residency import RAM
from supervisor.scheduler import Limits
from supervisor.setup import native
from supervisor.sizing import Size, Sizing, cache_bound
from supervisor.slot_store import key_of

if TYPE_CHECKING:
    from supervisor.child import Child

log = logging.getLogger(__name__)


class Launch:
    """The settings that children are started by. `binary` returns the llama-server to run, None when there is none."""

    def __init__(self, config: Config, binary: Callable[[], Path | None], measured: Path | None) -> None:
        """`measured` is the file that remembers what children took."""
        self.config = config
        self.binary = binary
        self.sizing = Sizing(measured)
        self.parameters: dict[str, PerformanceSection] = {}  # asked for by whoever loaded the model
        self.smaller: dict[str, int] = {}  # contexts in tokens of models that ran out of memory

    def limits(self) -> Limits:
        """Return what the scheduler goes by. There may be a newer build by now."""
        binary, config = self.binary(), self.config
        is_ours = binary is not None and native.is_cpu_build(binary)
        return Limits(
            max_loaded=config.models.max_loaded_models,
            overlap=1 if is_ours else 0,
            max_wait=config.inference.max_wait_seconds,
            min_residency=config.inference.min_residency_seconds,
            max_in_flight=config.inference.max_in_flight,
            priority_seconds=config.inference.priority_seconds,
            queue_limit=config.inference.queue_limit,
            queue_timeout=config.inference.queue_timeout_seconds,
            drain=config.server.drain_seconds,
            budget=self.sizing.budget(config, cpu_only=binary is None or is_ours),
        )

    def size(self, model: Model) -> Size | None:
        """Return how much memory the next child of `model` will take, and note it; None without a llama-server."""
        binary = self.binary()
        if binary is None:
            return None
        has_memory = plan.atlas_of(self.config, model).enabled != "off"
        folder = plan.memory_folder(self.config, model) if has_memory else None  # which need not be there yet
        command = self._planned(binary, model, Path("-"), folder, None)
        env = plan.override_for(self.config, model).env
        found = self.sizing.size(model, command, env, cpu_only=native.is_cpu_build(binary))
        self.sizing.sizes[model.id] = found
        return found

    def command(self, model: Model, socket: Path, slots: Path | None) -> list[str]:
        """Return what starts a child for `model` now; `slots` is the folder for the prompts of its slots.

        Raises `StartFailed`.
        """
        binary = self.binary()
        if binary is None:
            raise StartFailed("there is no llama-server: run `llama-supervisor build`", param="model")
        return self._planned(binary, model, socket, self._memory_folder(model), slots)

    def cache_bound(self, model: Model, limits: Limits) -> list[str]:
        """Return the words that keep the prompt cache of the next child of `model` within the budget."""
        own, size = plan.override_for(self.config, model), self.sizing.sizes.get(model.id)
        return [] if size is None else cache_bound(size, limits.budget, own.args, own.env)

    def again(self, child: Child, model: Model) -> list[str]:
        """Return what would start `child` now, with its own llama-server and folders. Raises `StartFailed`."""
        return self._planned(Path(child.command[0]), model, child.socket, self._memory_folder(model), child.slots)

    def differs(self, child: Child, model: Model) -> bool:
        """Whether a child for `model` would be started in another way now."""
        try:
            command = self.again(child, model)
        except StartFailed:
            return True
        return command != child.planned or plan.override_for(self.config, model).env != child.environ

    def slots_key(self, child: Child, model: Model) -> str | None:
        """Return what a child for `model` that starts now has in its slots in common with others; None: nothing."""
        try:
            files = [*model.files, *([model.mmproj] if model.mmproj else [])]
            return key_of(self.again(child, model), plan.override_for(self.config, model).env, files)
        except (OSError, StartFailed):
            return None

    def shrink(self, child: Child, model: Model) -> int | None:
        """Give the model of a child that lacked memory half of its context, once and unless somebody chose it.

        Returns the tokens that it has now; None when there is nothing to be done.
        """
        if model.id in self.smaller:
            return None
        config = plan.with_parameters(self.config, model.id, self.parameters.get(model.id))
        half = shortage.smaller_context(child.command, model.header)
        if half is None or plan.has_own_context(config, model):
            return None
        if not shortage.ran_out(child.exit_code, child.log.tail(shortage.LINES)):
            return None
        self.smaller[model.id] = half
        return half

    def _planned(self, binary: Path, model: Model, socket: Path, folder: Path | None, slots: Path | None) -> list[str]:
        config = plan.with_parameters(self.config, model.id, self.parameters.get(model.id))
        if model.id in self.smaller and not plan.has_own_context(config, model):
            config = plan.with_parameters(config, model.id, PerformanceSection(context_size=self.smaller[model.id]))
        budget = self.sizing.budget(config, cpu_only=True)[RAM]
        return plan.command(binary, model, config, socket, folder=folder, slots=slots, budget=budget)

    def _memory_folder(self, model: Model) -> Path | None:
        """Return the folder for the memory files of `model`, made if need be; None: it gets none.

        Raises `StartFailed` when the one that the settings name cannot be made.
        """
        if plan.atlas_of(self.config, model).enabled == "off":
            return None
        folder = plan.memory_folder(self.config, model)
        try:
            atlas_folder.make(folder)
        except OSError as error:
            reason = f"no folder for memory files: {folder}: {error.strerror or error}"
            if self.config.atlas.memory_directory is not None:
                raise StartFailed(f"model {model.id!r}: {reason}; see atlas.memory_directory", param="model") from error
            log.warning("model %s: %s; set atlas.memory_directory", model.id, reason)
            return None
        return folder
