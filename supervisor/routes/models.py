"""Which models are there, and load and unload them: OpenAI's list and llama.cpp's router routes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from supervisor import explain, plan
from supervisor.access import caller_of, permit
from supervisor.atlas_support import Support, expected
from supervisor.config import Config, PerformanceSection
from supervisor.entry import Entry, State
from supervisor.errors import BadRequest, ModelInvalid, ModelNotFound, SupervisorError
from supervisor.fleet import Fleet
from supervisor.models.catalog import Model
from supervisor.models.folder_scan import show
from supervisor.models.model_files import AUTO
from supervisor.residency import RAM
from supervisor.routes.gate import demand, may
from supervisor.routes.keys import CATALOG, FLEET
from supervisor.routes.wrap import guarded, json_object

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
        "memory": memory_of(model, fleet),
        "multimodal": model.mmproj is not None,
        "atlas_support": asdict(atlas_support(model, fleet)),
    }
    if child is not None and entry.state in (State.READY, State.DRAINING):
        info = child.info
        described["aliases"] = sorted({*described["aliases"], *info.get("aliases", [])})
        described["tags"] = info.get("tags", [])
        described |= {key: value for key, value in info.items() if key not in described}
    return described


def memory_of(model: Model, fleet: Fleet) -> dict[str, int | None] | None:
    """Return the bytes of the machine's memory that `model` takes; None: nobody asked for it yet."""
    size = fleet.sizing.sizes.get(model.id)
    return None if size is None else {"predicted": size.predicted[RAM], "measured": size.peak.get(RAM)}


def atlas_support(model: Model, fleet: Fleet) -> Support:
    """Return what `model` has of a long-context memory: what its child says, else what is expected."""
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
    """GET /v1/models and /models: all models that the key may use; `?reload=1` looks into the folder first.

    KAREN asks for the model `auto` only where it is listed, so OpenAI's list has it. The bare path adds what KAREN's
    documents have: which can be used, which run, and which one `auto` means.
    """
    catalog, caller = request.app[CATALOG], caller_of(request)
    if request.query.get("reload"):
        demand(request, "manage")
        await catalog.rescan()
    models = catalog.models.values()
    data = [_shown(request, model) for model in models if caller is None or caller.may_use(model)]
    by_id = {one["id"]: one for one in data}
    try:
        current = by_id.get(catalog.resolve(None, request.app[FLEET].running()).id)
    except SupervisorError:
        current = None
    listed: dict[str, Any] = {"object": "list", "data": data}
    if request.path == "/models":
        listed |= _at_a_glance(data) | {"current": current["id"] if current else None}
    elif current is not None and AUTO not in by_id:
        data.append(current | {"id": AUTO, "aliases": [AUTO], "alias_of": current["id"]})
    return web.json_response(listed)


def _at_a_glance(data: list[dict[str, Any]]) -> dict[str, list[str]]:
    by_status = {one["id"]: one["status"]["value"] for one in data}
    return {
        "available": [name for name, status in by_status.items() if status != "invalid"],
        "loaded": [name for name, status in by_status.items() if status == "loaded"],
    }


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
    """POST /models/load {"model": id, "parameters": {...}}: start it.

    The answer does not wait, `/models/sse` tells how it goes.
    """
    model = await _named(request)
    parameters = _load_parameters((await json_object(request)).get("parameters"))
    if model.error is not None:
        raise ModelInvalid(f"model {model.id!r} cannot be loaded: {model.error}", param="model")
    request.app[FLEET].load(model.id, parameters)
    return web.json_response({"success": True})


OTHER_NAMES = {
    "context_window": "context_size",
    "n_ctx": "context_size",
    "num_threads": "threads",
    "n_threads": "threads",
    "n_batch": "batch_size",
    "n_gpu_layers": "gpu_layers",
}
"""What KAREN's documents and llama.cpp call the keys of the section `performance`."""


def _load_parameters(given: Any) -> PerformanceSection | None:
    """Return the `parameters` of a load, None without any. Raises `BadRequest`."""
    if given is None or given == {}:
        return None
    if not isinstance(given, dict):
        raise BadRequest("'parameters' must be an object", param="parameters")
    named = {OTHER_NAMES.get(key, key): value for key, value in given.items()}
    try:
        return Config.model_validate({"performance": named}, strict=True).performance
    except ValidationError as error:
        problems = explain.problems(error, "parameters", {"performance": named})
        raise BadRequest("; ".join(problems), param="parameters") from None


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


@guarded
async def unload_by_path(request: web.Request) -> web.StreamResponse:
    """POST /models/unload/{id}: stop it after its running requests."""
    request.app[FLEET].unload(_find(request, request.match_info["id"]).id)
    return web.json_response({"success": True})


async def _named(request: web.Request) -> Model:
    body = await json_object(request)
    name = body.get("model", body.get("model_id"))
    if not isinstance(name, str) or not name:
        raise BadRequest("'model' must be the id of a model", param="model")
    return _find(request, name)


def _find(request: web.Request, name: str) -> Model:
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
    queue = fleet.events.listen()
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
        fleet.events.unlisten(queue)
    return response


def add(app: web.Application) -> None:
    """Add the routes."""
    for path in ("/v1/models", "/models"):
        app.router.add_get(path, list_models)
    app.router.add_get("/models/sse", events)
    app.router.add_get("/v1/models/{id:.+}", get_model)
    app.router.add_post("/models/load", load)
    app.router.add_post("/models/unload", unload)
    app.router.add_post("/models/unload/{id:.+}", unload_by_path)
