"""Routes that KAREN's documents describe: a prompt answered with its timing, how things perform, and what KAREN may do.

docs/karen.md tells of the extension that uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, NamedTuple

import psutil
from aiohttp import web
from pydantic import ValidationError

from supervisor import explain
from supervisor.access import caller_of, permit
from supervisor.child import Child
from supervisor.config import Config
from supervisor.entry import State
from supervisor.errors import BadRequest, ChildFailed, SupervisorError
from supervisor.fleet import Lease
from supervisor.relay import error_event, exchange
from supervisor.routes.keys import CATALOG, FLEET, SWITCHES
from supervisor.routes.models import atlas_support
from supervisor.routes.priority import priority_of
from supervisor.routes.wrap import guarded, json_object
from supervisor.upstream import Connection, UpstreamClosed

CHAT = "/v1/chat/completions"

RESERVED = frozenset(("messages", "model", "prompt", "stream", "stream_options", "n"))
"""What `parameters` may not hold: the route sets it."""

METRICS_SECONDS = 1.0
"""How long a child may take to tell its figures."""

_FIGURES = {
    "prompt_tokens_total": "prompt_tokens",
    "tokens_predicted_total": "generated_tokens",
    "prompt_tokens_seconds": "prompt_tokens_per_second",
    "predicted_tokens_seconds": "generated_tokens_per_second",
    "requests_processing": "requests_processing",
    "requests_deferred": "requests_deferred",
}
"""Our names for llama-server's metrics."""

_METRIC = re.compile(r"^llamacpp:(\w+) (\S+)$", re.MULTILINE)

_STARTED = time.monotonic()

Json = dict[str, Any]


@guarded
async def inference(request: web.Request) -> web.StreamResponse:
    """POST /inference {"prompt", "parameters", "stream", "model_id"}: the answer as a chat's, with its timing."""
    asked = await json_object(request)
    body = _chat_body(asked)
    for key in ("model", "model_id"):
        if not isinstance(asked.get(key), str | None):
            raise BadRequest(f"'{key}' must be a string", param=key)
    name = asked.get("model") or asked.get("model_id")
    model = request.app[CATALOG].resolve(name, request.app[FLEET].running())
    permit(request, model)
    content = json.dumps(body | {"model": model.id}).encode()
    began = time.monotonic()
    lease = await request.app[FLEET].acquire(model.id, priority=priority_of(request))
    watch = _Watch(began, time.monotonic())
    if body["stream"]:
        return await _stream(request, content, lease, watch)
    async with exchange(request, CHAT, content, lease) as connection:
        text = await _whole(connection)
    if connection.status != HTTPStatus.OK:
        return _refusal(connection, text)
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        told = {"response": choice["message"].get("content") or "", "finish_reason": choice.get("finish_reason")}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ChildFailed(f"model {model.id!r} answered something that is no chat") from error
    _charge(request, answer)
    return web.json_response({"model": model.id} | told | _ending(answer, watch))


def _chat_body(asked: Json) -> Json:
    """Return the chat that a prompt becomes. Raises `BadRequest`."""
    prompt, parameters, stream = asked.get("prompt"), asked.get("parameters"), asked.get("stream", False)
    if parameters is None:
        parameters = {}
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("'prompt' must be a text", param="prompt")
    if not isinstance(parameters, dict):
        raise BadRequest("'parameters' must be an object", param="parameters")
    if not isinstance(stream, bool):
        raise BadRequest("'stream' must be true or false", param="stream")
    if wrong := sorted(RESERVED & set(parameters)):
        raise BadRequest(f"'parameters' may not hold {wrong[0]!r}", param=f"parameters.{wrong[0]}")
    streaming = {"stream_options": {"include_usage": True}} if stream else {}
    return parameters | {"messages": [{"role": "user", "content": prompt}], "stream": stream} | streaming


async def _whole(connection: Connection) -> bytes:
    pieces = []
    while piece := await connection.read():
        pieces.append(piece)
    return b"".join(pieces)


def _refusal(connection: Connection, text: bytes) -> web.Response:
    """Return what a child refuses a request with, as it is."""
    return web.Response(status=connection.status, body=text, content_type="application/json")


class _Watch(NamedTuple):
    """When a request came and when its model had time for it, by the monotonic clock."""

    began: float
    granted: float


def _ending(answer: Json, watch: _Watch) -> Json:
    """Return what an answer ends with. Times are in milliseconds; `wait_ms`: until its model had time for it."""
    timings = answer.get("timings") or {}
    timing = {
        "total_ms": round((time.monotonic() - watch.began) * 1000, 3),
        "wait_ms": round((watch.granted - watch.began) * 1000, 3),
        "prompt_ms": timings.get("prompt_ms"),
        "generation_ms": timings.get("predicted_ms"),
        "tokens_per_second": timings.get("predicted_per_second"),
    }
    atlas = {"atlas": answer["atlas"]} if "atlas" in answer else {}
    return {"usage": answer.get("usage"), "timing": timing} | atlas


