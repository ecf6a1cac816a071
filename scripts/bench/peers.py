#!/usr/bin/env python3
"""What happens where other model servers lose streams, block each other or leak children? A supervisor on real models.

The scenes are those that were measured on llama-swap (August 2026) and on llama-server's own router (b11434), with
SmolLM2-135M on two cores; their figures stand beside ours, and were not measured in this run. What it costs to start,
to swap and to relay is measured by `cold_start.py`, `swap.py` and `relay.py`, and llama-server's own tests are run
through the supervisor by `llama_suite.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
from common import Json, Supervisor, machine_state, model_file, parser, print_machine, run_main, server_of, supervisor

LONG = 4000
"""Tokens of an answer that is to be running when something happens to it."""


class Row(NamedTuple):
    """A scene: what was measured, whether it is as it must be, and what others do."""

    scene: str
    ours: str
    good: bool
    must: str
    llama_swap: str
    router: str


class Stream:
    """A chat that streams; `ended` tells how."""

    def __init__(self, client: Client, model: str, tokens: int) -> None:
        self.events = 0
        self.last = ""
        self.ended_at = 0.0
        self._task = asyncio.create_task(self._run(client, model, tokens))

    async def _run(self, client: Client, model: str, tokens: int) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "Tell a story."}], "stream": True}
        body |= {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        async with client.http.post(client.url + "/v1/chat/completions", json=body) as answer:
            with contextlib.suppress(aiohttp.ClientError):
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        self.events += 1
                        self.last = line.decode("utf-8", "replace").removeprefix("data: ").strip()
        self.ended_at = time.monotonic()

    async def begun(self) -> Stream:
        """Wait until a few events have come."""
        while self.events < 5 and not self._task.done():
            await asyncio.sleep(0.005)
        return self

    async def ended(self) -> str:
        """Wait for the end: `done`, the code of the error event, or `cut`."""
        await self._task
        if self.last == "[DONE]":
            return "done"
        with contextlib.suppress(ValueError):
            error = json.loads(self.last).get("error")
            if isinstance(error, dict):
                return str(error.get("code") or error.get("type"))
        return "cut"


class Client:
    """Requests to one supervisor."""

    def __init__(self, running: Supervisor, http: aiohttp.ClientSession) -> None:
        self.running = running
        self.http = http
        self.url = running.url

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Json, float]:
        """Make a request; return status, body and seconds."""
        began = time.monotonic()
        async with self.http.request(method, self.url + path, json=body) as answer:
            data = await answer.json(content_type=None)
            return answer.status, data, time.monotonic() - began

    async def chat(self, model: str | None, tokens: int = 1) -> tuple[int, Json, float]:
        """Ask for a short answer."""
        body: Json = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens}
        return await self.ask("POST", "/v1/chat/completions", body | ({"model": model} if model else {}))

    async def entry(self, model: str) -> Json:
        """Return what the status says of a model; empty when it has none."""
        _, status, _ = await self.ask("GET", "/api/v1/status")
        return next((one for one in status["models"] if one["id"] == model), {})

    async def stream(self, model: str, tokens: int = LONG) -> Stream:
        """Begin a stream, and return when it runs."""
        return await Stream(self, model, tokens).begun()


@contextlib.asynccontextmanager
async def started(models: dict[str, Path], server: Path, /, **overlay: Any) -> AsyncIterator[Client]:
    """Run a supervisor for one scene."""
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    with supervisor(models, server, {"performance": {"context_size": 8192}} | overlay) as running:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            yield Client(running, http)


ONE = {"models": {"max_loaded_models": 1}}
TWO = {"models": {"max_loaded_models": 2}}


async def busy(models: dict[str, Path], server: Path) -> Row:
    """Two clients keep A busy for 20 s, B is asked at 3 s."""
    async with started(models, server, **ONE) as client:
        await client.chat("a")
        end = time.monotonic() + 20

        async def keep() -> list[str]:
            seen = []
            while time.monotonic() < end:
                seen.append(await (await client.stream("a", 40)).ended())
            return seen

        keepers = [asyncio.create_task(keep()) for _ in range(2)]
        await asyncio.sleep(3)
        status, _, seconds = await client.chat("b")
        seen = [ended for keeper in keepers for ended in await keeper]
    whole = seen.count("done")
    good = status == 200 and seconds < 8 and whole == len(seen)
    ours = f"{seconds:.1f} s; {whole} of {len(seen)} streams of A whole"
    return Row("two clients keep A busy, B is asked", ours, good, "5 s, a drain and a start", "19.3 s", "18.7 s")


async def unload(models: dict[str, Path], server: Path) -> list[Row]:
    """A model that streams is unloaded, first in peace, then by force; another one is asked meanwhile."""
    async with started(models, server, **TWO) as client:
        await client.chat("b")
        stream = await client.stream("a", 200)
        _, _, answered = await client.ask("POST", "/models/unload", {"model": "a"})
        _, _, other = await client.chat("b")
        how = await stream.ended()
        forced = await client.stream("a")
        at = time.monotonic()
        await client.ask("POST", "/models/unload", {"model": "a", "force": True})
        error = await forced.ended()
        cut = forced.ended_at - at
    return [
        Row("unload while it streams", f"answers after {answered:.3f} s, the stream ends: {how}", how == "done",
            "drain", "10 s, cut short, no error", "10 s stall, plain text"),
        Row("the same by force", f"{cut:.3f} s, {error}", cut < 0.3 and error not in ("done", "cut"),
            "< 0.3 s, a typed error", "-", "-"),
        Row("other models meanwhile", f"answered in {other:.2f} s", other < 2, "fine", "frozen 9.8 s", "fine"),
    ]  # fmt: skip


async def reload(models: dict[str, Path], server: Path) -> Row:
    """The configuration is read again, unchanged, four times while a stream runs."""
    async with started(models, server) as client:
        await client.chat("a")
        lost = 0
        for _ in range(4):
            stream = await client.stream("a", 100)
            await client.ask("POST", "/api/v1/config/reload")
            lost += await stream.ended() != "done"
    return Row(
        "reload, unchanged, with a stream", f"lost {lost} of 4", lost == 0, "survives", "lost 4 of 4", "survives"
    )


async def killed(models: dict[str, Path], server: Path) -> Row:
    """The child is killed in the middle of a stream."""
    async with started(models, server) as client:
        stream = await client.stream("a")
        at = time.monotonic()
        os.kill((await client.entry("a"))["pid"], signal.SIGKILL)
        error = await stream.ended()
        status, _, seconds = await client.chat("a")
    ours = f"{error} after {stream.ended_at - at:.2f} s; the next answer {status} in {seconds:.2f} s"
    good = error not in ("done", "cut") and status == 200
    return Row("the child is killed in a stream", ours, good, "a typed error", "no [DONE], no error", "text in the SSE")


async def hung(models: dict[str, Path], server: Path) -> Row:
    """The child is stopped in a stream (SIGSTOP), and another model is asked that takes its place."""
    async with started(models, server, **ONE) as client:
        stream = await client.stream("a")
        pid = (await client.entry("a"))["pid"]
        os.kill(pid, signal.SIGSTOP)
        status, _, seconds = await client.chat("b")
        error = await stream.ended()
    ours = f"{status} in {seconds:.1f} s; the stream: {error}"
    good = status == 200 and error not in ("done", "cut")
    return Row(
        "the child hangs, another is asked", ours, good and seconds < 8, "< 5 s and a start", "20-120 s", "10.9 s"
    )


async def orphans(models: dict[str, Path], server: Path) -> Row:
    """The supervisor is killed while its child streams."""
    async with started(models, server) as client:
        stream = await client.stream("a")
        child = psutil.Process((await client.entry("a"))["pid"])
        at = time.monotonic()
        client.running.process.kill()
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < at + 10:
            await asyncio.sleep(0.005)
        seconds = time.monotonic() - at
        await stream.ended()
    return Row("the supervisor is killed", f"its child is gone after {seconds:.2f} s", seconds < 2, "children exit",
               "the child survives", "children exit")  # fmt: skip


async def crowd(models: dict[str, Path], server: Path) -> Row:
    """Fourteen requests at once, everything by default."""
    async with started(models, server) as client:
        await client.chat("a")
        answers = await asyncio.gather(*(client.chat("a", 32) for _ in range(14)))
    statuses = [status for status, _, _ in answers]
    took = statistics.median(seconds for _, _, seconds in answers)
    return Row("14 requests at once", f"{statuses.count(200)} get 200, half of them within {took:.1f} s",
               statuses == [200] * 14, "a queue with a bound", "4 get 429", "wait")  # fmt: skip


async def dies(models: dict[str, Path], server: Path) -> Row:
    """A child whose command ends at once, asked five times."""
    wrong = {"models": {"overrides": {"a": {"args": ["--no-such-flag"]}}}}
    async with started(models, server, **wrong) as client:
        answers = [await client.chat("a") for _ in range(5)]
        status, body, _ = answers[0]
        code, text = body["error"]["code"], body["error"]["message"]
        async with client.http.get(client.url + "/metrics") as answer:
            found = re.search(r'model_start_failures_total\{model="a"\} (\d+)', await answer.text())
    starts = int(found[1]) if found else 0
    told = "--no-such-flag" in text
    ours = f"{status} {code}, {'with' if told else 'without'} its last lines; started {starts} time(s) for 5 requests"
    others = "again at every request"
    return Row("a command that ends at once", ours, told and 0 < starts < 5, "back-off, and why", others, others)


async def small(models: dict[str, Path], server: Path) -> list[Row]:
    """Questions that others refuse."""
    async with started(models, server, models={"default_model": "a"}) as client:
        one, _, _ = await client.ask("GET", "/v1/models/a")
        none, _, _ = await client.chat(None)
    return [
        Row("GET /v1/models/{id}", str(one), one == 200, "200", "404", "404"),
        Row("no `model` in the request", str(none), none == 200, "the default model", "404", "400"),
    ]


async def idle(models: dict[str, Path], server: Path) -> Row:
    """A loaded model, and nobody asks: what does a supervisor whose modules were compiled before take in a minute?"""
    async with started(models, server):
        pass
    async with started(models, server) as client:
        await client.chat("a")
        process = psutil.Process(client.running.process.pid)
        await asyncio.sleep(5)
        before, began = process.cpu_times(), time.monotonic()
        await asyncio.sleep(60)
        after, seconds = process.cpu_times(), time.monotonic() - began
        share = (after.user + after.system - before.user - before.system) / seconds
        rss = process.memory_info().rss / 2**20
    ours = f"{rss:.1f} MiB resident, {share:.2%} of a core"
    return Row("idle for a minute", ours, rss * 2**20 < 60e6 and share < 0.005, "< 60 MB, < 0.5 %", "-", "-")


Scene = Callable[[dict[str, Path], Path], Coroutine[Any, Any, Row | list[Row]]]
SCENES: dict[str, Scene] = {
    scene.__name__: scene for scene in (busy, unload, reload, killed, hung, orphans, crowd, dies, small, idle)
}


def main() -> int:
    """Play the scenes; 0 when all is as it must be, 1 when not."""
    options = parser(__doc__)
    options.add_argument("--model-a", type=model_file, required=True, help="GGUF file")
    options.add_argument("--model-b", type=model_file, required=True, help="GGUF file")
    options.add_argument("--scenes", nargs="*", choices=list(SCENES), default=list(SCENES))
    given = options.parse_args()
    before, server = machine_state(), server_of(given)
    rows: list[Row] = []
    for name in given.scenes:
        found = asyncio.run(SCENES[name]({"a": given.model_a, "b": given.model_b}, server))
        rows += found if isinstance(found, list) else [found]
        if not given.json:
            _show(rows[-1:] if isinstance(found, Row) else found)
    if given.json:
        print(json.dumps({"rows": [row._asdict() for row in rows], "machine": before}, indent=1))
    else:
        print_machine(before)
    return 0 if all(row.good for row in rows) else 1


def _show(rows: list[Row]) -> None:
    for row in rows:
        print(f"{'good' if row.good else 'BAD '}  {row.scene}: {row.ours}")
        print(f"      must: {row.must}; llama-swap: {row.llama_swap}; router: {row.router}", flush=True)


if __name__ == "__main__":
    run_main(main)
