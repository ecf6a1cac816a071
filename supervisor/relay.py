"""How do bytes get from client to child and back? Nothing is changed on the way, only hop-by-hop headers stay."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from supervisor.errors import ChildFailed, SupervisorError
from supervisor.fleet import Lease
from supervisor.upstream import Connection, UpstreamClosed

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "expect",
    )
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), and those that each side sets anew."""

DEATH_NOTICE = 0.5
"""Seconds to wait for the exit code of a child that cut its connection."""

Headers = list[tuple[str, str]]


async def relay(request: web.Request, body: bytes, lease: Lease) -> web.StreamResponse:
    """Send `request` with `body` to the lease's child and its answer back, then release the lease.

    A child that fails before the first byte raises `ChildFailed`; later, the client's stream ends with an error
    event (SSE) or is cut. A client that leaves cancels this, and that cuts the connection to the child, which
    then stops generating.
    """
    connection: Connection | None = None
    ok = False
    try:
        connection = await _ask(request, body, lease)
        ok = True
        return await _answer(request, connection)
    except _Broken as broken:
        ok = False
        error = ChildFailed(await _last_words(lease, broken.reason))
        if broken.response is None:
            raise error from broken
        await _end_with_error(request, broken.response, error)
        return broken.response
    finally:
        if connection is not None:
            lease.child.pool.release(connection)
        lease.release(ok=ok)


class _Broken(Exception):
    """The child failed: before the answer began, or in the middle of `response`."""

    def __init__(self, reason: Exception, response: web.StreamResponse | None = None) -> None:
        self.reason = reason
        self.response = response


async def _ask(request: web.Request, body: bytes, lease: Lease) -> Connection:
    """Send the request and wait for the head of the answer. Raises `_Broken`."""
    headers = _forwardable(request.headers.items(), {"content-encoding"} if _inflated(request) else ())
    while True:
        try:
            connection = await lease.child.pool.acquire()
        except OSError as error:
            raise _Broken(error) from error
        try:
            await connection.send(request.method, request.raw_path, headers, body)
            await connection.head()
            return connection
        except UpstreamClosed as error:
            lease.child.pool.release(connection)
            if not connection.reused or lease.child.stopping:
                raise _Broken(error) from error
            # llama-server closed an idle connection as we took it: it never saw the request
        except BaseException:
            lease.child.pool.release(connection)
            raise


async def _answer(request: web.Request, connection: Connection) -> web.StreamResponse:
    """Send the child's answer to the client as it comes. Raises `_Broken`."""
    headers = CIMultiDict(_forwardable(connection.headers))
    head_only = request.method == "HEAD"
    whole = connection.take_all()
    if whole is not None and not head_only:
        return web.Response(status=connection.status, reason=connection.reason, headers=headers, body=whole)
    response = web.StreamResponse(status=connection.status, reason=connection.reason, headers=headers)
    length = _content_length(connection)
    if length is not None:
        response.content_length = length
    elif not head_only and request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    await response.prepare(request)
    while True:
        try:
            chunk = await connection.read()
        except UpstreamClosed as error:
            raise _Broken(error, response) from error
        if not chunk:
            break
        await response.write(chunk)
    await response.write_eof()
    return response


async def _end_with_error(request: web.Request, response: web.StreamResponse, error: SupervisorError) -> None:
    """End an answer that has begun: with an error event if it is an event stream, else by cutting it."""
    log.error("stream of %s ends: %s", request.path, error.message)
    if response.content_type == "text/event-stream":
        await response.write(error_event(request.path, error))
        await response.write_eof()
    elif request.transport is not None:
        request.transport.abort()


def is_anthropic(path: str) -> bool:
    """Whether errors on `path` have Anthropic's shape."""
    return path.startswith("/v1/messages")


def error_body(path: str, error: SupervisorError) -> dict[str, object]:
    """Return the error in the dialect of `path`."""
    if not is_anthropic(path):
        return error.body()
    kinds = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "overloaded_error" if error.status == 503 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_event(path: str, error: SupervisorError) -> bytes:
    """Return the server-sent event that ends a stream that failed."""
    name = b"event: error\n" if is_anthropic(path) else b""
    return name + b"data: " + json.dumps(error_body(path, error)).encode() + b"\n\n"


def error_response(path: str, error: SupervisorError) -> web.Response:
    """Return the HTTP answer for `error`."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return web.json_response(error_body(path, error), status=error.status, headers=headers)


def _forwardable(headers: Iterable[tuple[str, str]], drop: Iterable[str] = ()) -> Headers:
    """Return the end-to-end headers: without hop-by-hop ones and those that `Connection` names."""
    dropped = HOP_BY_HOP.union(drop) if drop else HOP_BY_HOP
    kept = []
    named: set[str] = set()
    for pair in headers:
        name = pair[0].lower()
        if name not in dropped:
            kept.append(pair)
        elif name == "connection":
            named.update(token.strip().lower() for token in pair[1].split(","))
    if named <= HOP_BY_HOP or named == {"close"}:
        return kept
    return [pair for pair in kept if pair[0].lower() not in named]


def _inflated(request: web.Request) -> bool:
    """Whether aiohttp has decompressed the body already."""
    return request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate", "br", "zstd")


def _content_length(connection: Connection) -> int | None:
    for name, value in connection.headers:
        if name.lower() == "content-length" and value.isdigit():
            return int(value)
    return None


async def _last_words(lease: Lease, error: Exception) -> str:
    """Say why a child stopped answering, with its last log lines if it died."""
    child = lease.child
    if child.stopping:
        return f"model {child.model!r} was stopped before its answer was complete"
    try:
        await asyncio.wait_for(child.wait(), DEATH_NOTICE)
    except TimeoutError:
        return f"model {child.model!r}: {error or type(error).__name__}"
    return child.failure("its llama-server died before the answer was complete").message
