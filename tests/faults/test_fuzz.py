"""A thousand malformed requests, the same in every run: each gets a well-formed answer or a closed connection.

None of them is an error of ours (5xx), and afterwards everything works as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from test_gate import CHAT, Front

pytest_plugins = ["test_gate"]

COUNT = 1000
SEED = 20250607
AT_ONCE = 250  # aiohttp waits up to 10 s for the rest of a body that nobody reads

_STATUS = re.compile(rb"HTTP/\d\.\d (\d{3}) [^\r\n]*\r\n")


def request(method: str, path: str, body: bytes = b"", *more: str) -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *length, *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


ASKED = json.dumps({"model": "one", "messages": [{"role": "user", "content": "Hi"}], "n": 1}).encode()
FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\none\r\n--b--\r\n'

SEEDS = [
    request("GET", "/health"),
    request("GET", "/v1/models/one?reload=1"),
    request("GET", "/api/v1/models/one/logs?lines=3"),
    request("GET", "/metrics"),
    request("GET", "/nowhere"),
    request("PUT", "/health"),
    request("OPTIONS", CHAT, b"", "Origin: http://localhost:1"),
    request("POST", CHAT, ASKED, "X-Priority: high", "Connection: close"),
    request("POST", CHAT, b"", "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ASKED), ASKED),
    request("POST", CHAT, ASKED, "Expect: 100-continue"),
    request("POST", CHAT, ASKED, "Content-Encoding: gzip"),
    request("POST", "/v1/messages", ASKED, "anthropic-version: 2023-06-01", "X-Api-Key: x"),
    request("POST", "/v1/audio/transcriptions", FORM).replace(b"application/json", b"multipart/form-data; boundary=b"),
    request("POST", "/models/load", b'{"model": "one", "parameters": {"threads": 1}}'),
    request("POST", "/models/unload", b'{"model": "two", "force": true}'),
    request("POST", "/inference", b'{"prompt": "Hi", "parameters": {"max_tokens": 1}, "stream": true}'),
    request("POST", "/v1/streams/lookup", b'{"conversation_ids": ["x"]}'),
    request("POST", "/karen/config", b'{"context_awareness": true}'),
    request("DELETE", "/v1/atlas/memory?model=one&file=x.atlas"),
]

TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"%", b"%00", b"%ff", b"..", b"/", b"\xff\xfe", b"\xc3\xa9", b"{", b"}",
    b'"', b"\\u0000", b"[" * 2000, b"1e999", b"-1", b"null", b"NaN", b"HTTP/9.9", b"HTTP/0.9", b"A" * 9000,
    b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n", b"Host: y\r\n",
    b"Content-Encoding: zstd\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"ffffffffffffffff\r\n",
    b"Transfer-Encoding: chunked\r\n",
]  # fmt: skip


def mutated(chance: random.Random) -> bytes:
    """Return a request with one to six things wrong with it."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 1, 2, 5, 20, 100]))
        match chance.randrange(7):
            case 0:
                data[at:end] = bytes([chance.randrange(256)])
            case 1:
                data[at:at] = chance.choice(TOKENS)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                del data[at:]
            case 5:
                data += chance.choice(SEEDS)
            case 6:
                data[at:end] = chance.randbytes(end - at)
    return bytes(data)


def statuses(answer: bytes) -> list[int]:
    """Return the status of each answer in what came on one connection. Raises `AssertionError` unless all are whole."""
    found = []
    while answer:
        match = _STATUS.match(answer)
        assert match, answer[:200]
        status = int(match[1])
        head, end, rest = answer.partition(b"\r\n\r\n")
        assert end, answer[:200]
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        found.append(status)
        if status < 200 or status == 204:
            answer = rest
        elif headers.get(b"transfer-encoding") == b"chunked":
            answer = _after_chunks(rest)
        else:
            length = int(headers.get(b"content-length", len(rest)))
            assert len(rest) >= length, answer[:200]
            answer = rest[length:]
    return found


def _after_chunks(rest: bytes) -> bytes:
    while True:
        size, end, rest = rest.partition(b"\r\n")
        assert end
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
        if not length:
            return rest


async def exchange(front: Front, sent: bytes) -> bytes:
    """Send bytes; return what comes until the connection is closed."""
    url = urlsplit(front.supervisor.urls[0])
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    got = b""
    with contextlib.suppress(ConnectionError):
        writer.write(sent)
        while piece := await reader.read(1 << 16):
            got += piece
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return got


@pytest.fixture
async def fuzzed(begin) -> Front:
    return await begin(require_keys=False, idle_seconds=0.5, stall_seconds=0.5)


async def test_malformed_requests_hurt_nobody(fuzzed):
    chance = random.Random(SEED)
    sent = [mutated(chance) for _ in range(COUNT)]
    seen: set[int] = set()
    for at in range(0, COUNT, AT_ONCE):
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(exchange(fuzzed, one) for one in sent[at : at + AT_ONCE]))
        for number, answer in enumerate(answers, at):
            found = statuses(answer)
            assert max(found, default=0) < 500, (number, sent[number], answer[:500])
            seen.update(found)
    assert {200, 400, 404, 405} <= seen  # they got as far as the parser, the router and the handlers
    scheduler = fuzzed.supervisor.fleet.scheduler
    async with asyncio.timeout(30):
        while list(scheduler.tickets()):
            await asyncio.sleep(0.01)
    assert fuzzed.supervisor.fleet.problems() == []
    for model in ("one", "two"):
        assert (await fuzzed.ask("POST", CHAT, None, {"model": model}))[0] == 200


async def test_no_bytes_at_all_and_random_ones(fuzzed):
    chance = random.Random(SEED)
    sent = [b"", *(chance.randbytes(chance.randrange(1, 3000)) for _ in range(99))]
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(exchange(fuzzed, one) for one in sent))
    assert {status for answer in answers for status in statuses(answer)} <= {400, 404, 405}
    assert (await fuzzed.ask("GET", "/health"))[0] == 200
