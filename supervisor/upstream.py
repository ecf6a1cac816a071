"""How is one HTTP request sent to a child and its answer read, byte for byte?

A small HTTP/1.1 client over Unix sockets on httptools' parser. It exists because it is on the path of every token:
a general client takes more time a request than all the rest. It works on plain non-blocking sockets, for connecting
to a Unix socket and sending a small request need no turn of the event loop: 32 requests that come at once reach the
child one after the other at once, and not all in the last turn. Connections are kept open for reuse for less time
than llama-server keeps them (5 s), so that it is we who close them.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus

import httptools

HIGH_WATER = 256 * 1024
"""Bytes of an answer held for a slow client before the child is made to wait."""

READ_SIZE = 128 * 1024
IDLE_SECONDS = 3.0
"""How long an unused connection is kept."""

CONNECT_SECONDS = 10.0
"""How long to try when the child's queue of new connections is full."""


Write = Callable[[bytes, bool], bool]
"""Takes a piece of a body and whether it is the last; says whether more may follow at once."""


class UpstreamClosed(Exception):
    """The child closed the connection, or sent something that is not HTTP, before the answer was complete."""


class Connection:
    """One connection to a child; carries one exchange at a time.

    Use: `send`, then `head`, then `read` until it returns b"", or `pour` until it returns True.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.status = 0
        self.reason = ""
        self.headers: list[tuple[str, str]] = []
        self.reused = False
        self.closed = False
        self.heard = False  # something came since somebody last looked
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._unsent = memoryview(b"")
        self._head_done = False
        self._complete = False
        self._keep_alive = False
        self._bodiless = False
        self._error: str | None = None
        self._write: Write | None = None
        self._full = self._handed_all = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(connected, self._readable)

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
        self._unsent = memoryview(head + body)
        self._writable()
        if self._unsent:
            self._loop.add_writer(self._socket, self._writable)
        while self._unsent and self._error is None and not self._head_done:
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
        return self._take()

    async def pour(self, write: Write) -> bool:
        """Hand the body to `write` as it comes, the first piece (which may be empty) now. True at the end of it.

        False when `write` did not want more just now: call again later. The pieces go to `write` straight from the
        event loop's reader, for waking a task for each token would cost more than all the rest.
        """
        if self._error is not None and not self._chunks:
            raise UpstreamClosed(self._error)
        self._write = write
        try:
            self._hand_on(write)
            while not self._handed_all:
                if self._full:
                    return False
                if self._complete or self._chunks:
                    self._hand_on(write)
                elif self._error is not None:
                    raise UpstreamClosed(self._error)
                else:
                    await self._wait()
        finally:
            self._write = None
        return True

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._complete and not self.closed and self._keep_alive and not self._unsent

    def close(self) -> None:
        """Cut the connection; the child then cancels what it does for it."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._head_done and not self._complete and not self._framed() and self._error is None:
            self._complete = True  # a body without a length ends with the connection
        elif not self._complete and self._error is None:
            self._error = "llama-server closed the connection"
        self._wake()

    # The socket

    def _readable(self) -> None:
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"llama-server cut the connection: {error.strerror or error}")
            return
        self.heard = True
        if not data:
            self.close()
        elif self._parser is None or self._complete:
            self._fail("llama-server sent bytes that belong to no answer")
        else:
            self._parse(self._parser, data)

    def _parse(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"llama-server sent a malformed answer: {error}")
            return
        if self._write is not None and not self._full:
            if self._chunks or self._complete:
                self._hand_on(self._write)
            if not self._complete and not self._full:
                return
        if self._buffered > HIGH_WATER and not self._paused and not self._complete:
            self._paused = True
            self._loop.remove_reader(self._socket)
        self._wake()

    def _writable(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"llama-server cut the connection: {error.strerror or error}")
            return
        if not self._unsent:
            self._loop.remove_writer(self._socket)
            self._wake()

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))

    def on_status(self, status: bytes) -> None:
        self.reason += status.decode("utf-8", "surrogateescape")

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

    def _hand_on(self, write: Write) -> None:
        self._handed_all = self._complete
        self._full = not write(self._take(), self._complete)

    def _take(self) -> bytes:
        """Return the bytes of the body that have come, and read on if there were too many of them."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused and not self.closed:
            self._paused = False
            self._loop.add_reader(self._socket, self._readable)
        return data

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

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """Return an open connection, a new one if `fresh`. Raises `OSError` when the child does not listen."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle and not fresh:
            since, connection = self._idle.pop()
            if not connection.closed and now - since < IDLE_SECONDS:
                connection.reused = True
                self._open.add(connection)
                return connection
            connection.close()
        connection = Connection(await self._connect())
        self._open.add(connection)
        return connection

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + CONNECT_SECONDS
        while not self._cut:
            attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                attempt.setblocking(False)
                attempt.connect(self.socket_path)
                return attempt
            except BlockingIOError:  # too many connect at once
                attempt.close()
                if loop.time() > give_up:
                    raise
                await asyncio.sleep(0.005)
            except BaseException:
                attempt.close()
                raise
        raise ConnectionResetError("the child is being stopped")

    def release(self, connection: Connection) -> None:
        """Give a connection back; it is kept if its answer was read to the end, else cut.

        Others that have been unused for too long are closed: the watchdog comes here every second.
        """
        self._open.discard(connection)
        now = asyncio.get_running_loop().time()
        if connection.reusable and not self._cut:
            self._idle.append((now, connection))
        else:
            connection.close()
        while self._idle and now - self._idle[0][0] >= IDLE_SECONDS:
            self._idle.popleft()[1].close()

    @property
    def busy(self) -> bool:
        """Whether a connection is in use."""
        return bool(self._open)

    def heard(self) -> bool:
        """Tell whether anything has come on a connection in use since the last time."""
        found = False
        for connection in self._open:
            found |= connection.heard
            connection.heard = False
        return found

    def cut(self) -> None:
        """Cut all connections, also those in use, and open no more."""
        self._cut = True
        for connection in list(self._open):
            connection.close()
        while self._idle:
            self._idle.pop()[1].close()
