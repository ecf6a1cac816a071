#!/usr/bin/env python3
"""What does the relay cost? A trivial upstream, direct and through the supervisor, interleaved.

Requests: `wrk` with 1 and 16 connections. Streams: 1, 8 and 32 at once; time to first token, token rate.
With --keys the supervisor asks for an API key, counts its requests and tokens. Needs wrk.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import uvloop

HERE = Path(__file__).parent
BODY = '{"model": "m", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 64}'
LUA = 'wrk.method="POST" wrk.body=[[%s]] wrk.headers["Content-Type"]="application/json"\n'
LUA += 'done=function(s,l,r) io.write(string.format("P50 %%d\\n", l:percentile(50))) end\n'
LUA_KEY = 'wrk.headers["Authorization"]="Bearer %s"\n'


def wrk(port: int, connections: int, seconds: float, script: Path) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script)]
    command.append(f"http://127.0.0.1:{port}/v1/chat/completions")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out:
        raise SystemExit(f"errors from port {port}:\n{out}")
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])
    return {"rate": rate, "p50_ms": int(re.search(r"P50 (\d+)", out)[1]) / 1000}


class Stream(asyncio.Protocol):
    """One stream of a client that costs next to nothing: notes when the first token came, waits for the end."""

    def __init__(self) -> None:
        self.first = self.end = 0.0
        self.tokens = 0
        self.tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.tokens += data.count(b'"delta"')
        if self.tokens and not self.first:
            self.first = time.perf_counter()
        self.tail = (self.tail + data)[-100:]
        if b"[DONE]" in self.tail:
            self.end = time.perf_counter()
            self.done.set_result(None)
            self.transport.close()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_exception(common.BenchError(f"a stream was cut after {self.tokens} tokens"))


def streams(port: int, count: int, secret: str) -> dict[str, float]:
    """Open `count` connections, start a stream on each at once, and return time to first token and token rate."""
    body = BODY.replace("}]", '}], "stream": true').encode()
    key_line = b"Authorization: Bearer %s\r\n" % secret.encode() if secret else b""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n%b\r\n"
    )

    async def run() -> tuple[float, list[Stream]]:
        loop = asyncio.get_running_loop()
        clients = [(await loop.create_connection(Stream, "127.0.0.1", port))[1] for _ in range(count)]
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        for client in clients:
            client.transport.write(head % (len(body), key_line) + body)
        await asyncio.gather(*(client.done for client in clients))
        return began, clients

    began, clients = uvloop.run(run())
    seconds = max(client.end for client in clients) - began
    return {
        "ttft_p50_ms": 1000 * statistics.median(client.first - began for client in clients),
        "tokens_per_s": sum(client.tokens for client in clients) / seconds,
    }


def key(path: Path) -> tuple[str, dict]:
    """Make an API key with limits that are never reached; return it, and the configuration that asks for it."""
    command = [sys.executable, "-m", "supervisor", "key", "add", "bench"]
    for limit in ("requests", "tokens"):
        command += [f"--{limit}-per-minute", str(10**9)]
    env = os.environ | {"LLAMA_SUPERVISOR_API__KEYS_FILE": str(path)}
    made = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return made.stdout.strip(), {"api": {"keys_file": str(path)}}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=common.model_file, required=True, help="any GGUF file; it is not loaded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", action="store_true", help="with an API key whose requests and tokens are limited")
    parser.add_argument("--seconds", type=int, default=3, help="length of each wrk run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        secret, overlay = key(Path(folder) / "keys.json") if options.keys else ("", {})
        script.write_text(LUA % BODY + LUA_KEY % secret if secret else LUA % BODY)
        fake = Path(folder) / "fake-server"
        fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "fake_server.py"}" "$@"\n')
        fake.chmod(0o755)
        direct = common.free_port()
        os.environ["FAKE_PORT"] = str(direct)
        with common.supervisor({"m": options.model}, fake, overlay) as proxy:
            proxied = int(proxy.url.rsplit(":", 1)[1])
            wrk(proxied, 4, 1, script)  # starts the child and warms everything up
            found: dict[str, dict[str, list[dict[str, float]]]] = {}
            for _ in range(options.rounds):
                for side, port in (("direct", direct), ("proxy", proxied)):
                    for connections in (1, 16):
                        figures = wrk(port, connections, options.seconds, script)
                        found.setdefault(f"wrk c={connections}", {}).setdefault(side, []).append(figures)
                    for count in (1, 8, 32):
                        found.setdefault(f"{count} streams", {}).setdefault(side, []).append(
                            streams(port, count, secret)
                        )
    report(found, options.json)
    return 0


def report(found: dict, as_json: bool) -> None:
    rows = []
    for case, sides in found.items():
        for figure in sides["direct"][0]:
            direct, proxy = (statistics.median(one[figure] for one in sides[side]) for side in ("direct", "proxy"))
            rows.append({"case": case, "figure": figure, "direct": round(direct, 3), "proxy": round(proxy, 3)})
            rows[-1] |= {"added": round(proxy - direct, 3), "ratio": round(proxy / direct, 4)}
    if as_json:
        print(json.dumps({"machine": common.machine_state(), "rows": rows}, indent=1))
        return
    for row in rows:
        line = "{case:<11} {figure:<13} direct {direct:>10}  proxy {proxy:>10}  added {added:>10}  ratio {ratio}"
        print(line.format(**row))
    common.print_machine(common.machine_state())


if __name__ == "__main__":
    common.run_main(main)
