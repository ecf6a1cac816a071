"""Routes of the long-context memory that must neither start a model nor keep it: its files, its metrics as events.

A child answers for its files when it runs, as it may hold their sessions; the supervisor itself when it does not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from supervisor import atlas_folder, plan
from supervisor.access import caller_of
from supervisor.entry import State
from supervisor.models.catalog import Model
from supervisor.relay import relay
from supervisor.routes.keys import FLEET
from supervisor.routes.native import find_model, pass_through, preflight
from supervisor.routes.wrap import body_of, guarded, json_object

FILES, INFO, EVENTS = "/v1/atlas/memory", "/v1/atlas/memory/info", "/v1/atlas/metrics/stream"


@guarded
async def list_files(request: web.Request) -> web.StreamResponse:
    """GET /v1/atlas/memory: the memory files of a model."""
    model = find_model(request, b"")
    if _answers(request, model):
        return await pass_through(request)
    return web.json_response({"files": await asyncio.to_thread(atlas_folder.listing, _folder(request, model))})


@guarded
async def file_info(request: web.Request) -> web.StreamResponse:
    """GET /v1/atlas/memory/info?file=: one of them, with its backups."""
    model = find_model(request, b"")
    if _answers(request, model):
        return await pass_through(request)
    name = request.query.get("file", "")
    return web.json_response(await asyncio.to_thread(atlas_folder.info, _folder(request, model), name))


@guarded
async def delete_file(request: web.Request) -> web.StreamResponse:
    """DELETE /v1/atlas/memory?file=: a file, its backups, and the session where a slot holds it."""
    body = await body_of(request) if request.body_exists else b""
    model = find_model(request, body)
    state = request.app[FLEET].scheduler.entry(model.id).state
    if state in (State.DRAINING, State.STOPPING) or _answers(request, model):
        return await pass_through(request)  # one that stops may save the session once more: the next one deletes it
    name = (await json_object(request)).get("file") if body.strip() else None
    name = request.query.get("file", "") if name is None else name
    if not isinstance(name, str):
        raise atlas_folder.WrongName("file: must be a string", param="file")
    # not in a thread: no child may start meanwhile
    return web.json_response({"deleted": atlas_folder.remove(_folder(request, model), name)})


@guarded
async def metrics_events(request: web.Request) -> web.StreamResponse:
    """GET /v1/atlas/metrics/stream: events for as long as the model runs; they do not keep it."""
    lease = await request.app[FLEET].acquire(find_model(request, b"").id, start=False, counts=False)
    lease.release()
    return await relay(request, b"", lease)


def _answers(request: web.Request, model: Model) -> bool:
    """Whether the child of `model` runs, or starts, with a memory."""
    fleet = request.app[FLEET]
    state, child = fleet.scheduler.entry(model.id).state, fleet.children.get(model.id)
    if state not in (State.STARTING, State.READY) or child is None:
        return False
    return plan.MEMORY_DIR in child.command and (child.atlas is None or bool(child.atlas.enabled))


def _folder(request: web.Request, model: Model) -> Path:
    """Return where the memory files of a model are, with keys those of the key's owner."""
    folder, caller = plan.memory_folder(request.app[FLEET].config, model), caller_of(request)
    return folder if caller is None else folder / caller.owner


def add(app: web.Application) -> None:
    """Add the routes."""
    app.router.add_get(FILES, list_files)
    app.router.add_get(INFO, file_info)
    app.router.add_delete(FILES, delete_file)
    app.router.add_get(EVENTS, metrics_events)
    for path in (FILES, INFO, EVENTS):
        app.router.add_options(path, preflight)
