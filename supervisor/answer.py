"""How is a child's answer written to the client? Its head and its first bytes at once, the rest as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from time import monotonic
from typing import Final

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time

from supervisor.live import stall_seconds
from supervisor.request_id import HEADER as ID_HEADER
from supervisor.request_id import id_of
from supervisor.upstream import Connection

log = logging.getLogger(__name__)

HOP_BY_HOP: Final = frozenset(
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
        "x-atlas-owner",
        "x-request-id",
    )
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), and those that each side sets anew or we alone may set."""

_BODILESS: Final = frozenset((204, 304))

Headers = list[tuple[str, str]]


class Answer(web.StreamResponse):
    """A child's answer on its way to the client: what aiohttp gets to see is an answer that is sent already.

    aiohttp's own `StreamResponse` costs a third of the time that a stream takes to begin: it builds a dictionary of
    headers, goes through several coroutines for every piece, and sends the head by itself. Here one plain call
    (`send`) makes one write to the client's transport.
    """

    def __init__(self, request: web.Request, connection: Connection) -> None:
        super().__init__(status=connection.status)
        version = request.version
        length = header(connection.headers, "content-length")
        has_body = request.method != "HEAD" and connection.status not in _BODILESS
        self.begun = False
        self.first_at: float | None = None  # on the monotonic clock
        self.head = b""
        self.tail: deque[bytes] = deque(maxlen=4)  # the last events tell what it took
        self._request = request
        self._transport = request.transport
        self._stays = request.keep_alive
        self._open_ended = has_body and length is None
        self._in_chunks = self._open_ended and version >= HttpVersion11
        if self._open_ended and not self._in_chunks:
            self._stays = False  # the end of the connection is the end of the answer
        lines = [f"HTTP/{version.major}.{version.minor} {connection.status} {connection.reason}"]
        lines += [f"{name}: {value}" for name, value in forwardable(connection.headers)]
        if header(connection.headers, "date") is None:
            lines.append(f"Date: {rfc822_formatted_time()}")
        lines.append(f"{ID_HEADER}: {id_of(request)}")
        if self._in_chunks:
            lines.append("Transfer-Encoding: chunked")
        elif length is not None and connection.status not in _BODILESS:
            lines.append(f"Content-Length: {length}")
        if not self._stays:
            lines.append("Connection: close")
        elif version == HttpVersion10:
            lines.append("Connection: keep-alive")
        lines.append("\r\n")
        content_type = header(connection.headers, "content-type") or ""
        self.is_events = content_type.startswith("text/event-stream")
        self._head = "\r\n".join(lines).encode("utf-8", "surrogateescape")

    def send(self, data: bytes, last: bool) -> bool:
        """Send the head if need be, then `data`, then the end if it is the `last`. False: wait for `drain`."""
        if data:
            if self.first_at is None:
                self.first_at = monotonic()
                self.head = data
            self.tail.append(data)
        if self._in_chunks:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if last:
                data += b"0\r\n\r\n"
        if not self.begun:
            self.begun = True
            data = self._head + data
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
            self._request.writer.output_size += len(data)  # aiohttp then sends no error page after it
        return not self._request.protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written. One that takes nothing for long is cut off.

        Raises `ConnectionError` then, or when it left.
        """
        if not self._request.protocol.writing_paused:
            await self._request.writer.drain()  # notices a client that left
            return
        seconds = stall_seconds(self._request)
        while True:
            before = self._unsent()
            try:
                async with asyncio.timeout(seconds):
                    await self._request.writer.drain()
                    return
            except TimeoutError:
                if self._unsent() < before:
                    continue
            log.warning("%s: the client took nothing for %g s; it is cut off", self._request.path, seconds)
            if self._transport is not None:
                self._transport.abort()
            raise ConnectionResetError("the client takes nothing")

    def _unsent(self) -> int:
        """Return how many bytes wait here for the client."""
        if self._transport is None:
            return 0
        return self._transport.get_write_buffer_size()

    def break_off(self, error_event: bytes) -> None:
        """End an answer that goes no further: an event stream with an event, anything else by a cut."""
        if self.is_events and self._open_ended:
            self.send(error_event, last=True)
        elif self._transport is not None:
            self._transport.abort()

    # What aiohttp asks of a response

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may carry another request."""
        return self._stays

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: `send` sends the head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `send` sends the end."""


def header(headers: Headers, name: str) -> str | None:
    """Return the value of the first header `name` (in lower case), None when there is none."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return None


def forwardable(headers: Iterable[tuple[str, str]], dropped: frozenset[str] = HOP_BY_HOP) -> Headers:
    """Return the end-to-end headers: without `dropped`, which holds hop-by-hop ones, and those `Connection` names."""
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
