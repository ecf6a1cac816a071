"""A scripted supervisor for tests of the command line, and how to run a command against it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from supervisor.cli import cli

ROOT = Path(__file__).parent.parent

Reply = tuple[int, str, str]
Handler = Callable[["Fake", dict[str, Any]], Reply | Iterator[str]]


class Fake:
    """A scripted supervisor on a real socket: `routes` by method and path, `seen` what was asked, `keys` with which."""

    def __init__(self) -> None:
        self.routes: dict[str, Reply | Iterator[str] | Handler] = {}
        self.seen: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        fake = self

        class Request(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.answer(self, {})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                fake.answer(self, json.loads(self.rfile.read(length) or b"{}"))

            do_DELETE = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        key = f"{request.command} {request.path}"
        self.seen.append((key, body))
        self.keys.append(request.headers.get("Authorization"))
        reply = self.routes.get(key, (404, "text/plain", "404: Not Found"))
        if callable(reply):
            reply = reply(self, body)
        with contextlib.suppress(ConnectionError):
            if isinstance(reply, tuple):
                status, kind, text = reply
                request.send_response(status)
                request.send_header("Content-Type", kind)
                request.send_header("Content-Length", str(len(text.encode())))
                request.end_headers()
                request.wfile.write(text.encode())
                return
            request.send_response(200)
            request.end_headers()
            for part in reply:
                request.wfile.write(part.encode())
                request.wfile.flush()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def as_json(result: Result) -> Any:
    """Return the one document on standard output, with nothing on standard error."""
    assert result.stderr == ""
    return json.loads(result.stdout)


def reply(document: Any, status: int = 200) -> Reply:
    return status, "application/json", json.dumps(document)


def model(name: str, value: str = "unloaded", **more: Any) -> dict[str, Any]:
    status = {"value": value, **{key: more.pop(key) for key in ("error", "progress", "failed") if key in more}}
    return {"id": name, "object": "model", "aliases": [name], "status": status, "size": 1 << 30, **more}


def listing(*models: dict[str, Any]) -> Reply:
    return reply({"object": "list", "data": list(models)})


def event(name: str, **data: Any) -> str:
    return f"data: {json.dumps({'model': name, 'event': 'model_status', 'data': data})}\n\n"


def progress(value: float) -> dict[str, Any]:
    return {"stages": ["text_model"], "current": "text_model", "value": value}


def start_process(*args: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "supervisor", *args]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, **options)
