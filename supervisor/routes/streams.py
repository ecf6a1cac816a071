"""Resumable streams: llama-server keeps an answer by its conversation id; here it is found again by that id.

A request with the header `X-Conversation-Id` goes on in its child when the client leaves, and can be read again at
`/v1/stream`. Those requests name a conversation, not a model, so the model that served it last is remembered.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from aiohttp import web

from supervisor.errors import NotLoaded, SupervisorError
from supervisor.relay import relay
from supervisor.routes.keys import CATALOG, CONVERSATIONS, FLEET
from supervisor.routes.wrap import guarded, json_object
from supervisor.upstream import UpstreamClosed

MOST = 10_000
"""Conversations that are remembered; the oldest are forgotten first."""

Conversations = OrderedDict[str, str]


class NoSession(SupervisorError):
    """No running model holds an answer of that conversation (404)."""

    status = 404
    type = "not_found_error"


def remember(conversations: Conversations, conversation: str, model: str) -> None:
    """Note that `model` serves `conversation` now."""
    conversations[conversation] = model
    conversations.move_to_end(conversation)
    if len(conversations) > MOST:
        conversations.popitem(last=False)


@guarded
async def one_stream(request: web.Request) -> web.StreamResponse:
    """GET or DELETE /v1/stream?conv_id=...: read on, or end, the answer of a conversation."""
    fleet, catalog = request.app[FLEET], request.app[CATALOG]
    owner = request.app[CONVERSATIONS].get(request.query.get("conv_id", ""))
    model = catalog.resolve(request.query.get("model") or owner, fleet.running())
    try:
        lease = await fleet.acquire(model.id, start=False)
    except NotLoaded as error:
        if request.method == "DELETE":
            return web.Response(status=204)
        raise NoSession("no running model holds this conversation") from error
    return await relay(request, b"", lease)


@guarded
async def lookup(request: web.Request) -> web.StreamResponse:
    """POST /v1/streams/lookup {"conversation_ids": [...]}: which of them have an answer, over all running models."""
    fleet = request.app[FLEET]
    body = json.dumps(await json_object(request)).encode()
    found: list[Any] = []
    for model in fleet.running():
        try:
            lease = await fleet.acquire(model, start=False)
        except SupervisorError:
            continue  # it went away meanwhile, and its answers with it
        try:
            status, answer = await lease.child.call("POST", "/v1/streams/lookup", body)
            if status == 200:
                found += json.loads(answer)
        except (OSError, UpstreamClosed, ValueError):
            continue
        finally:
            lease.release()
    return web.json_response(found)


def add(app: web.Application) -> None:
    """Add the routes."""
    app.router.add_get("/v1/stream", one_stream)
    app.router.add_delete("/v1/stream", one_stream)
    app.router.add_post("/v1/streams/lookup", lookup)
