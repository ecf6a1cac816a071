"""What a client gets, byte for byte, from a child that sends what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from supervisor.errors import ChildFailed
from supervisor.metrics import ModelSeries
from supervisor.relay import relay
from supervisor.routes.wrap import guarded
from supervisor.upstream import HIGH_WATER, Pool

Child = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = b"data: 1\n\n"
CHUNK = b"9\r\n" + FIRST + b"\r\n"
END = b"0\r\n\r\n"


@dataclass
class FakeChild:
    """What the relay needs of a child: its connections, and what it says of its end."""

    pool: Pool
    model: str = "m"
    stopping: bool = False
    hung: str | None = None

    async def wait(self) -> int:
        return -9

    def failure(self, message: str) -> ChildFailed:
        return ChildFailed(message)


@dataclass
class FakeLease:
    child: FakeChild
    ended: list[bool] = field(default_factory=list)
    asked_at: float = 0.0
    granted_at: float = 0.0
    series: ModelSeries = field(default_factory=ModelSeries)

    def release(self, *, ok: bool = True) -> None:
        self.ended.append(ok)


@dataclass
class Front:
    port: int
    leases: list[FakeLease]
    left: asyncio.Event
    """Set when the child has seen its connection end."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def send(self, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(text)
        return reader, writer

    async def close(self) -> None:
        """Close what the client opened."""
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def talk(self, text: bytes) -> bytes:
        """Send `text` and return all that comes until the connection ends."""
        reader, _ = await self.send(text)
        async with asyncio.timeout(10):
            return await reader.read()


Serve = Callable[[Child], Awaitable[Front]]


@pytest.fixture
async def serve(short_tmp: Path) -> AsyncIterator[Serve]:
    """Return a function that puts the relay before a child with the given behaviour."""
    async with AsyncExitStack() as stack:

        async def begin(child: Child) -> Front:
            left = asyncio.Event()

            async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    await child(reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError):
                    left.set()
                finally:
                    writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()

            server = await asyncio.start_unix_server(run, short_tmp / "c.sock")
            stack.callback(server.close)
            pool = Pool(str(short_tmp / "c.sock"))
            stack.callback(pool.cut)
            leases: list[FakeLease] = []

            @guarded
            async def handler(request: web.Request) -> web.StreamResponse:
                leases.append(FakeLease(FakeChild(pool)))
                return await relay(request, await request.read(), leases[-1])

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", handler)
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            front = Front(runner.addresses[0][1], leases, left)
            stack.push_async_callback(front.close)
            return front

        yield begin


