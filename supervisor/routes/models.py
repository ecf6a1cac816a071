"""Which models are there, and load and unload them: OpenAI's list and llama.cpp's router routes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from aiohttp import web

from supervisor import plan
from supervisor.access import caller_of, permit
from supervisor.atlas_support import Support, expected
from supervisor.errors import BadRequest, ModelInvalid, ModelNotFound
from supervisor.fleet import Fleet
from supervisor.models.catalog import Model
from supervisor.models.folder_scan import show
from supervisor.routes.gate import demand, may
from supervisor.routes.keys import CATALOG, FLEET
from supervisor.routes.wrap import guarded, json_object
from supervisor.scheduler import Entry, State

PING_SECONDS = 15
"""Pause between two comments that keep a silent event stream open."""

STATUS = {
    State.ABSENT: "unloaded",
    State.STARTING: "loading",
    State.READY: "loaded",
    State.DRAINING: "unloading",
    State.STOPPING: "unloading",
    State.FAILED: "failed",
}


def describe(model: Model, fleet: Fleet) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it; a running one adds what its child says of itself."""
    entry = fleet.scheduler.entries.get(model.id) or Entry(model.id)
    child = fleet.children.get(model.id)
    header = model.header
    described: dict[str, Any] = {
        "id": model.id,
        "object": "model",
        "created": int(model.mtime),
        "owned_by": "llamacpp",
        "aliases": [model.id, *model.aliases],
        "tags": [],
        "status": _status(model, entry, fleet),
        "path": show(model.path),
        "size": model.size,
        "context_length": header.context_length if header else None,
        "architecture_name": header.architecture if header else None,
        "quantization": header.quantization if header else None,
        "parameters": header.parameter_count if header else None,
        "multimodal": model.mmproj is not None,
        "atlas_support": asdict(_atlas_support(model, fleet)),
    }
    if child is not None and entry.state in (State.READY, State.DRAINING):
        info = child.info
        described["aliases"] = sorted({*described["aliases"], *info.get("aliases", [])})
        described["tags"] = info.get("tags", [])
        described |= {key: value for key, value in info.items() if key not in described}
    return described


def _atlas_support(model: Model, fleet: Fleet) -> Support:
    child = fleet.children.get(model.id)
    if child is not None and child.atlas is not None:
        return child.atlas
    return expected(model, plan.atlas_of(fleet.config, model), plan.override_for(fleet.config, model).args)


def _status(model: Model, entry: Entry, fleet: Fleet) -> dict[str, Any]:
    if model.error is not None:
        return {"value": "invalid", "error": model.error}
    status: dict[str, Any] = {"value": STATUS[entry.state]}
    child = fleet.children.get(model.id)
    if child is not None:
        status["args"] = [show(arg) for arg in child.command]
        if entry.state is State.STARTING and child.progress:
            status["progress"] = child.progress.get("value")
    if entry.state is State.FAILED and entry.error is not None:
        status |= {"failed": True, "error": entry.error.message}
    return status


def _shown(request: web.Request, model: Model) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it for whom asks: how it is run is for those who manage."""
    described = describe(model, request.app[FLEET])
    if not may(request, "manage"):
        del described["path"]
        described["status"].pop("args", None)
    return described


@guarded
async def list_models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models and /models: all models that the key may use; `?reload=1` looks into the folder first."""
    catalog, caller = request.app[CATALOG], caller_of(request)
    if request.query.get("reload"):
        demand(request, "manage")
        await catalog.rescan()
    models = catalog.models.values()
    data = [_shown(request, model) for model in models if caller is None or caller.may_use(model)]
    return web.json_response({"object": "list", "data": data})


@guarded
async def get_model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{id}: one model, by id or alias."""
    catalog = request.app[CATALOG]
    name = request.match_info["id"]
    model = catalog.get(name)
    if model is None:
        model = catalog.resolve(name, request.app[FLEET].running())
    permit(request, model)
    return web.json_response(_shown(request, model))


@guarded
async def load(request: web.Request) -> web.StreamResponse:
    """POST /models/load {"model": id}: start it; the answer does not wait, `/models/sse` tells how it goes."""
    model = await _named(request)
    if model.error is not None:
        raise ModelInvalid(f"model {model.id!r} cannot be loaded: {model.error}", param="model")
    request.app[FLEET].load(model.id)
    return web.json_response({"success": True})


@guarded
async def unload(request: web.Request) -> web.StreamResponse:
    """POST /models/unload {"model": id, "force": false}: stop it after its running requests, or at once."""
    body = await json_object(request)
    force = body.get("force", False)
    if not isinstance(force, bool):
        raise BadRequest("'force' must be true or false", param="force")
    model = await _named(request)
    request.app[FLEET].unload(model.id, force=force)
    return web.json_response({"success": True})


async def _named(request: web.Request) -> Model:
    name = (await json_object(request)).get("model")
    if not isinstance(name, str) or not name:
        raise BadRequest("'model' must be the id of a model", param="model")
    catalog = request.app[CATALOG]
    model = catalog.get(name)
    if model is None:
        raise ModelNotFound(name, catalog.near(name), len(catalog.models))
    permit(request, model)
    return model


@guarded
async def events(request: web.Request) -> web.StreamResponse:
    """GET /models/sse: what happens to the models, as server-sent events."""
    fleet = request.app[FLEET]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    queue = fleet.listen()
    try:
        await response.prepare(request)
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), PING_SECONDS)
            except TimeoutError:
                await response.write(b": ping\n\n")
                continue
            if event is None:
                break
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    finally:
        fleet.unlisten(queue)
    return response


def add(app: web.Application) -> None:
    """Add the routes."""
    for path in ("/v1/models", "/models"):
        app.router.add_get(path, list_models)
    app.router.add_get("/models/sse", events)
    app.router.add_get("/v1/models/{id:.+}", get_model)
    app.router.add_post("/models/load", load)
    app.router.add_post("/models/unload", unload)
