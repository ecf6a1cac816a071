#!/usr/bin/env python3
"""A trivial llama-server for measuring the relay alone: fixed answers, no model.

Takes llama-server's `--host X.sock`; also listens on TCP port $FAKE_PORT, for the direct side of a comparison.
A POST whose body holds `"stream": true` gets FAKE_TOKENS events (default 64), one every FAKE_GAP_MS (default 5).
"""

import asyncio
import os
import sys

import uvloop

ANSWER = b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}]}'
HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\n"
    b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
)
PLAIN = HEAD % len(ANSWER) + ANSWER
STREAM = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
TOKENS = int(os.environ.get("FAKE_TOKENS", "64"))
GAP = float(os.environ.get("FAKE_GAP_MS", "5")) / 1000


class Fake(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.buffer, self.left = transport, b"", 0

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            if b'"stream": true' in body or b'"stream":true' in body:
                self.left = TOKENS
                self.transport.write(STREAM)
                self.token()
            else:
                self.transport.write(PLAIN)

    def token(self):
        if self.transport.is_closing():
            return
        self.left -= 1
        self.transport.write(CHUNK if self.left else CHUNK + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        if self.left:
            asyncio.get_running_loop().call_later(GAP, self.token)


async def main() -> None:
    if "--version" in sys.argv:
        print("version: fake (build 0, commit fake)", file=sys.stderr)
        return
    loop = asyncio.get_running_loop()
    socket = sys.argv[sys.argv.index("--host") + 1]
    servers = [await loop.create_unix_server(Fake, socket)]  # kept: uvloop closes what is collected
    if port := os.environ.get("FAKE_PORT"):
        servers.append(await loop.create_server(Fake, "127.0.0.1", int(port)))
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)  # the command to exit, or the end
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main())
