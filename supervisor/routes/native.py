"""The routes that llama-server itself answers; the supervisor only finds out which model is meant."""

from __future__ import annotations

import logging
import re
from email.parser import BytesHeaderParser
from email.policy import HTTP
from typing import Any

import msgspec
from aiohttp import web

from supervisor.access import permit
from supervisor.errors import BadRequest, ChildDied, NotSupported, SupervisorError
from supervisor.models.catalog import Model
from supervisor.plan import SLOT_PATH, override_for
from supervisor.relay import relay
from supervisor.routes.keys import CATALOG, FLEET, TURNS
from supervisor.routes.priority import priority_of
from supervisor.routes.streams import remember
from supervisor.routes.wrap import body_of, guarded

log = logging.getLogger(__name__)

POST_ROUTES = [
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/chat/completions/control",
    "/v1/completions",
    "/completions",
    "/completion",
    "/infill",
    "/v1/responses",
    "/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/input_tokens",
    "/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
    "/responses/input_tokens",
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/v1/rerank",
    "/rerank",
    "/v1/reranking",
    "/reranking",
    "/v1/systemone",
    "/v1/audio/transcriptions",
    "/audio/transcriptions",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/props",
    "/lora-adapters",
    "/tools",
    "/cors-proxy",
    "/v1/atlas/config",
    "/v1/atlas/memory/save",
    "/v1/atlas/memory/load",
]
"""POST routes of llama-server b11434, as `tools/server/server.cpp` registers them, and those of the memory."""

SLOT_ACTION = "/slots/{id_slot}"

GET_ROUTES = [
    "/props",
    "/lora-adapters",
    "/slots",
    "/tools",
    "/cors-proxy",
    "/v1/atlas/status",
    "/v1/atlas/config",
    "/v1/atlas/metrics",
]
"""GET routes of llama-server; those in `OBSERVING` never start a model."""

DELETE_ROUTES = ["/v1/atlas/memory/reset"]

OBSERVING = frozenset(["/slots", "/metrics", "/v1/atlas/status", "/v1/atlas/config", "/v1/atlas/metrics"])

ONCE = frozenset(
    [
        "/props",
        "/lora-adapters",
        SLOT_ACTION,
        "/tools",
        "/cors-proxy",
        "/v1/chat/completions/control",
        "/v1/atlas/config",
        "/v1/atlas/memory/save",
        "/v1/atlas/memory/load",
    ]
)
"""Routes that are not asked a second time."""

ASIDE = ONCE | frozenset(
    [
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/input_tokens",
        "/chat/completions/input_tokens",
        "/v1/responses/input_tokens",
        "/responses/input_tokens",
    ]
)
"""POST routes that no slot computes, so that they need not wait for one."""

_LOCAL_PAGE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
_FALSE = frozenset(["0", "false", "no", "off"])


class _Routing(msgspec.Struct):
    """The part of a JSON body that routing needs; msgspec checks the syntax of the rest without building it."""

    model: str | None = None


_decode = msgspec.json.Decoder(_Routing).decode
_check_syntax = msgspec.json.Decoder(msgspec.Raw).decode


def model_in_json(body: bytes) -> str | None:
    """Return the body's `model`, None when it has none. Raises `BadRequest` when it is no JSON or no string."""
    try:
        try:
            return _decode(body).model
        except msgspec.ValidationError as error:
            if "$.model" in str(error):
                raise BadRequest("'model' must be a string", param="model") from error
            _check_syntax(body)
            return None  # not an object, as /lora-adapters takes
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from error


