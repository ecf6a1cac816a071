"""How does the supervisor do? Health, metrics, status, settings and the children's logs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from supervisor import __version__
from supervisor.access import permit
from supervisor.entry import COUNTED, State
from supervisor.errors import BadRequest, ModelNotFound
from supervisor.live import LIVE
from supervisor.metrics import METRICS, exposition
from supervisor.routes.keys import ACCESS, CATALOG, FLEET, URLS
from supervisor.routes.native import pass_through, preflight
from supervisor.routes.wrap import guarded
from supervisor.settings import show

_STARTED = time.monotonic()
DEFAULT_LOG_LINES = 200


async def health(request: web.Request) -> web.StreamResponse:
    """GET /health: 200 as long as the front serves."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.StreamResponse:
    """GET /readyz: 200 when requests can be served: models are started and stopped as they must, and nothing drains."""
    fleet, catalog, access = request.app[FLEET], request.app[CATALOG], request.app[ACCESS]
    scheduler = fleet.problems()
    if fleet.scheduler.closing:
        scheduler.append("the supervisor is shutting down")
    server = [] if fleet.launch.binary() is not None else ["there is no llama-server: run `llama-supervisor build`"]
    components = {"scheduler": scheduler, "llama_server": server, "models": catalog.problems, "keys": access.problems}
    good = not scheduler and not server
    described: dict[str, dict[str, Any]] = {
        name: {"status": "degraded" if found else "ok"} | ({"problems": found} if not access.on else {})
        for name, found in components.items()
    }  # anybody may ask, and with keys not everybody may know folders and models
    body = {"status": "ok" if good else "unavailable", "components": described}
    return web.json_response(body, status=HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics: the supervisor's and all running models'; with `?model=` what that model's child says itself."""
    if request.query.get("model"):
        return await pass_through(request)
    body = await exposition(request.app[METRICS], request.app[FLEET])
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def root(request: web.Request) -> web.StreamResponse:
    """GET /: what this is and where to go from here."""
    return web.json_response(
        {
            "name": "llama-supervisor",
            "version": __version__,
            "endpoints": ["/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/health"],
            "status": "/api/v1/status",
        }
    )


@guarded
async def status(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/status: the supervisor and every model that is not simply absent."""
    fleet, catalog, live = request.app[FLEET], request.app[CATALOG], request.app[LIVE]
    settings = live.settings
    entries = fleet.scheduler.entries.values()
    binary, version = fleet.launch.binary(), fleet.binary_version
    return web.json_response(
        {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - _STARTED, 3),
            "state": "draining" if fleet.scheduler.closing else "running",
            "config": str(settings.path) if settings.path else None,
            "addresses": request.app[URLS],
            "native": {
                "path": str(binary) if binary else None,
                "build": version.build if version else None,
                "patches": version.patches if version else None,
                "ours": version.patches == fleet.patches if version else None,
            },
            "models_directory": str(settings.config.models.directory),
            "keys_required": request.app[ACCESS].on,
            "problems": [*fleet.problems(), *live.problems, *catalog.problems, *request.app[ACCESS].problems],
            "restart_needed": live.restart_needed,
            "loaded": sum(entry.state in COUNTED for entry in entries),
            "max_loaded": fleet.scheduler.limits.max_loaded,
            "memory": {"budget_bytes": fleet.scheduler.limits.budget, "counted_bytes": fleet.scheduler.taken()},
            "models": [fleet.status_of(entry) for entry in entries if entry.state is not State.ABSENT],
        }
    )


@guarded
async def config(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/config: every setting in force, and what is wrong with the file since."""
    live = request.app[LIVE]
    rows = [{**row._asdict(), "value": json.loads(row.value)} for row in show(live.settings)]
    path = str(live.settings.path) if live.settings.path else None
    about = {"path": path, "problems": live.problems, "restart_needed": live.restart_needed}
    return web.json_response({**about, "settings": rows})


@guarded
async def reload(request: web.Request) -> web.StreamResponse:
    """POST /api/v1/config/reload: read the configuration anew and take it over, or say what is wrong with it."""
    return web.json_response(asdict(await request.app[LIVE].reload("asked to reload")))


@guarded
async def logs(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/models/{id}/logs: the last `lines` of a model's log; `follow=1` goes on as lines come."""
    catalog, fleet = request.app[CATALOG], request.app[FLEET]
    name = request.match_info["id"]
    model = catalog.get(name)
    model_id = model.id if model else name
    if model is None and model_id not in fleet.logs:
        raise ModelNotFound(name, catalog.near(name), len(catalog.models))
    if model is not None:
        permit(request, model)
    wanted = request.query.get("lines", str(DEFAULT_LOG_LINES))
    if not wanted.isdecimal() or len(wanted) > 9:
        raise BadRequest("'lines' must be a number from 0 to 999999999", param="lines")
    log = fleet.log_of(model_id)
    if request.query.get("follow", "0").lower() in ("0", "false", "no", ""):
        return web.Response(text="".join(line + "\n" for line in log.tail(int(wanted))))
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    async for line in log.follow(int(wanted)):
        await response.write(line.encode() + b"\n")
    return response


def add(app: web.Application) -> None:
    """Add the routes."""
    for path in ("/health", "/v1/health", "/livez"):
        app.router.add_get(path, health)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_options("/metrics", preflight)
    app.router.add_get("/", root)
    app.router.add_get("/api/v1/status", status)
    app.router.add_get("/api/v1/config", config)
    app.router.add_post("/api/v1/config/reload", reload)
    app.router.add_get("/api/v1/models/{id:.+}/logs", logs)
