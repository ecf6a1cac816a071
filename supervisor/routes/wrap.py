"""Turns the errors that handlers raise into answers."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from supervisor.errors import BadRequest, BodyTooLarge, SupervisorError
from supervisor.relay import error_response
from supervisor.request_id import id_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guarded(handler: Handler) -> Handler:
    """Wrap a handler: a `SupervisorError` becomes its answer, in the dialect of the path."""

    @functools.wraps(handler)
    async def wrapped(request: web.Request) -> web.StreamResponse:
        id_of(request)  # so that whatever is logged from here on names it
        try:
            return await handler(request)
        except SupervisorError as error:
            return error_response(request, error)
        except web.HTTPRequestEntityTooLarge:
            limit = request.client_max_size / 1024 / 1024
            too_large = BodyTooLarge(f"the request body is over {limit:g} MiB (api.max_body_mb)")
            return error_response(request, too_large)

    return wrapped


async def json_object(request: web.Request) -> dict[str, Any]:
    """Return the body as a JSON object. Raises `BadRequest`."""
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object")
    return body
