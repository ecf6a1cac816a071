"""Clients that are slow, stop, or send too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import pytest
from test_gate import CHAT, Front

from supervisor.app import HEADER_LIMIT

pytest_plugins = ["test_gate"]

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[Front], Awaitable[Connection]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Return a function that opens a connection; all are closed at the end."""
    opened: list[asyncio.StreamWriter] = []

    async def begin(front: Front) -> Connection:
        url = urlsplit(front.supervisor.urls[0])
        reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 16)
        opened.append(writer)
        return reader, writer

    yield begin
    for writer in opened:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def post(length: int, *more: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict]:
    """Read one answer with a length."""
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r")[0])
        return int(head.split(" ")[1]), json.loads(await reader.readexactly(length))


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_head_that_does_not_come_ends_the_connection(begin, connect, sent):
    front = await begin(require_keys=False, idle_seconds=0.3)
    reader, writer = await connect(front)
    writer.write(sent)
    async with asyncio.timeout(20):
        assert await reader.read() == b""


async def test_a_connection_that_idles_is_closed_and_one_that_works_is_not(begin, connect):
    front = await begin(require_keys=False, idle_seconds=0.3)
    reader, writer = await connect(front)
    body = json.dumps({"model": "one", "say": ["x"] * 100}).encode()  # takes a second
    writer.write(post(len(body)) + body)
    async with asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert (await reader.read()).count(b"\r\nx\r\n") == 100


async def test_a_body_that_stops_is_a_408(begin, connect):
    front = await begin(require_keys=False, stall_seconds=0.3)
    for path in (CHAT, "/models/load"):
        reader, writer = await connect(front)
        writer.write(post(100).replace(CHAT.encode(), path.encode()) + b'{"model":')
        status, body = await answer(reader)
        assert (status, body["error"]["code"]) == (408, "body_stalled")
    assert not front.supervisor.fleet.children


async def test_a_body_that_comes_slowly_is_read(begin, connect):
    front = await begin(require_keys=False, stall_seconds=3)
    reader, writer = await connect(front)
    body = json.dumps({"model": "one", "say": ['{"a": 1}']}).encode()
    writer.write(post(len(body)))
    for at in range(0, len(body), 4):  # takes longer than `stall_seconds` in all
        writer.write(body[at : at + 4])
        await asyncio.sleep(0.4)
    async with asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_takes_nothing_is_cut_off(begin, connect):
    front = await begin(require_keys=False, stall_seconds=0.3)
    scheduler = front.supervisor.fleet.scheduler
    _, writer = await connect(front)
    writer.transport.pause_reading()
    body = json.dumps({"model": "one", "say": ["x" * 1_000_000] * 64}).encode()
    writer.write(post(len(body)) + body)
    async with asyncio.timeout(30):
        while not scheduler.entry("one").leases:
            await asyncio.sleep(0.01)
        while scheduler.entry("one").leases:
            await asyncio.sleep(0.01)
    assert (await front.ask("POST", CHAT, None, {"model": "one"}))[0] == 200


async def test_a_client_that_takes_little_gets_all(begin, connect):
    front = await begin(require_keys=False, stall_seconds=2)
    reader, writer = await connect(front)
    piece, count = 1_000_000, 16
    body = json.dumps({"model": "one", "say": ["x" * piece] * count}).encode()
    writer.write(post(len(body), "Connection: close") + body)
    got = 0
    async with asyncio.timeout(60):
        while data := await reader.read(1 << 16):
            got += data.count(b"x")
            await asyncio.sleep(0.01)
    assert got == piece * count


async def test_heads_that_are_too_long_are_refused(open_front, connect):
    many = "".join(f"X-{number}: 1\r\n" for number in range(1000))
    for head in (
        f"GET /{'a' * (HEADER_LIMIT + 1)} HTTP/1.1\r\n",
        f"GET / HTTP/1.1\r\nX: {'a' * (HEADER_LIMIT + 1)}\r\n",
        f"GET / HTTP/1.1\r\n{many}",
    ):
        reader, writer = await connect(open_front)
        writer.write(head.encode() + b"Host: x\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.readline()).split(b" ")[1] == b"400"


async def test_a_body_that_is_too_large_is_a_413(begin, connect):
    front = await begin(require_keys=False, max_body_mb=0.01)
    for chunked in (False, True):
        reader, writer = await connect(front)
        body = json.dumps({"model": "one", "pad": "x" * 20_000}).encode()
        if chunked:
            writer.write(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        else:
            writer.write(post(len(body)) + body)
        status, found = await answer(reader)
        assert (status, found["error"]["code"]) == (413, "body_too_large")
