"""Which models are there right now? Keeps the list fresh while files come, grow, are replaced and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from supervisor.config import ModelsSection
from supervisor.errors import ModelInvalid, ModelNotFound
from supervisor.models.folder_scan import Listing, ModelFile, Stamp, read, show, walk
from supervisor.models.folder_watch import FolderWatch
from supervisor.models.model_files import AUTO, Model, build_models

__all__ = ["Catalog", "Change", "Model"]

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 0.3
"""How long events are collected before the folder is looked at."""
POLL_SECONDS = 2.0
"""Pause between two looks at a folder that sends no events, or that does not exist yet."""
LONGEST_NAME = 256
"""Characters of an unknown name that are looked at and quoted back."""


@dataclass(frozen=True)
class Change:
    """Which ids came, went, or stand for other files than before (or became valid or invalid)."""

    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.replaced)


@dataclass(frozen=True)
class Sighting:
    """Since when (seconds on the catalog's clock) a file has been as it is."""

    stamp: Stamp
    since: float


@dataclass(frozen=True)
class Scan:
    """The outcome of one look at the folder; the next look starts from it.

    `settled` holds each file as it was when it last stood still, `headers` each file that was read.
    `recheck` is when (seconds on the catalog's clock) the next moving file may stand still.
    """

    sightings: Mapping[Path, Sighting] = field(default_factory=dict)
    settled: Mapping[Path, ModelFile] = field(default_factory=dict)
    headers: Mapping[Stamp, ModelFile] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    problems: Sequence[str] = ()
    copying: frozenset[str] = frozenset()
    recheck: float | None = None


class Catalog:
    """The models of a folder, by id. All methods belong to the event loop; files are read in a worker thread.

    `models`, `problems` and `copying` (files that still change, as text) are replaced, never changed, by a scan.
    `settings` may be swapped while running; the next scan goes by it. `on_change` is called on the event loop
    after each scan that found a difference, the first one included. `clock` returns seconds like time.time.
    """

    def __init__(
        self,
        settings: ModelsSection,
        on_change: Callable[[Change], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.models: Mapping[str, Model] = {}
        self.problems: list[str] = []
        self.copying: frozenset[str] = frozenset()
        self._on_change = on_change
        self._clock = clock
        self._scan = Scan()
        self._names: Mapping[str, Model] = {}
        self._lock = asyncio.Lock()
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._watch: FolderWatch | None = None
        self._event_pending = False

    async def start(self) -> None:
        """Make the first scan and go on watching the folder until `stop`."""
        loop = asyncio.get_running_loop()

        def on_event() -> None:  # runs in a thread of the watch
            if not self._event_pending:
                self._event_pending = True
                loop.call_soon_threadsafe(self._due.set)

        self._watch = FolderWatch(on_event)
        await self.rescan()
        self._task = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        """End the watching; `models` stays as it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        async with self._lock:
            watch, self._watch = self._watch, None
            if watch is not None:
                await asyncio.to_thread(watch.stop)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    async def rescan(self) -> Change:
        """Look at the folder now. Returns what changed since the last look; one scan runs at a time."""
        async with self._lock:
            work = asyncio.ensure_future(asyncio.to_thread(self._look, self.settings))
            try:
                scan = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.gather(work, return_exceptions=True)  # the next scan must not meet this one
                raise
            change = self._publish(scan)
            self._arm()
        if change:
            self._on_change(change)
        return change

    def get(self, name: str) -> Model | None:
        """Return the model with this id or alias: spelled like this, else the only one but for case."""
        return pick(self._names, name)

    def resolve(self, name: str | None, running: Sequence[str] = ()) -> Model:
        """Return the model that a request for `name` gets; None, "" and "auto" ask for the default model.

        `running` holds the ids of loaded models, the first loaded first. Raises ModelNotFound or ModelInvalid.
        """
        if not name or name == AUTO:
            return self._default(running)
        model = self.get(name)
        if model is None and self.settings.unknown_model == "default":
            return self._default(running)
        return self._serveable(name, model)

    def near(self, name: str) -> list[str]:
        """Return up to three ids and aliases that look like `name`, best first."""
        wanted = name[:LONGEST_NAME].casefold()
        known = {other.casefold(): other for other in self._names}
        parts = sorted((other for other in known if wanted and wanted in other), key=lambda other: (len(other), other))
        close = get_close_matches(wanted, known, n=3)
        return [known[other] for other in dict.fromkeys([*parts, *close])][:3]

    def _default(self, running: Sequence[str]) -> Model:
        named = self.settings.default_model
        if named and named != AUTO:
            return self._serveable(named, self.get(named))
        valid = [model for model in self.models.values() if model.error is None]
        if not valid:
            raise ModelNotFound(AUTO, [], len(self.models))
        if len(valid) == 1:
            return valid[0]
        loaded = (self.models.get(id) for id in running)
        return next((model for model in loaded if model is not None and model.error is None), valid[0])

    def _serveable(self, name: str, model: Model | None) -> Model:
        if model is None:
            raise ModelNotFound(name[:LONGEST_NAME], self.near(name), len(self.models))
        if model.error is not None:
            raise ModelInvalid(f"model {model.id!r} cannot be served: {model.error}", param="model")
        return model

    # Scanning

    def _look(self, settings: ModelsSection) -> Scan:
        """Walk the folder and read what is new. Runs in a worker thread and changes nothing of the catalog."""
        root = settings.directory.expanduser().absolute()
        listing = walk(root)
        if self._watch is not None and self._watch.follow(listing.roots):
            listing = walk(root)  # for what happened before the watch began
        return scanned(listing, settings, self._scan, self._clock())

    def _publish(self, scan: Scan) -> Change:
        """Make `scan` the current one, log what is new, and return the difference."""
        change = compare(self.models, scan.models)
        for problem in scan.problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        for id in sorted(change.added | change.replaced):
            if error := scan.models[id].error:
                log.warning("model %s cannot be served: %s", id, error)
        self._scan = scan
        self.models = scan.models
        self.problems = list(scan.problems)
        self.copying = scan.copying
        self._names = names_of(scan.models)
        return change

    # Watching

    async def _keep_fresh(self) -> None:
        while True:
            await self._due.wait()
            await asyncio.sleep(DEBOUNCE_SECONDS)
            self._due.clear()
            self._event_pending = False
            try:
                await self.rescan()
            except Exception:  # one bad round must not end the watching
                log.exception("the models folder could not be scanned")
                self._arm()

    def _arm(self) -> None:
        """Set the timer for the next look that no event asks for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is None:
            return
        pauses = [self.settings.scan_interval_seconds] if self.settings.scan_interval_seconds else []
        if not self._watch.working:
            pauses.append(POLL_SECONDS)
        if self._scan.recheck is not None:
            pauses.append(max(0.0, self._scan.recheck - self._clock()))
        if pauses:
            self._timer = asyncio.get_running_loop().call_later(min(pauses), self._due.set)


def scanned(listing: Listing, settings: ModelsSection, last: Scan, now: float) -> Scan:
    """Return the models that the files of `listing` make."""
    scan = settle(listing.files, last, now, settings.settle_seconds)
    models, unused = build_models([*scan.settled.values(), *_moving(listing.files, scan)])
    aliases, ignored = assign_aliases(models, {id: own.aliases for id, own in settings.overrides.items()})
    models = {id: replace(model, aliases=aliases.get(id, ())) for id, model in models.items()}
    return replace(scan, models=models, problems=[*listing.problems, *unused, *ignored])


def find(settings: ModelsSection, name: str) -> Model | None:
    """Look into the models folder now and return the model with this id or alias, for commands without a supervisor."""
    still = settings.model_copy(update={"settle_seconds": 0})
    scan = scanned(walk(settings.directory.expanduser().absolute()), still, Scan(), time.time())
    return pick(names_of(scan.models), name)


def names_of(models: Mapping[str, Model]) -> dict[str, Model]:
    """Return the models by id and alias."""
    return {alias: model for model in models.values() for alias in (*model.aliases, model.id)}


def pick(names: Mapping[str, Model], name: str) -> Model | None:
    """See `Catalog.get`."""
    model = names.get(name)
    if model is None:
        folded = name.casefold()
        ids = {one.id: one for known, one in names.items() if known.casefold() == folded}
        model = next(iter(ids.values())) if len(ids) == 1 else None
    return model


def settle(files: Iterable[ModelFile], last: Scan, now: float, settle_seconds: float) -> Scan:
    """Tell files that stand still from files that may still be copied, and read what was not read before.

    A file that moves and was offered before stays as it was as long as what lies there now is complete (it was
    replaced by a rename, or touched); a file that moves and is not complete is withdrawn.
    """
    sightings: dict[Path, Sighting] = {}
    settled: dict[Path, ModelFile] = {}
    headers: dict[Stamp, ModelFile] = {}
    due: dict[str, float] = {}
    for file in files:
        since = _still_since(file, last.sightings.get(file.path), now)
        sightings[file.path] = Sighting(file.stamp, since)
        before = last.settled.get(file.path)
        moves = now - since < settle_seconds
        if moves:
            due[show(file.path)] = since + settle_seconds
        if moves and before is None:
            continue
        current = _contents(file, last.headers, headers)
        if current is not None and not moves:
            settled[file.path] = current
        elif current is not None and before is not None and current.error is None:
            settled[file.path] = replace(before, folder=file.folder)
    recheck = min(due.values(), default=None)
    return Scan(sightings, settled, headers, copying=frozenset(due), recheck=recheck)


def _contents(file: ModelFile, known: Mapping[Stamp, ModelFile], headers: dict[Stamp, ModelFile]) -> ModelFile | None:
    """Return `file` with its header from `known` or from disk, and note it in `headers`; None: it is gone."""
    if file.stamp in known:
        old = known[file.stamp]
        current = replace(file, header=old.header, error=old.error)
    else:
        try:
            current = read(file)
        except FileNotFoundError:
            return None
        except OSError as error:  # not noted: it may become readable without looking different
            return replace(file, error=f"cannot be read: {error.strerror}")
    headers[file.stamp] = current
    return current


def _still_since(file: ModelFile, last: Sighting | None, now: float) -> float:
    """Return since when `file` has been as it is. Its mtime counts only when it is seen for the first time."""
    if last is None:
        return min(file.mtime_ns / 1e9, now)
    return min(last.since, now) if last.stamp == file.stamp else now


def _moving(files: Iterable[ModelFile], scan: Scan) -> list[ModelFile]:
    """Return the files that are being copied and not offered: they count only for the names of others."""
    return [replace(file, copying=True) for file in files if file.path not in scan.settled]


def assign_aliases(
    models: Mapping[str, Model], wanted: Mapping[str, Sequence[str]]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the aliases of each model, and why others are ignored: no alias may hide an id or another alias."""
    taken = {id.casefold(): f"the model {id!r}" for id in models} | {AUTO: "the default model"}
    aliases: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for id in sorted(wanted.keys() & models.keys()):
        for alias in wanted[id]:
            owner = taken.get(alias.casefold())
            if owner or not alias:
                problems.append(f"alias {alias!r} of model {id!r} is ignored: it means {owner or 'nothing'}")
                continue
            taken[alias.casefold()] = f"the model {id!r}"
            aliases[id] = (*aliases.get(id, ()), alias)
    return aliases, problems


def compare(old: Mapping[str, Model], new: Mapping[str, Model]) -> Change:
    """Return which models came, went, or have other files or another error."""
    replaced = {
        id
        for id in old.keys() & new.keys()
        if (old[id].fingerprint, old[id].error) != (new[id].fingerprint, new[id].error)
    }
    return Change(
        added=frozenset(new.keys() - old.keys()),
        removed=frozenset(old.keys() - new.keys()),
        replaced=frozenset(replaced),
    )
