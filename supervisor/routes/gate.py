"""Which scope does each route need? And the middleware that sees to it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable
from typing import Literal

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from supervisor.access import Access, caller_of, set_caller
from supervisor.api_keys import Scope
from supervisor.errors import InvalidApiKey, SupervisorError
from supervisor.relay import error_response
from supervisor.routes.keys import ACCESS

Need = Literal["nothing", "list", "any key"] | Scope
"""`list`: nothing while `api.open_models` is true."""

NEEDS: dict[Need, str] = {
    "nothing": """
        GET /health  GET /v1/health  GET /livez  GET /readyz
    """,
    "list": """
        GET /v1/models  GET /models  GET /v1/models/{id}
    """,
    "any key": """
        GET /  GET /api/v1/openapi.json  * /{path}
    """,
    "infer": """
        POST /v1/chat/completions  POST /chat/completions  POST /v1/chat/completions/control
        POST /v1/chat/completions/input_tokens  POST /chat/completions/input_tokens
        POST /v1/completions  POST /completions  POST /completion  POST /infill
        POST /v1/responses  POST /responses  POST /v1/responses/input_tokens  POST /responses/input_tokens
        POST /v1/messages  POST /v1/messages/count_tokens
        POST /v1/embeddings  POST /embeddings  POST /embedding
        POST /v1/rerank  POST /rerank  POST /v1/reranking  POST /reranking  POST /v1/systemone
        POST /v1/audio/transcriptions  POST /audio/transcriptions
        POST /tokenize  POST /detokenize  POST /apply-template
        GET /props  GET /lora-adapters
        GET /v1/stream  DELETE /v1/stream  POST /v1/streams/lookup
        GET /v1/atlas/status  GET /v1/atlas/config
        GET /v1/atlas/memory  GET /v1/atlas/memory/info  DELETE /v1/atlas/memory  DELETE /v1/atlas/memory/reset
        POST /v1/atlas/memory/save  POST /v1/atlas/memory/load
        POST /inference  GET /karen/config
    """,
    "manage": """
        POST /models/load  POST /models/unload  POST /models/unload/{id}  GET /models/sse
        POST /karen/config  GET /performance
        GET /api/v1/status  GET /api/v1/config  POST /api/v1/config/reload
        GET /api/v1/models/{id}/logs
        POST /props  POST /lora-adapters  GET /slots  POST /slots/{id_slot}  GET /metrics
        POST /v1/atlas/config  GET /v1/atlas/metrics  GET /v1/atlas/metrics/stream
    """,
    "admin": """
        GET /tools  POST /tools  GET /cors-proxy  POST /cors-proxy
    """,
}
"""Routes by what they need; one that is not here needs admin. `OPTIONS` needs nothing: browsers send it keyless."""

_ROUTE = re.compile(r"(\S+) (\S+)")


def needs() -> dict[str, Need]:
    """Return what each route needs, by `METHOD /path`."""
    return {" ".join(route): need for need, routes in NEEDS.items() for route in _ROUTE.findall(routes)}


def name_of(method: str, canonical: str) -> str:
    """Return a route's name in `needs`; HEAD is as GET."""
    return f"{'GET' if method == 'HEAD' else method} {canonical}"


def middleware(access: Access) -> Middleware:
    """Return the middleware that lets a request through to its handler, or answers 401, 403 or 429."""
    by_name = needs()
    known: dict[web.AbstractRoute, Need] = {}

    def need_of(route: web.AbstractRoute) -> Need:
        need = known.get(route)
        if need is None:
            canonical = route.resource.canonical if route.resource is not None else ""
            need = "nothing" if route.method == "OPTIONS" else by_name.get(name_of(route.method, canonical), "admin")
            if route.resource is not None:
                known[route] = need
        return need

    @web.middleware
    def gate(request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
        return checked(request, handler) if access.on else handler(request)

    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check(request, access, need_of(request.match_info.route))
        except SupervisorError as error:
            return error_response(request, error)
        return await handler(request)

    return gate


def _check(request: web.Request, access: Access, need: Need) -> None:
    """Note who asks. Raises `InvalidApiKey`, `MissingScope` or `RateLimited`."""
    if need == "nothing":
        return
    if need == "list" and access.open_models:
        with contextlib.suppress(InvalidApiKey):  # a good key narrows the list
            set_caller(request, access.identify(request.headers))
        return
    caller = access.identify(request.headers)
    match need:
        case "infer" | "manage" | "admin":
            caller.need(need)
    caller.begin()
    set_caller(request, caller)


def may(request: web.Request, scope: Scope) -> bool:
    """Tell whether a request may do what needs `scope`; without keys every one may."""
    caller = caller_of(request)
    return caller.key.has(scope) if caller is not None else not request.app[ACCESS].on


def demand(request: web.Request, scope: Scope) -> None:
    """Raise the error for a request that may not do what needs `scope`."""
    if not may(request, scope):
        request.app[ACCESS].identify(request.headers).need(scope)
