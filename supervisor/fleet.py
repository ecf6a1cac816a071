"""Carries the scheduler's decisions out: owns the children, hands out leases, tells who listens."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
from collections.abc import Callable, Coroutine
from contextvars import Context
from pathlib import Path
from time import monotonic
from typing import Any

from supervisor import atlas_support, plan
from supervisor.child import Child, describe_exit
from supervisor.childlog import TAIL_LINES, ChildLog, file_name
from supervisor.config import Config, PerformanceSection
from supervisor.entry import OCCUPYING, STAYING, Entry, Priority, State, Waiter
from supervisor.errors import ChildDied, ModelNotFound, StartFailed, SupervisorError
from supervisor.events import Events
from supervisor.launch import Launch
from supervisor.metrics import FleetCollector, Metrics, ModelSeries
from supervisor.models.catalog import Catalog, Change, Model
from supervisor.page_cache import ReadAhead
from supervisor.residency import excess, excess_error
from supervisor.runtime import Runtime
from supervisor.scheduler import Decision, Grant, Refuse, Scheduler, Start, Stop
from supervisor.setup import native
from supervisor.sizing import Size, Sizing
from supervisor.slot_cache import SlotCache
from supervisor.upstream import UpstreamClosed
from supervisor.watchdog import until_hanging

log = logging.getLogger(__name__)

QUEUE_SHOWN = 32
"""Most places of a model's queue that its status tells."""

MEASURED_FILE = "memory.json"
"""Beside the logs: what children took."""

GRACE = 2.0
"""Seconds by which something may be late before it counts as a problem."""


UNSIZED = frozenset({State.ABSENT, State.FAILED})
"""States in which a model has no child, and its next one may take another amount of memory."""


class Lease:
    """The right to use a model's child for one request. `release` it exactly when the request ends.

    `asked_at` and `granted_at` are on the monotonic clock; `series` counts the request.
    """

    __slots__ = ("_fleet", "_ticket", "asked_at", "child", "granted_at", "series")

    def __init__(self, fleet: Fleet, ticket: int, child: Child, asked_at: float) -> None:
        self._fleet = fleet
        self._ticket = ticket
        self.child = child
        self.asked_at = asked_at
        self.granted_at = monotonic()
        self.series: ModelSeries = fleet.metrics.of(child.model)

    def release(self, *, ok: bool = True) -> None:
        """Give the right back; `ok` says that the child answered. A second call does nothing."""
        self._fleet.release(self._ticket, ok=ok)


