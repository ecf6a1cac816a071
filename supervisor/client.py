"""How does the command line talk to a running supervisor? Over plain HTTP, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from supervisor import __version__
from supervisor.errors import SupervisorError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
POLL_SECONDS = 1.0
MAX_LINE = 1 << 20
RELAYED = "/v1/atlas/"
"""Where the routes begin that a child answers and that commands use."""

Json = dict[str, Any]


class NoSupervisor(SupervisorError):
    """Nothing answers at the address, or something that is no supervisor."""

    type = "no_supervisor"


class ApiError(SupervisorError):
    """The supervisor refused; `error` is the object of its error envelope."""

    def __init__(self, status: int, error: Json) -> None:
        super().__init__(str(error.get("message") or f"HTTP status {status}"), param=error.get("param"))
        self.status = status
        self.error = error
        self.code = error.get("code")

    def body(self) -> Json:
        """Return the envelope as the supervisor sent it, with the HTTP status."""
        return {"error": {**self.error, "message": self.message, "status": self.status}}


class LoadFailed(SupervisorError):
    """The model did not become ready."""

    type = "unavailable_error"
    code = "model_start_failed"


class Client:
    """The HTTP API of one supervisor; each call has a connection of its own, and carries the API key if there is one.

    Raises NoSupervisor when nothing answers as a supervisor does, and ApiError for its refusals.
    """

    def __init__(self, url: str, key: str | None = None, cert: Path | None = None) -> None:
        """`cert`: the certificate that a supervisor on this machine serves, to trust that."""
        self._cert = cert
        self._key = key.strip() if key else None
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
            http.client.HTTPConnection(self._host, self._port)  # refuses spaces and control characters
        except (ValueError, http.client.InvalidURL) as error:
            raise NoSupervisor(f"{url!r} is not an address: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise NoSupervisor(f"{url!r} is not an address; it should look like http://127.0.0.1:8080")
        self._tls = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{parts.scheme}://{host}{f':{self._port}' if self._port else ''}{self._prefix}"

    def get(self, path: str) -> Json:
        """Return the JSON object at `path`."""
        return self._object("GET", path, None)

    def post(self, path: str, body: Json) -> Json:
        """Send `body` as JSON and return the JSON object of the answer."""
        return self._object("POST", path, body)

    def delete(self, path: str, body: Json | None = None) -> Json:
        """Delete what is at `path` and return the JSON object of the answer."""
        return self._object("DELETE", path, body)

    def lines(self, path: str, opened: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yield the lines of a text as they come, for as long as the supervisor sends; `opened`: it will send."""
        with self._open("GET", path, None) as (connection, response):
            if connection.sock is not None:
                connection.sock.settimeout(None)
            opened()
            while True:
                try:
                    line = response.readline(MAX_LINE)
                except (OSError, http.client.HTTPException) as error:
                    raise NoSupervisor(f"{self.url} broke off: {error}") from None
                if not line:
                    return
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    def events(self, path: str, opened: Callable[[], None] = lambda: None) -> Iterator[Json]:
        """Yield the JSON objects of a stream of server-sent events."""
        data: list[str] = []
        for line in self.lines(path, opened):
            field, _, value = line.partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))
            elif not line and data:
                text, data = "\n".join(data), []
                with contextlib.suppress(ValueError):
                    event = json.loads(text)
                    if isinstance(event, dict):
                        yield event

    def models(self, *, reload: bool = False) -> list[Json]:
        """Return the models as `/v1/models` lists them, without `auto`; `reload`: it looks into its folder first."""
        data = self.get("/v1/models?reload=1" if reload else "/v1/models").get("data")
        if not isinstance(data, list):
            raise NoSupervisor(f"what answers at {self.url} is no llama-supervisor")
        return [model for model in data if "alias_of" not in model]

    def find(self, name: str) -> Json | None:
        """Return the model with this id or alias, or None."""
        models = self.models()
        exact = [model for model in models if model.get("id") == name]
        return next(iter(exact or [model for model in models if name in model.get("aliases", ())]), None)

    def _object(self, method: str, path: str, body: Json | None) -> Json:
        with self._open(method, path, body) as (_, response):
            answer = _json_object(self._read(response))
        if answer is None:
            raise NoSupervisor(f"what answers at {self.url} is no llama-supervisor")
        return answer

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: Json | None
    ) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPResponse]]:
        """Send a request; the answer's body is still to be read."""
        connection = self._connection()
        headers = {"User-Agent": f"llama-supervisor/{__version__}", "Accept": "*/*"}
        content = None
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER_SECONDS)
                connection.request(method, self._prefix + path, content, headers)
                response = connection.getresponse()
            except (OSError, UnicodeError, http.client.HTTPException) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise NoSupervisor(
                    f"no supervisor answers at {self.url} ({reason}); `llama-supervisor start` starts one, "
                    "--url names another address"
                ) from None
            if response.status >= 400:
                raise self._refusal(path, response)
            yield connection, response

    def _connection(self) -> http.client.HTTPConnection:
        if not self._tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        context = None
        if self._cert is not None:
            from supervisor.tls import client_context  # noqa: PLC0415 (pydantic is slow to import)

            context = client_context(self._cert)
        return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_SECONDS, context=context)

    def _refusal(self, path: str, response: http.client.HTTPResponse) -> SupervisorError:
        """Return the error that a refusal means; answers that are not in our form come from something else.

        A number for a code is the form of llama-server, which answers the supervisor's relayed routes.
        """
        error = (_json_object(self._read(response)) or {}).get("error")
        relayed = path.startswith(RELAYED)
        if isinstance(error, dict) and (relayed or not isinstance(error.get("code"), int)):
            if response.status == http.HTTPStatus.UNAUTHORIZED:
                error["message"] = f"{error.get('message')} (LLAMA_SUPERVISOR_API_KEY holds the key of these commands)"
            return ApiError(response.status, error)
        if response.status >= 500:
            return ApiError(response.status, {"message": f"{self.url} answered with HTTP status {response.status}"})
        return NoSupervisor(f"what answers at {self.url} is no llama-supervisor (HTTP {response.status} for its API)")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NoSupervisor(f"{self.url} broke off its answer: {error}") from None


