"""Turns the errors that handlers raise into answers."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from supervisor.errors import BadRequest, BodyStalled, BodyTooLarge, SupervisorError
from supervisor.live import stall_seconds
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
        except web.RequestPayloadError as error:  # wrong chunks, or not what its Content-Encoding says
            reason = str(error).strip().rpartition("\n")[2].strip()
            return error_response(request, BadRequest(f"the request body cannot be read: {reason}"))

    return wrapped


async def body_of(request: web.Request) -> bytes:
    """Return the request's body. Raises `BodyStalled` when its client stops in the middle of it."""
    content = request.content
    if content.is_eof() or (seconds := stall_seconds(request)) is None:  # nearly always it is all there
        return await request.read()
    reading = asyncio.ensure_future(request.read())
    try:
        while True:
            before = content.total_bytes
            if (await asyncio.wait({reading}, timeout=seconds))[0]:
                return reading.result()
            if content.total_bytes == before:
                raise BodyStalled(f"no byte of the request body came for {seconds:g} s (api.stall_seconds)")
    finally:
        reading.cancel()


async def json_object(request: web.Request) -> dict[str, Any]:
    """Return the body as a JSON object. Raises `BadRequest`."""
    try:
        body = json.loads(await body_of(request))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object")
    return body