def answering(*parts: bytes, pause: float = 0.02, stay: bool = True) -> Child:
    """Return a child that answers each request with `parts` and then waits for the next, or goes."""

    async def child(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if not stay:
                return

    return child


def get(path: str = "/", method: str = "GET", version: str = "1.1", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


CLOSE = "Connection: close"


async def test_head_and_first_bytes_arrive_in_one_piece(serve):
    front = await serve(answering(EVENTS + CHUNK, CHUNK + END))
    reader, _ = await front.send(get())
    first = await reader.read(65536)
    head, _, body = first.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nDate: ")
    assert head.endswith(b"\r\nTransfer-Encoding: chunked")
    assert body == CHUNK
    assert await reader.readexactly(len(CHUNK + END)) == CHUNK + END
    assert front.leases[0].ended == [True]


async def test_a_head_without_a_body_yet_is_not_held_back(serve):
    asked = asyncio.Event()

    async def child(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENTS)
        await asked.wait()
        writer.write(CHUNK + END)
        await reader.read()

    front = await serve(child)
    reader, _ = await front.send(get())
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        asked.set()
        assert await reader.readexactly(len(CHUNK + END)) == CHUNK + END


async def test_one_connection_carries_many_requests(serve):
    front = await serve(answering(OK + b"Content-Length: 2\r\n\r\n", b"ok"))
    answer = await front.talk(get() + get() + get("/", "GET", "1.1", CLOSE))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"Content-Length: 2\r\n") == 3
    assert answer.count(b"\r\nConnection: close\r\n") == 1
    assert answer.endswith(b"\r\n\r\nok")


async def test_an_old_client_gets_a_stream_without_chunks(serve):
    front = await serve(answering(EVENTS + CHUNK, CHUNK + END))
    head, _, body = (await front.talk(get(version="1.0"))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Transfer-Encoding" not in head
    assert body == FIRST + FIRST


async def test_an_old_client_may_keep_its_connection(serve):
    front = await serve(answering(OK + b"Content-Length: 2\r\n\r\nok"))
    keep = get("/", "GET", "1.0", "Connection: keep-alive")
    answer = await front.talk(keep + get(version="1.0"))
    assert answer.count(b"HTTP/1.0 200 OK") == 2
    assert answer.count(b"\r\nConnection: keep-alive\r\n") == 1


async def test_an_answer_that_ends_with_the_childs_connection_is_ended_for_the_client(serve):
    front = await serve(answering(OK + b"\r\nhel", b"lo", stay=False))
    head, _, body = (await front.talk(get("/", "GET", "1.1", CLOSE))).partition(b"\r\n\r\n")
    assert b"\r\nTransfer-Encoding: chunked" in head
    assert body == b"3\r\nhel\r\n2\r\nlo\r\n" + END


@pytest.mark.parametrize("framing", [b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_head_request(serve, framing):
    front = await serve(answering(OK + framing + b"\r\n"))
    answer = await front.talk(get(method="HEAD") + get("/", "HEAD", "1.1", CLOSE))
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.count(b"Content-Length: 9\r\n") == (2 if b"Length" in framing else 0)
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_answers_without_a_body(serve):
    front = await serve(answering(b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n"))
    answer = await front.talk(get() + get("/", "GET", "1.1", CLOSE))
    assert answer.count(b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n") == 2
    assert b"Transfer-Encoding" not in answer
    assert b"Content-Length" not in answer


async def test_headers_of_one_connection_stay_the_others_go_untouched(serve):
    sent = (
        OK
        + b"X-Name: \xc3\xbc\xff\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nDate: then\r\nX-Hop: 1\r\n"
        + b"Connection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n"
    )
    front = await serve(answering(sent))
    head = await front.talk(get("/", "GET", "1.1", CLOSE))
    assert b"\r\nX-Name: \xc3\xbc\xff\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nDate: then\r\n" in head
    assert head.count(b"Date: ") == 1
    assert b"X-Hop" not in head
    assert b"Keep-Alive" not in head


async def test_what_only_the_supervisor_may_say_stays_here(serve):
    asked = []

    async def child(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK + b"Content-Length: 0\r\n\r\n")
        await reader.read()

    front = await serve(child)
    await front.talk(get("/", "GET", "1.1", CLOSE, "X-Atlas-Owner: eve", "x-atlas-OWNER: mallory", "X-Other: 1"))
    assert b"X-Other: 1" in asked[0]
    assert b"owner" not in asked[0].lower()


async def test_trailers_are_dropped_and_the_end_stays(serve):
    front = await serve(answering(EVENTS + CHUNK, b"0\r\nX-Trailer: 1\r\n\r\n"))
    answer = await front.talk(get("/", "GET", "1.1", CLOSE))
    assert answer.endswith(CHUNK + END)


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200", b"HTTP/1.1 2000 what\r\n\r\n"])
async def test_a_child_that_breaks_before_its_answer_is_a_502(serve, cut):
    front = await serve(answering(cut, stay=False))
    head, _, body = (await front.talk(get("/", "GET", "1.1", CLOSE))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 502 ")
    assert json.loads(body)["error"]["code"] == "upstream_failed"
    assert front.leases[0].ended == [False]


@pytest.mark.parametrize(
    "piece", [b"", CHUNK, CHUNK + b"9\r\ndat", CHUNK + b"zz\r\n"], ids=["no event", "whole", "half a chunk", "no chunk"]
)
async def test_a_stream_that_breaks_ends_with_an_error_event(serve, piece):
    front = await serve(answering(EVENTS, piece, stay=False))
    reader, writer = await front.send(get("/v1/chat/completions"))
    async with asyncio.timeout(5):
        await reader.readuntil(b"\r\n\r\n")
        body = b""
        while (size := int(await reader.readline(), 16)) > 0:
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
    last = body.split(b"data: ")[-1]
    assert json.loads(last)["error"]["code"] == "upstream_failed"
    assert body.startswith(FIRST) == bool(piece)
    assert front.leases[0].ended == [False]
    writer.write(get("/", "HEAD"))  # the connection is still good
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("path", "begin", "kind"),
    [
        ("/v1/chat/completions", b"data: ", None),
        ("/v1/messages", b"event: error\ndata: ", "api_error"),
        ("/v1/responses", b"event: error\ndata: ", None),
        ("/responses", b"event: error\ndata: ", None),
    ],
)
async def test_each_dialect_has_its_error_event(serve, path, begin, kind):
    front = await serve(answering(EVENTS + CHUNK, stay=False))
    _, _, body = (await front.talk(get(path, "GET", "1.0"))).partition(b"\r\n\r\n")
    event = body.removeprefix(FIRST)
    assert event.startswith(begin)
    data = json.loads(event.removeprefix(begin))
    assert "died before the answer was complete" in data["error"]["message"]
    if kind is not None:
        assert data["error"]["type"] == kind
    if begin != b"data: ":
        assert data["type"] == "error"
    if path.endswith("/responses"):
        assert (data["code"], data["message"]) == ("upstream_failed", data["error"]["message"])


@pytest.mark.parametrize(
    "head",
    [
        OK + b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n",
        OK + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Content-Type: text/event-stream\r\nContent-Length: 10\r\n\r\n",
    ],
    ids=["length", "chunks", "events with a length"],
)
async def test_any_other_answer_that_breaks_is_cut(serve, head):
    front = await serve(answering(head, b"2\r\n", stay=False))
    reader, _ = await front.send(get())
    async with asyncio.timeout(5):
        await reader.readuntil(b"\r\n\r\n")
        rest = await reader.read()
    assert len(rest) < 10
    assert not rest.endswith(END)
    assert front.leases[0].ended == [False]


async def test_a_client_that_leaves_cuts_the_child(serve):
    async def child(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENTS)
        while True:
            writer.write(CHUNK)
            await writer.drain()
            await asyncio.sleep(0.01)

    front = await serve(child)
    reader, writer = await front.send(get())
    await reader.readuntil(FIRST)
    writer.transport.abort()
    await asyncio.wait_for(front.left.wait(), 5)
    assert front.leases[0].ended == [True]


async def test_a_client_that_leaves_before_the_answer_cuts_the_child(serve):
    asked = asyncio.Event()

    async def child(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        assert await reader.read() == b""
        raise ConnectionResetError

    front = await serve(child)
    _, writer = await front.send(get())
    await asyncio.wait_for(asked.wait(), 5)
    writer.transport.abort()
    await asyncio.wait_for(front.left.wait(), 5)
    assert front.leases[0].ended == [False]


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_slow_client_makes_the_child_wait_and_gets_everything(serve, chunked):
    piece = bytes(range(256)) * 256
    count = 800  # 50 MiB, more than all buffers of the system hold
    sent = 0

    async def child(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        if chunked:
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        else:
            writer.write(b"Content-Length: %d\r\n\r\n" % (count * len(piece)))
        for _ in range(count):
            writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            await writer.drain()
            sent += 1
        writer.write(END if chunked else b"")
        await reader.read()

    front = await serve(child)
    reader, _ = await front.send(get(version="1.0"))
    await reader.readuntil(b"\r\n\r\n")
    before = -1
    while sent != before:  # until all are blocked
        before = sent
        await asyncio.sleep(0.2)
    assert sent < count
    total = 0
    async with asyncio.timeout(30):
        while data := await reader.read(HIGH_WATER):
            start = total % 256
            assert data == (bytes(range(256)) * (len(data) // 256 + 2))[start : start + len(data)]
            total += len(data)
    assert total == count * len(piece)
    assert front.leases[0].ended == [True]