def _charge(request: web.Request, answer: Json) -> None:
    """Charge the key for the tokens that an answer tells."""
    caller = caller_of(request)
    if caller is not None and caller.counts_tokens:
        caller.charge(int((answer.get("usage") or {}).get("total_tokens") or 0))


async def _stream(request: web.Request, content: bytes, lease: Lease, watch: _Watch) -> web.StreamResponse:
    """Send `{"response": piece}` for each piece, at the end the timing and `[DONE]`."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        async with exchange(request, CHAT, content, lease) as connection:
            if connection.status != HTTPStatus.OK:
                return _refusal(connection, await _whole(connection))
            await response.prepare(request)
            ending = await _relay_events(request, connection, response)
    except ChildFailed as error:
        if not response.prepared:
            raise
        await response.write(error_event(request.path, error))
        return response
    if ending is not None:
        told = {"response": "", "done": True, "model": lease.child.model, "finish_reason": ending["finish_reason"]}
        await _send(response, told | _ending(ending, watch))
        await response.write(b"data: [DONE]\n\n")
    return response


async def _relay_events(request: web.Request, connection: Connection, response: web.StreamResponse) -> Json | None:
    """Send the pieces of an answer as they come; return what its last events told, None when it ended in an error."""
    seen: Json = {"finish_reason": None}
    pieces = 0
    try:
        async for event in _events(connection):
            if "error" in event:
                await _send(response, event)
                return None
            choice: Json = next(iter(event.get("choices") or []), {})
            seen |= {key: event[key] for key in ("usage", "timings", "atlas") if event.get(key)}
            seen["finish_reason"] = choice.get("finish_reason") or seen["finish_reason"]
            if text := (choice.get("delta") or {}).get("content"):
                pieces += 1
                await _send(response, {"response": text})
    finally:
        _charge(request, seen if "usage" in seen else {"usage": {"total_tokens": pieces}})
    return seen


async def _send(response: web.StreamResponse, event: Json) -> None:
    await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")


async def _events(connection: Connection) -> AsyncIterator[Json]:
    rest = b""
    while piece := await connection.read():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


@guarded
async def performance(request: web.Request) -> web.StreamResponse:
    """GET /performance: the machine, the supervisor, and each model that runs; loads nothing, keeps nothing awake."""
    fleet = request.app[FLEET]
    memory = psutil.virtual_memory()
    entries = [entry for entry in fleet.scheduler.entries.values() if entry.state is not State.ABSENT]
    figures = await asyncio.gather(*(_figures(fleet.children.get(entry.model)) for entry in entries))
    return web.json_response(
        {
            "system": {
                "cores": os.cpu_count(),
                "cpu_percent": psutil.cpu_percent(),
                "load_average": os.getloadavg(),
                "memory_total_bytes": memory.total,
                "memory_available_bytes": memory.available,
            },
            "supervisor": {
                "rss_bytes": psutil.Process().memory_info().rss,
                "uptime_seconds": round(time.monotonic() - _STARTED, 3),
            },
            "models": [
                fleet.status_of(entry) | {"figures": told} for entry, told in zip(entries, figures, strict=True)
            ],
        }
    )


async def _figures(child: Child | None) -> Json | None:
    """Return what a child measured of itself; None when it does not tell, as with `monitoring.child_metrics` off."""
    if child is None or child.stopping:
        return None
    with contextlib.suppress(OSError, UpstreamClosed, TimeoutError):
        status, text = await asyncio.wait_for(child.call("GET", "/metrics"), METRICS_SECONDS)
        if status == HTTPStatus.OK:
            found = dict(_METRIC.findall(text.decode("utf-8", "replace")))
            return {ours: float(found[theirs]) for theirs, ours in _FIGURES.items() if theirs in found}
    return None


@guarded
async def get_config(request: web.Request) -> web.StreamResponse:
    """GET /karen/config?model=: what the extension may do here, which model that is, and whether it has a memory."""
    fleet, name = request.app[FLEET], request.query.get("model")
    told: Json = request.app[SWITCHES].karen.model_dump()
    try:
        model = request.app[CATALOG].resolve(name, fleet.running())
        permit(request, model)
    except SupervisorError:
        if name:
            raise
        return web.json_response(told | {"model": None, "atlas": None})
    return web.json_response(told | {"model": model.id, "atlas": atlas_support(model, fleet).enabled})


@guarded
async def set_config(request: web.Request) -> web.StreamResponse:
    """POST /karen/config {"integration_enabled": false, ...}: change some of it, until the supervisor ends."""
    switches = request.app[SWITCHES]
    values = {"karen": switches.karen.model_dump() | await json_object(request)}
    try:
        switches.karen = Config.model_validate(values, strict=True).karen
    except ValidationError as error:
        raise BadRequest("; ".join(explain.problems(error, "the request", values))) from None
    return web.json_response(switches.karen.model_dump())


def add(app: web.Application) -> None:
    """Add the routes."""
    app.router.add_post("/inference", inference)
    app.router.add_get("/performance", performance)
    app.router.add_get("/karen/config", get_config)
    app.router.add_post("/karen/config", set_config)
