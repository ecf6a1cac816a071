"""The HTTP client towards children, against a server that sends what the test says, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from supervisor.upstream import HIGH_WATER, Connection, Pool, UpstreamClosed

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def serve(short_tmp: Path) -> AsyncIterator[Callable[[Handler], Awaitable[Pool]]]:
    """Return a function that serves connections with a handler on a Unix socket, and gives the pool for it."""
    servers: list[asyncio.Server] = []
    tasks: set[asyncio.Task[None]] = set()

    async def begin(handler: Handler) -> Pool:
        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await handler(reader, writer)
            except ConnectionError:
                pass
            finally:
                tasks.discard(task)
                writer.close()

        path = str(short_tmp / "s.sock")
        servers.append(await asyncio.start_unix_server(run, path))
        return Pool(path)

    yield begin
    for server in servers:
        server.close()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def answers(*parts: bytes, pause: float = 0, linger: bool = False) -> Handler:
    """Return a handler that reads one request head and sends `parts`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        if linger:
            await reader.read()

    return handle


async def get(pool: Pool, method: str = "GET") -> tuple[Connection, bytes]:
    connection = await pool.acquire()
    await connection.send(method, "/", [("Host", "x")], b"")
    await connection.head()
    body = b""
    while chunk := await connection.read():
        body += chunk
    return connection, body


OK = b"HTTP/1.1 200 OK\r\n"


async def test_body_with_a_length(serve):
    pool = await serve(answers(OK + b"Content-Length: 5\r\nX-A: 1\r\nX-A: 2\r\n\r\nhel", b"lo", linger=True))
    connection, body = await get(pool)
    assert (connection.status, connection.reason, body) == (200, "OK", b"hello")
    assert connection.headers == [("Content-Length", "5"), ("X-A", "1"), ("X-A", "2")]
    assert connection.reusable
    connection.close()


async def test_chunked_body_in_the_smallest_pieces(serve):
    text = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\nTrailer: x\r\n\r\n"
    pool = await serve(answers(*(bytes([byte]) for byte in text), linger=True))
    connection, body = await get(pool)
    assert body == b"hello world"
    assert connection.reusable
    connection.close()


async def test_body_that_ends_with_the_connection(serve):
    pool = await serve(answers(OK + b"\r\nhello", b" world"))
    connection, body = await get(pool)
    assert body == b"hello world"
    assert not connection.reusable


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"HTTP/1.1 200",
        OK + b"Content-Length: 10\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello",
        b"nonsense\r\n\r\n",
        OK + b"Content-Length: x\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk", "bad chunk", "no http", "bad length"],
)
async def test_answers_that_are_cut_or_broken(serve, text):
    pool = await serve(answers(text))
    with pytest.raises(UpstreamClosed):
        await get(pool)


async def test_early_hints_are_passed_over(serve):
    pool = await serve(answers(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok"))
    connection, body = await get(pool)
    assert (connection.status, connection.reason, body) == (200, "OK", b"ok")
    assert connection.headers == [("Content-Length", "2")]


async def test_head_has_no_body_whatever_its_length_says(serve):
    pool = await serve(answers(OK + b"Content-Length: 1000\r\n\r\n", linger=True))
    connection, body = await asyncio.wait_for(get(pool, "HEAD"), 5)
    assert body == b""
    assert not connection.reusable
    connection.close()


async def test_a_connection_is_used_again(serve):
    async def handle(reader, writer):
        for count in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"Content-Length: 1\r\n\r\n%d" % count)
        await reader.read()

    pool = await serve(handle)
    first, body = await get(pool)
    assert body == b"0"
    pool.release(first)
    second, body = await get(pool)
    assert second is first
    assert second.reused
    assert body == b"1"
    pool.cut()


async def test_bytes_after_an_answer_spoil_the_connection(serve):
    pool = await serve(answers(OK + b"Content-Length: 1\r\n\r\nx", b"stray", pause=0.05, linger=True))
    connection, _ = await get(pool)
    pool.release(connection)
    async with asyncio.timeout(5):
        while not connection.closed:
            await asyncio.sleep(0.01)
    assert not connection.reusable


async def test_an_unread_answer_closes_the_connection(serve):
    pool = await serve(answers(OK + b"Content-Length: 10\r\n\r\nhel", linger=True))
    connection = await pool.acquire()
    await connection.send("GET", "/", [], b"")
    await connection.head()
    pool.release(connection)
    async with asyncio.timeout(5):
        while not connection.closed:
            await asyncio.sleep(0.01)


async def test_cut_ends_a_waiting_request_and_refuses_new_ones(serve):
    pool = await serve(answers(linger=True))
    connection = await pool.acquire()
    await connection.send("GET", "/", [], b"")
    waiting = asyncio.create_task(connection.head())
    await asyncio.sleep(0)
    pool.cut()
    with pytest.raises(UpstreamClosed):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(OSError):
        await pool.acquire()


async def test_a_slow_reader_makes_the_child_wait(serve):
    sent = 0

    async def handle(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"x" * 65536
        for _ in range(256):
            writer.write(b"10000\r\n" + piece + b"\r\n")
            await writer.drain()
            sent += len(piece)
        writer.write(b"0\r\n\r\n")

    pool = await serve(handle)
    connection = await pool.acquire()
    await connection.send("GET", "/", [], b"")
    await connection.head()
    before = -1
    while sent != before:  # until the server is blocked
        before = sent
        await asyncio.sleep(0.2)
    assert sent < 256 * 65536
    assert connection._buffered < HIGH_WATER + 2 * 65536 * 4
    total = 0
    while chunk := await connection.read():
        total += len(chunk)
    assert total == 256 * 65536
    pool.cut()


async def test_a_large_request_body_arrives_whole(serve):
    received = asyncio.get_running_loop().create_future()

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        received.set_result((head, await reader.readexactly(8 * HIGH_WATER)))
        writer.write(OK + b"Content-Length: 0\r\n\r\n")

    pool = await serve(handle)
    connection = await pool.acquire()
    await connection.send("POST", "/x?y=1", [("X-Name", "wert")], b"z" * 8 * HIGH_WATER)
    await connection.head()
    head, body = await received
    assert head.startswith(b"POST /x?y=1 HTTP/1.1\r\nX-Name: wert\r\nContent-Length: 2097152\r\n")
    assert body == b"z" * 8 * HIGH_WATER
    pool.cut()


async def test_a_fresh_connection_is_new_and_the_idle_one_stays(serve):
    opened = 0

    async def handle(reader, writer):
        nonlocal opened
        opened += 1
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK + b"Content-Length: 0\r\n\r\n")

    pool = await serve(handle)
    connections = []
    for fresh in (False, True, False):
        connection = await pool.acquire(fresh=fresh)
        connections.append(connection)
        await connection.send("GET", "/", [], b"")
        await connection.head()
        assert await connection.read() == b""
        if fresh:
            connection.close()
        pool.release(connection)
    assert connections[2] is connections[0] is not connections[1]
    assert (opened, len(pool._idle)) == (2, 1)
    pool.cut()
