"""How do bytes get from client to child and back? Nothing is changed on the way.

Hop-by-hop headers stay, and API keys; of the key a child learns whose ATLAS sessions the request may reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator
from http import HTTPStatus
from time import monotonic

from aiohttp import web

from supervisor.access import CREDENTIALS, OWNER_HEADER, Caller, caller_of
from supervisor.answer import HOP_BY_HOP, Answer, Headers, forwardable
from supervisor.errors import ChildDied, ChildFailed, ChildHung, Queued, SupervisorError
from supervisor.fleet import Lease
from supervisor.metrics import METRICS
from supervisor.request_id import HEADER as ID_HEADER
from supervisor.request_id import id_of
from supervisor.upstream import Connection, UpstreamClosed
from supervisor.usage import BYTES_PER_TOKEN, EDGE, Meter, Tokens, told

log = logging.getLogger(__name__)

_NOT_FOR_CHILDREN = HOP_BY_HOP | {OWNER_HEADER.lower(), ID_HEADER.lower()}
_NOT_WITH_KEYS = _NOT_FOR_CHILDREN | CREDENTIALS

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

DEATH_NOTICE = 0.5
"""Seconds to wait for the exit code of a child that cut its connection."""


async def relay(request: web.Request, body: bytes, lease: Lease) -> web.StreamResponse:
    """Send `request` with `body` to the lease's child and its answer back, then release the lease.

    A child that fails before the first byte raises `ChildFailed` (`ChildDied` if it is gone); later, the client's
    stream ends with an error event (SSE) or is cut. A client that leaves cancels this, and that cuts the connection to
    the child, which then stops generating.
    """
    connection: Connection | None = None
    answer: Answer | None = None
    caller = caller_of(request)
    account = _Account(caller, request.path, len(body)) if caller is not None and caller.counts_tokens else None
    status = CLIENT_LEFT
    ok = False
    try:
        connection = await _ask(request.method, request.raw_path, body, lease, _headers(request, caller))
        answer = Answer(request, connection)
        status = connection.status
        ok = True
        await _pour(connection, answer, account)
        return answer
    except asyncio.CancelledError:
        if account is not None:
            account.left()
        raise
    except _Broken as broken:
        ok = False
        error = await _failure(lease, broken.reason)
        if answer is None or not answer.begun:
            status = error.status
            raise error from broken
        log.error("stream of %s ends: %s", request.path, error.message)
        count_error(request, error)
        answer.break_off(error_event(request.path, error))
        return answer
    finally:
        if connection is not None:
            lease.child.pool.release(connection)
        lease.release(ok=ok)
        if account is not None:
            account.settle()
        _count(request, lease, status, answer)


CLIENT_LEFT = 499
"""What is counted where a client left before its answer began."""


def _count(request: web.Request, lease: Lease, status: int, answer: Answer | None) -> None:
    """Count a request that has ended, and log it for those who want every one."""
    now = monotonic()
    route = request.match_info.route.resource
    tokens, first = Tokens(), None
    if answer is not None and answer.first_at is not None and status == HTTPStatus.OK:
        tail = answer.tail[0] if len(answer.tail) == 1 else b"".join(answer.tail)
        tokens = told(answer.head[:EDGE], tail[-EDGE:])
        first = answer.first_at - lease.asked_at if answer.is_events else None
    took = now - lease.asked_at
    name = route.canonical if route is not None else ""
    waited = lease.granted_at - lease.asked_at
    lease.series.count(name, status, waited=waited, took=took, first=first, tokens=tokens)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s: %d from model %s after %.3f s", request.method, name, status, lease.child.model, took)


class _Account:
    """Charges a key for the tokens of one request."""

    def __init__(self, caller: Caller, path: str, request_bytes: int) -> None:
        self._meter: Meter | None = None
        self._begun = False
        self._caller = caller
        self._path = path
        self._request_bytes = request_bytes

    def meter_of(self, answer: Answer) -> Meter | None:
        """Return what counts the tokens of `answer`; None for an error, which costs nothing."""
        self._begun = True
        if answer.status == HTTPStatus.OK:
            self._meter = Meter(answer.send, is_stream=answer.is_events)
        return self._meter

    def left(self) -> None:
        """The client went away: a request whose answer had not begun has its cost too."""
        if not self._begun:
            self._caller.charge(self._request_bytes // BYTES_PER_TOKEN)

    def settle(self) -> None:
        """Charge what was counted so far."""
        if self._meter is not None:
            self._caller.charge(self._meter.tokens(self._path, self._request_bytes))


class _Broken(Exception):
    """The child failed, before the answer began or in the middle of it."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


