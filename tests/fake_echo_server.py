#!/usr/bin/env python3
"""A llama-server without a model, for tests of what the supervisor sends to a child: it answers as the request says.

A JSON body with `say` (a list of texts) gets them as the answer, piece by piece, with `status` and `type`; `hang`: the
answer never ends; `die_once` (a path): it exits, unless that file is there, which it makes if it can. Every other
request gets its own method, target and headers back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = [line.split(": ", 1) for line in head[1:-2]]
            length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
            raw = await reader.readexactly(length)
            body = {}
            with contextlib.suppress(ValueError):
                body = json.loads(raw)
            if (once := body.get("die_once")) and not Path(once).exists():
                with contextlib.suppress(OSError):
                    Path(once).touch()
                os._exit(1)
            seen = json.dumps({"method": method, "target": target, "headers": headers})
            say, kind = body.get("say", [seen]), body.get("type", "application/json")
            status = f"HTTP/1.1 {body.get('status', 200)} As-Asked\r\nContent-Type: {kind}\r\n"
            writer.write(status.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in filter(None, say):
                data = piece.encode()
                writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                await writer.drain()
                await asyncio.sleep(0.01)
            if body.get("hang"):
                await reader.read()
                return
            writer.write(b"0\r\n\r\n")
    writer.close()


async def main() -> None:
    if "--version" in sys.argv:
        print("version: fake (build 0, commit fake)", file=sys.stderr)
        return
    server = await asyncio.start_unix_server(answer, sys.argv[sys.argv.index("--host") + 1])
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)  # the command to exit, or the end
    server.close()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
