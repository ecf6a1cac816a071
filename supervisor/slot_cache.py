"""How does a model come back to a conversation that it had read before it was stopped?

Before a child stops, the prompts in its slots are written to files; a child that would come to the same state is given
them after its start. llama-server does both (`POST /slots/N?action=save`, `restore`); this decides what is worth it.
Nothing here fails a start or a stop: what goes wrong is logged and counted, and the prompt is read again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from supervisor import plan
from supervisor.config import Config, ModelOverride
from supervisor.models.catalog import Model
from supervisor.page_cache import will_need
from supervisor.slot_store import Saved, SlotStore
from supervisor.upstream import UpstreamClosed

if TYPE_CHECKING:
    from supervisor.child import Child
    from supervisor.metrics import Metrics

log = logging.getLogger(__name__)

MIN_TOKENS: Final = 128
"""Tokens below which a prompt is read again as fast."""

SAVE_SECONDS: Final = 3.0
"""Longest time that the prompts of one child may take to be saved; what is not complete by then is given up."""

RESTORE_SECONDS: Final = 3.0
"""Longest time to wait for restores that were thought to be quick."""

QUICK_SECONDS: Final = 0.1
"""What waiting requests may lose by a restore, whatever the load took."""

QUICK_SHARE: Final = 0.1
"""What they may lose as a share of the load."""

BYTES_PER_SECOND: Final = 1e9
"""How fast files are taken to be restored; 2.5e9 was measured from the page cache, on two slow cores."""

MIN_FREE: Final = 1 << 30
"""Bytes that stay free on the disk."""

WITHOUT: Final = frozenset(
    """
    --slot-save-path --no-slots --sleep-idle-seconds --api-key --api-key-file
    --embedding --embeddings --rerank --reranking
    --lora --lora-scaled --control-vector --control-vector-scaled
    -md --model-draft --spec-draft-model --atlas --atlas-memory-dir
    """.split()
)
"""Flags in a model's `args` with which its slots are left alone: somebody else uses them, they cannot be asked for, or
what is in them depends on more than the prompt."""


class Slot(NamedTuple):
    """A slot whose prompt is worth a file: its number and the tokens in it."""

    number: int
    tokens: int


@dataclass
class Kept:
    """What is known of a child's slots: `found` is what was there for it, `restored` what it was given, by slot."""

    key: str
    found: list[Saved] = field(default_factory=list)
    restored: dict[int, Saved] = field(default_factory=dict)
    ready: bool = False