def _headers(request: web.Request, caller: Caller | None) -> Headers:
    """Return what the child gets to see of the request's headers."""
    dropped = _NOT_FOR_CHILDREN if caller is None and request.method != "OPTIONS" else _NOT_WITH_KEYS
    if _inflated(request):
        dropped |= {"content-encoding"}
    if caller is not None and caller.counts_tokens:
        dropped |= {"accept-encoding"}
    headers = forwardable(request.headers.items(), dropped)
    headers.append((ID_HEADER, id_of(request)))
    if caller is not None:
        headers.append((OWNER_HEADER, caller.owner))
    return headers


@contextlib.asynccontextmanager
async def exchange(request: web.Request, target: str, body: bytes, lease: Lease) -> AsyncIterator[Connection]:
    """Post a body of our own to `target` for `request`; the block reads the answer, then the lease is released.

    Raises `ChildFailed` when the child fails, also from within the block.
    """
    caller = caller_of(request)
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), (ID_HEADER, id_of(request))]
    headers += [(OWNER_HEADER, caller.owner)] if caller is not None else []
    connection: Connection | None = None
    status = CLIENT_LEFT
    ok = False
    try:
        connection = await _ask("POST", target, body, lease, headers)
        status = connection.status
        ok = True
        yield connection
    except asyncio.CancelledError:
        if caller is not None and caller.counts_tokens:
            caller.charge(len(body) // BYTES_PER_TOKEN)
        raise
    except (_Broken, UpstreamClosed) as error:
        ok = False
        reason = error.reason if isinstance(error, _Broken) else error
        failure = await _failure(lease, reason)
        status = failure.status
        raise failure from error
    finally:
        if connection is not None:
            lease.child.pool.release(connection)
        lease.release(ok=ok)
        _count(request, lease, status, None)


async def _ask(method: str, target: str, body: bytes, lease: Lease, headers: Headers) -> Connection:
    """Send the request and wait for the head of the answer. Raises `_Broken`."""
    while True:
        try:
            connection = await lease.child.pool.acquire()
        except OSError as error:
            raise _Broken(error) from error
        try:
            await connection.send(method, target, headers, body)
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


async def _pour(connection: Connection, answer: Answer, account: _Account | None) -> None:
    """Send the child's answer to the client as it comes. Raises `_Broken`."""
    meter = account.meter_of(answer) if account is not None else None
    send = answer.send if meter is None else meter.send
    try:
        while not await connection.pour(send):
            await answer.drain()
        await answer.drain()
    except UpstreamClosed as error:
        raise _Broken(error) from error


RESPONSES = frozenset(("/v1/responses", "/responses"))
"""Routes whose events have a type; some clients of theirs look for it, others for `error`, so theirs have both."""


def is_anthropic(path: str) -> bool:
    """Whether errors on `path` have Anthropic's shape."""
    return path.startswith("/v1/messages")


def error_body(path: str, error: SupervisorError) -> dict[str, object]:
    """Return the error in the dialect of `path`."""
    if not is_anthropic(path):
        return error.body()
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_event(path: str, error: SupervisorError) -> bytes:
    """Return the server-sent event that ends a stream that failed."""
    body = error_body(path, error)
    if path in RESPONSES:
        body = {"type": "error", "code": error.code, "message": error.message, "param": error.param} | body
    name = b"event: error\n" if "type" in body else b""
    return name + b"data: " + json.dumps(body).encode() + b"\n\n"


def count_error(request: web.Request, error: SupervisorError) -> None:
    """Count an error of ours."""
    metrics = request.app.get(METRICS)
    if metrics is not None:
        metrics.errors.labels(error.code or error.type).inc()


def error_response(request: web.Request, error: SupervisorError) -> web.Response:
    """Return the HTTP answer for `error`; those that are no fault of the client's are logged."""
    count_error(request, error)
    headers = {ID_HEADER: id_of(request)}
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s %s: %d: %s", request.method, request.path, error.status, error.message.partition("\n")[0])
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Queued):
        headers["X-Queue-Position"] = str(error.position)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error_body(request.path, error), status=error.status, headers=headers)


def _inflated(request: web.Request) -> bool:
    """Whether aiohttp has decompressed the body already."""
    return request.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate", "br", "zstd")


async def _failure(lease: Lease, reason: Exception) -> ChildFailed:
    """Return why a child stopped answering, with its last log lines if it died."""
    child = lease.child
    if child.stopping:
        return ChildFailed(f"model {child.model!r} was stopped before its answer was complete")
    try:
        await asyncio.wait_for(child.wait(), DEATH_NOTICE)
    except TimeoutError:
        return ChildFailed(f"model {child.model!r}: {reason or type(reason).__name__}")
    if child.hung is not None:
        return ChildHung(child.failure(f"its llama-server {child.hung}, and was killed").message)
    return ChildDied(child.failure("its llama-server died before the answer was complete").message)
