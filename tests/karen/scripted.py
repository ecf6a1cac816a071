"""A supervisor that does what a test says: up or down, slow, refusing, broken."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

Json = dict[str, Any]


def events(*pieces: str, finish: str = "stop", done: bool = True) -> list[str]:
    """Return a whole streamed answer, as llama-server sends it."""
    chunks: list[Json] = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}})
    lines = [f"data: {json.dumps({'model': 'tiny'} | chunk)}\n\n" for chunk in chunks]
    return [*lines, "data: [DONE]\n\n"] if done else lines


class Scripted:
    """`answers` are used up one by one, the last one for ever: a list of pieces, or `(status, error)`."""

    def __init__(self) -> None:
        self.answers: list[Any] = [events("Hello", " there")]
        self.facts: Json | None = {"model": "tiny", "atlas": True}
        self.seen: list[Json] = []
        self.headers: list[Any] = []
        self.probes = 0
        self.wait: dict[str, asyncio.Event] = {}
        """Holds back `health` or `chat` until it is set; `cut` ends the connection instead of the answer."""
        self.busy = 0
        self.most_busy = 0
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/karen/config", self._config)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, request: web.Request) -> web.StreamResponse:
        self.probes += 1
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            if "health" in self.wait:
                await self.wait["health"].wait()
        finally:
            self.busy -= 1
        return web.json_response({"status": "ok"})

    async def _config(self, request: web.Request) -> web.StreamResponse:
        if self.facts is None:
            return web.Response(status=404, text="404: Not Found")
        return web.json_response(self.facts)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(await request.json())
        self.headers.append(request.headers)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            status, error = answer
            return web.json_response({"error": error}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in answer:
            await response.write(piece.encode())
        if "chat" in self.wait:
            await self.wait["chat"].wait()
        if "cut" in self.wait and request.transport is not None:
            request.transport.abort()
        return response
