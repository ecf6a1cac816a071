"""Resumable streams: llama-server keeps an answer by its conversation id; here it is found again by that id.

A request with the header `X-Conversation-Id` goes on in its child when the client leaves, and can be read again at
`/v1/stream`. Those requests name a conversation, not a model, so the model that served it last is remembered, and
with API keys also whose it is: nobody reaches another one's conversations.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from supervisor.access import caller_of, permit
from supervisor.errors import NotLoaded, SupervisorError
from supervisor.relay import relay
from supervisor.routes.keys import CATALOG, CONVERSATIONS, FLEET, Conversation
from supervisor.routes.wrap import guarded, json_object
from supervisor.upstream import UpstreamClosed

MOST = 10_000
"""Conversations that are remembered; the oldest are forgotten first."""


class NoSession(SupervisorError):
    """No running model holds an answer of that conversation (404)."""

    status = 404
    type = "not_found_error"


class OthersConversation(SupervisorError):
    """The conversation belongs to another API key (409)."""

    status = 409
    type = "invalid_request_error"
    code = "conversation_in_use"


def remember(request: web.Request, model: str) -> None:
    """Note that `model` serves the conversation that the request names. Raises `OthersConversation`."""
    conversations, owner = request.app[CONVERSATIONS], _owner(request)
    for name in request.headers.getall("X-Conversation-Id"):
        before = conversations.get(name)
        if before is not None and before.owner not in (None, owner) and owner is not None:
            raise OthersConversation("X-Conversation-Id names a conversation of another API key; choose another")
        conversations[name] = Conversation(model, owner)
        conversations.move_to_end(name)
        if len(conversations) > MOST:
            conversations.popitem(last=False)


def _owner(request: web.Request) -> str | None:
    caller = caller_of(request)
    return caller.owner if caller is not None else None


def _may_reach(request: web.Request, name: str) -> bool:
    """Tell whether a conversation is the request's own; without keys all are."""
    owner = _owner(request)
    found = request.app[CONVERSATIONS].get(name)
    return owner is None or (found is not None and found.owner == owner)


@guarded
async def one_stream(request: web.Request) -> web.StreamResponse:
    """GET or DELETE /v1/stream?conv_id=...: read on, or end, the answer of a conversation."""
    fleet, catalog = request.app[FLEET], request.app[CATALOG]
    names = request.query.getall("conv_id", [""])
    found = request.app[CONVERSATIONS].get(names[0])
    if not all(_may_reach(request, name) for name in names):
        return _absent(request)
    model = catalog.resolve(request.query.get("model") or (found.model if found else None), fleet.running())
    permit(request, model)
    try:
        lease = await fleet.acquire(model.id, start=False, counts=False)
    except NotLoaded:
        return _absent(request)
    return await relay(request, b"", lease)


def _absent(request: web.Request) -> web.Response:
    """Answer for a conversation that there is not; to end it succeeds."""
    if request.method == "DELETE":
        return web.Response(status=204)
    raise NoSession("no running model holds this conversation")


@guarded
async def lookup(request: web.Request) -> web.StreamResponse:
    """POST /v1/streams/lookup {"conversation_ids": [...]}: which of them have an answer, over all running models."""
    fleet = request.app[FLEET]
    body = json.dumps(await json_object(request)).encode()
    found: list[Any] = []
    for model in fleet.running():
        try:
            lease = await fleet.acquire(model, start=False, counts=False)
        except SupervisorError:
            continue  # it went away meanwhile, and its answers with it
        try:
            status, answer = await lease.child.call("POST", "/v1/streams/lookup", body)
            if status == 200:
                found += [one for one in json.loads(answer) if _may_reach(request, one.get("conversation_id", ""))]
        except (OSError, UpstreamClosed, ValueError, AttributeError):
            continue
        finally:
            lease.release()
    return web.json_response(found)


def add(app: web.Application) -> None:
    """Add the routes."""
    app.router.add_get("/v1/stream", one_stream)
    app.router.add_delete("/v1/stream", one_stream)
    app.router.add_post("/v1/streams/lookup", lookup)
