#!/usr/bin/env python3
"""A llama-server whose decoding thread is stuck: it answers /health, and nothing else; a stream gets one event."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith((b"GET /health", b"GET /props")):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                continue
            if head.startswith(b"POST /v1/chat"):
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                writer.write(b"9\r\ndata: 1\n\n\r\n")
            await asyncio.Event().wait()


async def main() -> None:
    if "--version" in sys.argv:
        print("version: fake (build 0, commit fake)", file=sys.stderr)
        return
    server = await asyncio.start_unix_server(answer, sys.argv[sys.argv.index("--host") + 1])
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    server.close()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