class SlotCache:
    """The saved prompts of a supervisor's models."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.store = SlotStore(config.models.slot_cache_directory, config.models.directory)
        self._metrics = metrics

    async def open(self) -> None:
        """Take the folder; without it there is no cache, and the log says why."""
        try:
            await asyncio.to_thread(self.store.open)
        except BlockingIOError:
            log.warning("no prompts are kept over swaps: another supervisor has %s", self.store.folder)
        except OSError as error:
            log.warning("no prompts are kept over swaps: %s: %s", self.store.folder, error.strerror or error)
        self._measure()

    def apply(self, config: Config, models: Iterable[Model]) -> None:
        """Go by `config` from now on; the files of models that are to have none any more go."""
        self.config = config
        for model in models:
            if not wants(config, model):
                self.store.forget(model.id)
        self._measure()

    def forget(self, model: str) -> None:
        """Remove the files of a model that is no longer there."""
        self.store.forget(model)
        self._measure()

    def expect(self, model: Model, key: str) -> Kept:
        """Return what a child of `model` that starts now can go on from; what it cannot is removed."""
        return Kept(key, self.store.find(model.id, key))

    def folder(self, model: Model) -> Path | None:
        """Return the folder for a child of `model`, made if need be; None: its slots are left alone."""
        if not self.store.is_open or not wants(self.config, model):
            return None
        try:
            return self.store.make(model.id)
        except OSError as error:
            log.warning("model %s: its prompts are not kept over swaps: %s", model.id, error)
            return None

    # After a start

    async def read_ahead(self, child: Child) -> None:
        """Bring what may be restored into the page cache while `child` loads."""
        for saved in child.kept.found if child.kept is not None else ():
            with suppress(OSError):
                await asyncio.to_thread(will_need, saved.path)

    async def restore(self, child: Child, load_seconds: float, *, awaited: bool) -> None:
        """Give a child that has loaded what others had in their slots; if it is `awaited`, only what takes no time."""
        kept = child.kept
        if kept is None:
            return
        room = max(QUICK_SECONDS, QUICK_SHARE * load_seconds) * BYTES_PER_SECOND if awaited else inf
        try:
            async with asyncio.timeout(RESTORE_SECONDS):
                slots = len(await _slots(child)) if kept.found else 0
                for number, saved in enumerate(kept.found[:slots]):
                    room -= saved.bytes
                    if room >= 0 and saved.intact():
                        await self._restore(child, kept, number, saved)
        except (OSError, UpstreamClosed, ValueError) as error:  # a TimeoutError is an OSError
            if not child.stopping:
                self._failed("restore", child, error)
        kept.ready = True

    async def _restore(self, child: Child, kept: Kept, slot: int, saved: Saved) -> None:
        taken = self.store.take(saved)
        answer = await _act(child, "restore", slot, taken.path)
        if answer.get("n_restored") != saved.tokens:
            raise ValueError(f"{answer.get('n_restored')} tokens instead of {saved.tokens}")
        kept.restored[slot] = taken
        self._metrics.slots_restored.labels(child.model).inc()
        log.info("model %s: slot %d has a prompt of %d tokens again", child.model, slot, saved.tokens)

    # Before a stop

    async def save(self, child: Child, model: Model, key: str | None) -> None:
        """Save what the slots of a child hold that has no requests any more; `key`: see `key_of`, for a new one."""
        kept = child.kept
        if kept is None or not kept.ready or kept.key != key or child.forced or not wants(self.config, model):
            return
        if child.atlas is not None and child.atlas.enabled:
            return  # its sessions have files of their own
        try:
            async with asyncio.timeout(SAVE_SECONDS):
                await self._save(child, kept, model)
        except (OSError, UpstreamClosed, ValueError) as error:
            if not child.forced:
                self._failed("save", child, error)
        for saved in kept.restored.values():  # those in whose place nothing was saved
            with suppress(OSError):
                self.store.put_back(saved)
        limits = most_bytes(self.config, model), self.config.models.slot_cache_total_mb << 20
        await asyncio.to_thread(self.store.evict, child.model, *limits)
        self._measure()

    async def _save(self, child: Child, kept: Kept, model: Model) -> None:
        room = most_bytes(self.config, model)
        for slot in worth_saving(await _slots(child)):
            estimate = slot.tokens * (plan.kv_bytes_per_token(model.header) if model.header else 0)
            room -= estimate
            if room < 0:
                log.info("model %s: %d tokens in slot %d are too many to keep", child.model, slot.tokens, slot.number)
                return
            if shutil.disk_usage(self.store.folder).free - estimate < MIN_FREE:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {self.store.folder}")
            await self._save_slot(child, kept, slot)

    async def _save_slot(self, child: Child, kept: Kept, slot: Slot) -> None:
        part = self.store.part(child.model)
        try:
            answer = await _act(child, "save", slot.number, part)
            tokens, size = answer["n_saved"], answer["n_written"]
            older = kept.restored.get(slot.number)
            await asyncio.to_thread(self.store.complete, part, kept.key, tokens, size, older)
            kept.restored.pop(slot.number, None)
        finally:
            part.unlink(missing_ok=True)
        self._metrics.slots_saved.labels(child.model).inc()
        took = answer["timings"]["save_ms"]
        log.info(
            "model %s: kept %d tokens of slot %d: %.1f MB, %.0f ms", child.model, tokens, slot.number, size / 1e6, took
        )

    def _failed(self, what: str, child: Child, error: Exception) -> None:
        if isinstance(error, NotOffered):
            log.debug("model %s: %s", child.model, error)
            return
        self._metrics.slot_failures.labels(child.model, what).inc()
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        log.warning("model %s: cannot %s its prompts: %s", child.model, what, reason)

    def _measure(self) -> None:
        self._metrics.slot_bytes.set(self.store.total())


class NotOffered(ValueError):
    """This child does not save or restore slots, or wants a key."""


def wants(config: Config, model: Model) -> bool:
    """Return whether the prompts of `model` are kept, by the settings and by what is known of it."""
    override = plan.override_for(config, model)
    asked = config.models.slot_cache if override.slot_cache is None else override.slot_cache
    return asked and plan.atlas_of(config, model).enabled != "on" and _can(model, override)


def _can(model: Model, override: ModelOverride) -> bool:
    flags = {arg.partition("=")[0] for arg in override.args}
    if flags & WITHOUT or model.mmproj is not None:
        return False
    header = model.header
    window = header.metadata.get(f"{header.architecture}.attention.sliding_window") if header else None
    return not window or "--swa-full" in flags


def most_bytes(config: Config, model: Model) -> int:
    """Return how many bytes the files of `model` may have."""
    own = plan.override_for(config, model).slot_cache_max_mb
    return (config.models.slot_cache_max_mb if own is None else own) << 20


def worth_saving(slots: Sequence[dict[str, Any]]) -> list[Slot]:
    """Return what of the answer to GET /slots is worth a file, what was used last first.

    A slot that has had no task since its start has no `id_task`; if something was restored into it, that is on disk.
    """
    found = [
        (slot["id_task"], Slot(slot["id"], slot["n_prompt_tokens"]))
        for slot in slots
        if "id_task" in slot and not slot["is_processing"] and not slot["speculative"]
    ]
    return [slot for _, slot in sorted(found, reverse=True) if slot.tokens >= MIN_TOKENS]


async def _slots(child: Child) -> list[dict[str, Any]]:
    """Return what a child says of its slots. Raises `NotOffered`, OSError, `UpstreamClosed` or ValueError."""
    status, body = await child.call("GET", "/slots")
    if status != HTTPStatus.OK:
        raise NotOffered(f"GET /slots: {status}")
    return list(json.loads(body))


async def _act(child: Child, action: str, slot: int, path: Path) -> dict[str, Any]:
    """Let a child save a slot to a file, or restore it. Raises as `_slots`."""
    status, body = await child.call(
        "POST", f"/slots/{slot}?action={action}", json.dumps({"filename": path.name}).encode()
    )
    answer = dict(json.loads(body))
    if status in (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.UNAUTHORIZED):
        raise NotOffered(f"POST /slots: {status}")
    if status != HTTPStatus.OK:
        raise ValueError(answer.get("error", {}).get("message", f"status {status}"))
    return answer