def model_in_form(body: bytes, content_type: str) -> str | None:
    """Return the field `model` of a multipart form (RFC 7578), None when it has none. Raises `BadRequest`."""
    boundary = HTTP.header_factory("Content-Type", content_type).params.get("boundary")
    if not boundary:
        raise BadRequest("the multipart form has no boundary")
    for part in body.split(b"--" + boundary.encode("utf-8", "surrogateescape"))[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        disposition: Any = BytesHeaderParser(policy=HTTP).parsebytes(head.lstrip(b"\r\n")).get("Content-Disposition")
        if disposition is not None and disposition.params.get("name") == "model":
            return content.removesuffix(b"\r\n").decode("utf-8", "replace")
    return None


def model_of(request: web.Request, body: bytes) -> str | None:
    """Return which model a request names: in its body, else in its query; None when in neither."""
    name = None
    if body.strip():
        content_type = request.headers.get("Content-Type", "")
        if content_type.lower().startswith("multipart/form-data"):
            name = model_in_form(body, content_type)
        else:
            name = model_in_json(body)
    return name or request.query.get("model")


def find_model(request: web.Request, body: bytes) -> Model:
    """Return the model that a request is for.

    Raises `BadRequest`, `ModelNotFound`, `ModelInvalid` or `ModelNotAllowed`.
    """
    catalog = request.app[CATALOG]
    name = model_of(request, body)
    model = catalog.models.get(name or "")
    if model is None or model.error is not None:
        model = catalog.resolve(name, request.app[FLEET].running())
    permit(request, model)
    return model


@guarded
async def pass_through(request: web.Request) -> web.StreamResponse:
    """Relay a request to the child of its model, starting that if need be."""
    app = request.app
    await app[TURNS].enter()
    body = await body_of(request) if request.body_exists else b""
    fleet = app[FLEET]
    model = find_model(request, body)
    start = request.path not in OBSERVING or request.method == "POST"
    if request.query_string:
        start = start and request.query.get("autoload", "").lower() not in _FALSE
    if "X-Conversation-Id" in request.headers:
        remember(request, model.id)
    priority, counts = priority_of(request), computes(request)
    first = True
    while True:
        try:
            lease = await fleet.acquire(model.id, start=start, priority=priority, counts=counts)
            return await relay(request, body, lease)
        except ChildDied as died:
            if not first or not may_repeat(request, body):
                raise
            first = False
            log.warning("%s; asking a fresh one", died.message.partition("\n")[0])
            fleet.metrics.retries.labels(model.id).inc()
            await fleet.until_gone(model.id)


@guarded
async def slot_action(request: web.Request) -> web.StreamResponse:
    """Relay `POST /slots/N` to a model whose own `args` name a folder for it; the one that we give is ours alone."""
    model = find_model(request, await body_of(request) if request.body_exists else b"")
    if SLOT_PATH not in {arg.partition("=")[0] for arg in override_for(request.app[FLEET].config, model).args}:
        raise NotSupported("This server does not support slots action. Start it with `--slot-save-path`")
    return await pass_through(request)


def may_repeat(request: web.Request, body: bytes) -> bool:
    """Whether a child may be asked again when another died over the same request, which only computes an answer.

    Not what changes something, acts outside, or goes on with an ATLAS session, as nobody knows how far it came.
    """
    return request.method in ("GET", "POST") and _canonical(request) not in ONCE and b'"atlas"' not in body


def computes(request: web.Request) -> bool:
    """Whether a request takes one of its model's slots."""
    return request.method == "POST" and _canonical(request) not in ASIDE


def _canonical(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


@guarded
async def preflight(request: web.Request) -> web.StreamResponse:
    """OPTIONS: what the model's child allows to web pages; pages on this machine only, while it does not run."""
    fleet = request.app[FLEET]
    try:
        model = request.app[CATALOG].resolve(request.query.get("model"), fleet.running())
        lease = await fleet.acquire(model.id, start=False, counts=False)
    except SupervisorError:
        origin = request.headers.get("Origin", "")
        allowed = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "*",
        }
        return web.Response(headers=allowed if _LOCAL_PAGE.fullmatch(origin) else None)
    return await relay(request, b"", lease)


def add(app: web.Application) -> None:
    """Add the routes."""
    for path in POST_ROUTES:
        app.router.add_post(path, pass_through)
    app.router.add_post(SLOT_ACTION, slot_action)
    for path in GET_ROUTES:
        app.router.add_get(path, pass_through)
    for path in DELETE_ROUTES:
        app.router.add_delete(path, pass_through)
    for path in sorted({*POST_ROUTES, SLOT_ACTION, *GET_ROUTES, *DELETE_ROUTES}):
        app.router.add_options(path, preflight)
