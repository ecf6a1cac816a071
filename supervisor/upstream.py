"""How is one HTTP request sent to a child and its answer read, byte for byte?

A small HTTP/1.1 client over a Unix socket on httptools' parser. It exists because it is on the path of every
token: a general client spends more time a request than the whole relay may. Connections are kept open for
reuse for less time than llama-server keeps them (5 s), so that it is we who close them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from http import HTTPStatus
from typing import cast

import httptools

HIGH_WATER = 256 * 1024
"""Bytes of an answer held for a slow client before the child is made to wait."""

IDLE_SECONDS = 3.0
"""How long an unused connection is kept."""


class UpstreamClosed(Exception):
    """The child closed the connection, or sent something that is not HTTP, before the answer was complete."""


class Connection(asyncio.Protocol):
    """One connection to a child; carries one exchange at a time.

    Use: `send`, then `head`, then `read` until it returns b"".
    """

    def __init__(self) -> None:
        self.status = 0
        self.reason = ""
        self.headers: list[tuple[str, str]] = []
        self.reused = False
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._write_paused = False
        self._head_done = False
        self._complete = False
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def send(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Send a request; `headers` without hop-by-hop ones and without Content-Length."""
        self.status, self.reason, self.headers = 0, "", []
        self._head_done = self._complete = False
        self._chunks.clear()
        self._buffered = 0
        self._bodiless = method == "HEAD"
        self._parser = httptools.HttpResponseParser(self)
        lines = [f"{method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")
        assert self._transport is not None
        if len(body) < HIGH_WATER:
            self._transport.write(head + body)
            return
        self._transport.write(head)
        self._transport.write(body)
        while self._write_paused and not self.closed and not self._head_done:
            await self._wait()

    async def head(self) -> None:
        """Wait for the status line and headers; afterwards `status`, `reason` and `headers` are set."""
        while not self._head_done:
            if self._error is not None:
                raise UpstreamClosed(self._error)
            await self._wait()

    async def read(self) -> bytes:
        """Return all bytes of the body that have come, waiting for the first; b"" at the end."""
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise UpstreamClosed(self._error)
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused and self._transport is not None and not self.closed:
            self._paused = False
            self._transport.resume_reading()
        return data

    def take_all(self) -> bytes | None:
        """Return the whole body if it is here already, else None."""
        if not self._complete:
            return None
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        return data

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._complete and not self.closed and self._parser is not None and self._keep_alive

    def close(self) -> None:
        """Cut the connection; the child then cancels what it does for it."""
        if self._transport is not None and not self.closed:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._complete:
            self._fail("llama-server sent bytes that belong to no answer")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"llama-server sent a malformed answer: {error}")
            return
        if self._buffered > HIGH_WATER and not self._paused and not self._complete:
            self._paused = True
            assert self._transport is not None
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._head_done and not self._complete and not self._framed():
            self._complete = True  # a body without a length ends with the connection
        elif not self._complete and self._error is None:
            self._error = "llama-server closed the connection"
        self._wake()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake()

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))

    def on_status(self, status: bytes) -> None:
        self.reason += status.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < HTTPStatus.OK:  # 1xx: the real answer follows
            self.headers, self.reason = [], ""
            return
        self.status = status
        self._keep_alive = self._parser.should_keep_alive()
        self._head_done = True
        if self._bodiless:  # the length is given, the body is not
            self._complete, self._keep_alive = True, False

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        if self._head_done:
            self._complete = True

    # Inside

    _keep_alive = False
    _bodiless = False

    def _framed(self) -> bool:
        return any(name.lower() in ("content-length", "transfer-encoding") for name, _ in self.headers)

    def _fail(self, reason: str) -> None:
        self._error = reason
        self.close()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None


class Pool:
    """The connections to one child. `cut` ends them all: llama-server must be free of requests to stop."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._idle: deque[tuple[float, Connection]] = deque()
        self._open: set[Connection] = set()
        self._cut = False

    async def acquire(self) -> Connection:
        """Return an open connection. Raises `OSError` when the child does not listen."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle:
            since, connection = self._idle.pop()
            if not connection.closed and now - since < IDLE_SECONDS:
                connection.reused = True
                self._open.add(connection)
                return connection
            connection.close()
        if self._cut:
            raise ConnectionResetError("the child is being stopped")
        _, connection = await loop.create_unix_connection(Connection, self.socket_path)
        self._open.add(connection)
        if self._cut:
            self.release(connection)
            raise ConnectionResetError("the child is being stopped")
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back; it is kept if its answer was read to the end, else cut."""
        self._open.discard(connection)
        if connection.reusable and not self._cut:
            self._idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.close()

    def close_idle(self) -> None:
        """Close the connections that have been unused for too long."""
        now = asyncio.get_running_loop().time()
        while self._idle and now - self._idle[0][0] >= IDLE_SECONDS:
            self._idle.popleft()[1].close()

    def cut(self) -> None:
        """Cut all connections, also those in use, and open no more."""
        self._cut = True
        for connection in list(self._open):
            connection.close()
        while self._idle:
            self._idle.pop()[1].close()