def _json_object(raw: bytes) -> Json | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def logs_path(model: str, lines: int, *, follow: bool) -> str:
    """Return the path of a model's log."""
    return f"/api/v1/models/{quote(model, safe='')}/logs?lines={lines}{'&follow=1' if follow else ''}"


class Load:
    """One load of a model, waited for: the request and the event stream run in threads, `wait` in the caller's."""

    def __init__(self, client: Client, model: str, progress: Callable[[float], None]) -> None:
        self._client = client
        self._model = model
        self._progress = progress
        self._started = False
        self._inbox: queue.Queue[tuple[str, Any]] = queue.Queue()

    def wait(self) -> None:
        """Ask for the model and return when it is ready. Raises LoadFailed with the reason, ApiError, NoSupervisor."""
        threading.Thread(target=self._listen, daemon=True).start()
        listening = self._inbox.get()[0] == "listening"
        threading.Thread(target=self._ask, daemon=True).start()
        asked = False
        while True:
            try:
                kind, content = self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                kind, content = "silence", None
            if kind == "refused":
                raise content
            if kind == "event" and self._is_ready(content):
                return
            listening = listening and kind != "deaf"
            asked = asked or kind == "asked"
            if asked and kind in ("asked", "silence") and self._is_loaded(trust_failures=not listening):
                return

    def _is_ready(self, event: Json) -> bool:
        data = event.get("data")
        if event.get("model") != self._model or event.get("event") != "model_status" or not isinstance(data, dict):
            return False
        if data.get("failed"):
            raise LoadFailed(_failure(self._model, data))
        if data.get("status") == "unloaded" and self._started:
            raise LoadFailed(f"model {self._model!r} was unloaded while it loaded")
        if data.get("status") == "loading":
            self._started = True
            value = (data.get("progress") or {}).get("value")
            if isinstance(value, int | float):
                self._progress(float(value))
        return data.get("status") == "loaded"

    def _is_loaded(self, *, trust_failures: bool) -> bool:
        """Look at the list of models, for a load that was over before we listened, or a stream that broke.

        While the stream is whole, a failure in the list may be an old one.
        """
        status = (self._client.find(self._model) or {}).get("status") or {}
        if trust_failures and status.get("value") in ("failed", "invalid"):
            raise LoadFailed(_failure(self._model, status))
        return status.get("value") == "loaded"

    def _listen(self) -> None:
        try:
            for event in self._client.events("/models/sse", lambda: self._inbox.put(("listening", None))):
                self._inbox.put(("event", event))
        except SupervisorError:
            pass  # the request, or the look at the list, meets the same and tells
        self._inbox.put(("deaf", None))

    def _ask(self) -> None:
        try:
            self._client.post("/models/load", {"model": self._model})
        except SupervisorError as error:
            self._inbox.put(("refused", error))
        else:
            self._inbox.put(("asked", None))


def _failure(model: str, data: Json) -> str:
    reason = str(data.get("error") or "it did not load and gave no reason; see its log")
    return reason if reason.startswith("model ") else f"model {model!r}: {reason}"