class Fleet:
    """All children of this supervisor."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        runtime: Runtime,
        *,
        binary: Callable[[], Path | None],
        log_folder: Path | None,
        patches: str,
    ) -> None:
        self.launch = Launch(config, binary, log_folder / MEASURED_FILE if log_folder is not None else None)
        self.catalog = catalog
        self.runtime = runtime
        self.scheduler = Scheduler(self.launch.limits(), random.random)
        self.children: dict[str, Child] = {}
        self.logs: dict[str, ChildLog] = {}
        self._log_folder = log_folder
        self.patches = patches
        self.events = Events()
        self.metrics = Metrics()
        self.metrics.registry.register(FleetCollector(self))
        self.slots = SlotCache(config, self.metrics)
        self._read_ahead = ReadAhead()
        self.binary_version: native.ServerVersion | None = None
        self._tickets = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._now = asyncio.get_running_loop().time

    @property
    def config(self) -> Config:
        """The configuration that children are started by."""
        return self.launch.config

    @property
    def sizing(self) -> Sizing:
        """How much memory the models take."""
        return self.launch.sizing

    # For requests

    async def acquire(
        self, model: str, *, start: bool = True, priority: Priority = Priority.NORMAL, counts: bool = True
    ) -> Lease:
        """Wait for the right to use `model`, starting it if need be and `start` allows it.

        Only what makes a model compute `counts` as one of `inference.max_in_flight`.
        Raises the `SupervisorError` that says why there is none. Cancelling the wait gives the place up.
        """
        ticket = next(self._tickets)
        asked_at = monotonic()
        if self.scheduler.entry(model).state in UNSIZED:
            self._size(model)
        decisions = self.scheduler.request(ticket, model, self._now(), start=start, priority=priority, counts=counts)
        if decisions == [Grant(ticket, model)]:  # nearly always: no need to wait
            return self._lease(ticket, model, asked_at)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        self._apply(decisions)
        if not future.done() and self.scheduler.entry(model).state is State.ABSENT:  # there is no room yet
            self._read_files(model)
        try:
            if not future.done():
                await future
            else:
                future.result()
        except asyncio.CancelledError:
            self._apply(self.scheduler.cancel(ticket, self._now()))
            self._apply(self.scheduler.release(ticket, self._now()))
            raise
        finally:
            self._waiting.pop(ticket, None)
        return self._lease(ticket, model, asked_at)

    def _read_files(self, model: str) -> None:
        if (found := self.catalog.models.get(model)) is not None:
            self._spawn(self._read_ahead.model(found), _name("read the files of", model))

    def _lease(self, ticket: int, model: str, asked_at: float) -> Lease:
        child = self.children.get(model)
        if child is None:  # it died between the grant and now
            self.release(ticket, ok=False)
            raise ChildDied(f"model {model!r} went away before it answered")
        return Lease(self, ticket, child, asked_at)

    def release(self, ticket: int, *, ok: bool) -> None:
        """See `Lease.release`."""
        decisions = self.scheduler.release(ticket, self._now(), ok=ok)
        if decisions or not self.scheduler.is_calm():
            self._apply(decisions)

    async def until_gone(self, model: str) -> None:
        """Wait until a child of `model` that has died is out of the way, so that the next request gets a fresh one."""
        child = self.children.get(model)
        if child is not None and child.exit_code is not None:
            await child.gone.wait()

    def running(self) -> list[str]:
        """Return the ids of the models that can answer now, the first loaded first."""
        return self.scheduler.running()

    def queue_ages(self) -> dict[str, float]:
        """Return for how many seconds the oldest waiter of each model has waited; 0 where none does."""
        now = self._now()
        return {entry.model: max(0.0, now - entry.oldest()) for entry in self.scheduler.entries.values()}

    def problems(self) -> list[str]:
        """Return what shows that models are no longer started and stopped as they must be; empty when all is well."""
        now = self._now()
        found = self.scheduler.overdue(now - GRACE)
        if self._timer is None and self.scheduler.next_tick(now) is not None:
            found.append("nothing wakes the scheduler when its next decision is due")
        work = {task.get_name() for task in self._tasks}
        for entry in self.scheduler.entries.values():
            if (entry.state is State.STARTING and _name("run", entry.model) not in work) or (
                entry.state is State.STOPPING and _name("stop", entry.model) not in work
            ):
                found.append(f"nobody looks after model {entry.model!r}, which is {entry.state}")
        return found

    # For people

    def load(self, model: str, parameters: PerformanceSection | None = None) -> None:
        """Start `model` when there is room; listen to the events to see how it goes.

        `parameters` hold until somebody unloads it. A child that runs with others ends after its running requests.
        Raises `ModelTooLarge` when it can never fit.
        """
        if parameters is not None and parameters != self.launch.parameters.get(model):
            self.launch.parameters[model] = parameters
            self._apply(self.scheduler.restart(model, self._now()))
        entry = self.scheduler.entry(model)
        if entry.state in UNSIZED:
            self._size(model)
            if over := excess([entry], self.scheduler.limits.budget):
                raise excess_error(model, over, entry.needs, self.scheduler.limits.budget)
        self._apply(self.scheduler.load(model, self._now()))

    def unload(self, model: str, *, force: bool = False) -> None:
        """Stop `model` after its running requests; at once with `force`."""
        self.launch.parameters.pop(model, None)
        self.launch.smaller.pop(model, None)
        if force and (child := self.children.get(model)):
            child.forced = True
        self._apply(self.scheduler.unload(model, self._now(), force=force))

    def apply_change(self, change: Change) -> None:
        """Models came, went or were replaced in the folder."""
        now = self._now()
        for model in change.removed:
            near = ModelNotFound(model, [], len(self.catalog.models))
            self._apply(self.scheduler.remove(model, now, near))
            self.events.publish(model, "model_remove", {})
            self.slots.forget(model)
        for model in change.replaced:
            self.launch.smaller.pop(model, None)
            self._apply(self.scheduler.restart(model, now))
        if change.added or change.replaced:
            self.events.publish("*", "models_reload", {})

    def apply_settings(self, config: Config) -> list[str]:
        """Go by `config` from now on; return the models whose children start anew, after their running requests.

        A child whose command line and environment would be the same goes on undisturbed.
        """
        other_binary = config.server.llama_server != self.config.server.llama_server
        self.launch.config = config
        self.slots.apply(config, self.catalog.models.values())
        for log_ in self.logs.values():
            log_.max_bytes = int(config.logging.max_mb * 1024 * 1024)
        now = self._now()
        restarted = []
        for entry in list(self.scheduler.entries.values()):
            model, child = self.catalog.get(entry.model), self.children.get(entry.model)
            if model is None:
                continue  # `apply_change` sees to it
            self._set_rules(entry, model)
            if child is not None:
                child.patience = plan.stop_seconds(config, model)
            if entry.state is State.FAILED:
                self._apply(self.scheduler.restart(entry.model, now))  # it may start now
            elif entry.state in STAYING and child is not None and (other_binary or self.launch.differs(child, model)):
                restarted.append(entry.model)
                self._apply(self.scheduler.restart(entry.model, now))
            if entry.state in UNSIZED:
                self._size(entry.model)
        self._apply(self.scheduler.set_limits(self.launch.limits(), now))
        return restarted

    def log_of(self, model: str) -> ChildLog:
        """Return the log of `model`, over all its children."""
        if model not in self.logs:
            folder = self._log_folder
            path = folder / file_name(model) if folder is not None else None
            self.logs[model] = ChildLog(path, int(self.config.logging.max_mb * 1024 * 1024))
        return self.logs[model]

    # Life

    async def close(self) -> None:
        """Refuse new work, let running requests finish within the drain time, stop all children."""
        self._apply(self.scheduler.shutdown(self._now()))
        await self._gone.wait()
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.slots.store.close()
        self.events.close()  # the front waits for its handlers, so these must end
        for log_ in self.logs.values():
            log_.close()

    def hurry(self) -> None:
        """Kill all children now: somebody asked twice."""
        for child in self.children.values():
            child.forced = True
            child.pool.cut()
            child.kill()
        for entry in self.scheduler.entries.values():
            if entry.state is State.DRAINING:
                entry.drain_until = 0.0
        self._tick()

    # Decisions

    def _apply(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Grant(ticket):
                    self._settle(ticket, None)
                case Refuse(ticket, error):
                    self._settle(ticket, error)
                case Start(model):
                    self._gone.clear()
                    self.events.publish(model, "model_status", {"status": "loading"})
                    self._spawn(self._run(model), _name("run", model))
                case Stop(model, reason):
                    log.info("model %s: stopping (%s)", model, reason)
                    self.events.publish(model, "model_status", {"status": "unloading"})
                    if child := self.children.get(model):
                        child.stopping = True
                        child.forced |= bool(self.scheduler.entry(model).leases)
                    self._spawn(self._stop(model), _name("stop", model))
        self._arm()

    def _settle(self, ticket: int, error: SupervisorError | None) -> None:
        future = self._waiting.get(ticket)
        if future is None or future.done():
            return  # cancelled: `acquire` gives the lease back
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _arm(self) -> None:
        """Set the timer for the scheduler's next tick."""
        if self._timer is None and self.scheduler.is_calm():
            return  # the way of nearly every request
        due = self.scheduler.next_tick(self._now())
        if self._timer is not None:
            if due is not None and self._timer.when() <= due:
                return  # an early tick does no harm
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._tick, context=Context())

    def _tick(self) -> None:
        self._timer = None
        self._apply(self.scheduler.tick(self._now()))

    # Children

    async def _run(self, model: str) -> None:
        """The life of one child, from its start to its end by itself; `_stop` ends it otherwise."""
        child: Child | None = None
        try:
            began = self._now()
            while True:
                child = self._make_child(model)
                try:
                    await self._start(child)
                    break
                except StartFailed as error:
                    if (half := self._shrink(child)) is None:
                        raise
                    log.warning("%s", error.message)
                    log.warning("model %s: once more with %d tokens of context", model, half)
                    self._forget(model, child)  # it has exited; nothing is awaited, so nobody stops it meanwhile
            took = self._now() - began
            self.metrics.load.labels(model).observe(took)
            self.scheduler.entry(model).cost = took
            log.info("model %s: ready after %.2f s", model, took)
            await self.slots.restore(child, took, awaited=bool(self.scheduler.entry(model).waiters))
            self.events.publish(model, "model_status", {"status": "loaded", "info": child.info})
            self._apply(self.scheduler.ready(model, self._now()))
            self._spawn(self._get_to_know(child), _name("get to know", model))
            self._spawn(self._watch(child), _name("watch", model))
            self._spawn(self._measure(child), _name("measure", model))
            code = await child.wait()
            if not child.stopping:
                raise child.failure(f"llama-server {child.hung or describe_exit(code)}")
        except SupervisorError as error:
            if child is None or not child.stopping:
                await self._failed(model, child, error)
        except (OSError, ValueError, RuntimeError) as error:
            log.exception("model %s: its child cannot be run", model)
            await self._failed(model, child, StartFailed(f"model {model!r}: {error}", param="model"))

    async def _start(self, child: Child) -> None:
        """Start the process of `child` and wait until it can serve. Raises `StartFailed`."""
        pid = await child.spawn(plan.override_for(self.config, self._model(child.model)).env)
        self.runtime.record(child.socket, pid, child.patience)
        log.info("model %s: llama-server %d starting", child.model, pid)
        self._spawn(self.slots.read_ahead(child), _name("read ahead", child.model))
        await child.until_ready(self.config.models.load_stall_seconds, lambda: self._publish_progress(child))

    def _shrink(self, child: Child) -> int | None:
        """Return the smaller context in tokens with which a child that lacked memory may be started once more."""
        model = self.catalog.get(child.model)
        if model is None or child.stopping or self.scheduler.closing:
            return None
        return self.launch.shrink(child, model)

    async def _measure(self, child: Child) -> None:
        """Follow the memory of a ready child, and let the scheduler know when it takes another amount."""

        def changed(size: Size) -> None:
            if self.children.get(child.model) is child and not child.stopping:
                self._apply(self.scheduler.measured(child.model, size.needs, self._now()))

        await self.sizing.follow(child, changed)

    async def _watch(self, child: Child) -> None:
        """Kill a ready child that hangs."""
        reason = await until_hanging(child)
        if reason is not None and not child.stopping:
            child.hung = f"hung: {reason}"
            log.error("model %s: pid %d: %s; killing it", child.model, child.pid, reason)
            child.kill()

    async def _failed(self, model: str, child: Child | None, error: SupervisorError) -> None:
        log.error("%s", error.message)
        code = child.exit_code if child else None
        if child is not None:
            await child.stop()
            await self.sizing.until_back(child.pid)
            self._forget(model, child)
        data = {"status": "unloaded", "failed": True, "exit_code": code, "error": error.message}
        self.events.publish(model, "model_status", data)
        self._apply(self.scheduler.failed(model, error, self._now()))
        self._note_gone()

    async def _stop(self, model: str) -> None:
        child = self.children.get(model)
        if child is not None:
            if (still := self.catalog.get(model)) is not None:
                await self.slots.save(child, still, self.launch.slots_key(child, still))
            self.sizing.look(child)
            await child.stop()
            await self.sizing.until_back(child.pid)
            self._forget(model, child)
        self._size(model)
        log.info("model %s: stopped", model)
        self.events.publish(model, "model_status", {"status": "unloaded"})
        self._apply(self.scheduler.stopped(model, self._now()))
        self._note_gone()

    def _make_child(self, model_id: str) -> Child:
        model = self._model(model_id)
        self.scheduler.limits = self.launch.limits()
        socket, slots = self.runtime.new_socket(), self.slots.folder(model)
        command = self.launch.command(model, socket, slots)
        self._size(model_id)
        words = command + self.launch.cache_bound(model, self.scheduler.limits)
        child = Child(model_id, words, socket, self.log_of(model_id), plan.stop_seconds(self.config, model))
        child.planned, child.slots = command, slots
        if slots is not None and (key := self.launch.slots_key(child, model)) is not None:
            child.kept = self.slots.expect(model, key)
        self.children[model_id] = child
        self._set_rules(self.scheduler.entry(model_id), model)
        return child

    def _size(self, model_id: str) -> None:
        """Tell the scheduler how much memory the next child of a model will take."""
        model = self.catalog.get(model_id)
        if model is not None and (size := self.launch.size(model)) is not None:
            self.scheduler.entry(model_id).needs = size.needs

    def _set_rules(self, entry: Entry, model: Model) -> None:
        entry.pinned = plan.override_for(self.config, model).pin
        entry.idle_unload = plan.idle_unload(self.config, model)

    def _model(self, model_id: str) -> Model:
        model = self.catalog.get(model_id)
        if model is None:
            raise ModelNotFound(model_id, [], len(self.catalog.models))
        return model

    def _forget(self, model: str, child: Child) -> None:
        self.runtime.forget(child.socket)
        child.gone.set()
        if self.children.get(model) is child:
            del self.children[model]

    def _note_gone(self) -> None:
        if not any(entry.state in OCCUPYING for entry in self.scheduler.entries.values()):
            self._gone.set()

    async def _get_to_know(self, child: Child) -> None:
        """Ask a child that has loaded for its patch series and its memory; warn when the patches are not ours."""
        try:
            status, body = await child.call("GET", "/props")
            if status != 200:
                return  # it wants a key of its own
            child.patches = json.loads(body).get("patch_series", "none")
            if not any(word.startswith("--atlas") for word in child.command):
                return
            status, body = await child.call("GET", "/v1/atlas/status")
            if status == 200:
                child.atlas = atlas_support.reported(json.loads(body), child.log.tail(TAIL_LINES))
        except (OSError, UpstreamClosed, ValueError, AttributeError):
            return
        finally:
            if child.patches not in (None, self.patches):
                log.warning(
                    "model %s: this llama-server carries the patches %r, not %r; `llama-supervisor build` makes ours",
                    child.model,
                    child.patches,
                    self.patches,
                )

    # Events

    def _publish_progress(self, child: Child) -> None:
        self.events.publish(child.model, "model_status", {"status": "loading", "progress": child.progress})

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name, context=Context())  # not that of the request which led to it
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the fleet failed", exc_info=error)

    def status_of(self, entry: Entry) -> dict[str, Any]:
        """Return how one model does, for `/api/v1/status`."""
        child = self.children.get(entry.model)
        progress = child.progress if child else None
        now = self._now()
        ready = entry.state in (State.READY, State.DRAINING)
        return {
            "id": entry.model,
            "state": str(entry.state),
            "progress": progress.get("value") if progress else None,
            "stage": progress.get("current") if progress else None,
            "leases": len(entry.leases),
            "waiting": len(entry.waiters),
            "queue": [_place(number, waiter, now) for number, (_, waiter) in enumerate(entry.queue()[:QUEUE_SHOWN], 1)],
            "pid": child.pid if child else None,
            "rss_bytes": child.rss() if child else None,
            "memory": self.sizing.status_of(entry.model),
            "ready_seconds": round(now - entry.ready_at, 3) if ready else None,
            "idle_seconds": round(now - entry.last_used, 3) if ready and not entry.leases else None,
            "restarts": entry.restarts,
            "error": entry.error.message if entry.error else None,
            "pinned": entry.pinned,
            "patches": child.patches if child else None,
        }


def _place(position: int, waiter: Waiter, now: float) -> dict[str, Any]:
    """Return one place in a queue, for `/api/v1/status`."""
    waited = round(now - waiter.since, 3)
    return {"position": position, "waited_seconds": waited, "priority": waiter.priority.name.lower()}


def _name(work: str, model: str) -> str:
    """Return the name of a task, by which `problems` finds out whether it goes on."""
    return f"{work} {model}"
