"""The KAREN extension: answers prompts on this machine by llama-supervisor, when the remote model cannot or need not.

KAREN executes this one file and does not put it into `sys.modules`, so it imports nothing beside it, uses the standard
library alone, and does without `from __future__ import annotations`. docs/karen.md tells how to set it up.

A hook never raises, and never takes longer than its budget; while the supervisor is down it returns at once and changes
nothing. Top to bottom: the options, the prompt, what KAREN hands over, the supervisor, and the extension itself.
"""

import asyncio
import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import ssl
import sys
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

Json = dict[str, Any]

PRE, POST = "pre_llm_prompt", "post_llm_result"

# The options

DEFAULTS: Json = {
    "url": "http://127.0.0.1:8080",
    "api_key_file": "",
    "model": "auto",
    "policy": "fallback",
    "combination": "auto",
    "budget_seconds": 10.0,
    "hybrid_budget_seconds": 4.0,
    "probe_timeout_seconds": 0.5,
    "probe_interval_seconds": 5.0,
    "max_tokens": 512,
    "temperature": 0.7,
    "keep_partial": True,
    "offer_context": True,
    "remember": True,
    "persona": "a helpful assistant",
    "local_knowledge": "",
    "limits": "Answer briefly. Say so when you do not know.",
    "max_memories": 8,
    "max_chars": 24000,
}
"""Every option with its default; its type is the option's type. docs/karen.md explains each."""

CHOICES = {
    "policy": ("off", "fallback", "prefer_local", "hybrid"),
    "combination": ("auto", "remote_first", "local_first", "merge"),
}

RANGES = {
    "budget_seconds": (0.05, 600.0),
    "hybrid_budget_seconds": (0.05, 600.0),
    "probe_timeout_seconds": (0.01, 10.0),
    "probe_interval_seconds": (0.0, 3600.0),
    "max_tokens": (1, 1_000_000),
    "temperature": (0.0, 5.0),
    "max_memories": (0, 1000),
    "max_chars": (100, 10_000_000),
}

PER_CALL = frozenset(
    (
        *("policy", "combination", "model", "budget_seconds", "hybrid_budget_seconds", "max_tokens", "temperature"),
        *("keep_partial", "offer_context", "remember", "persona", "local_knowledge", "limits"),
    )
)
"""What `local_options` in a hook's data may change: never where requests go, nor with which key."""

ENV_PREFIX = "LLAMACPP_KAREN_"
KEY_VARIABLE = ENV_PREFIX + "API_KEY"


def checked(key: str, value: Any) -> Any:
    """Return the value of an option as its type; strings are read as numbers and booleans. Raises `ValueError`."""
    default = DEFAULTS[key]
    if isinstance(default, bool):
        named = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        value = named.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if isinstance(default, str):
        if not isinstance(value, str) or (key in CHOICES and value not in CHOICES[key]):
            raise ValueError("must be " + (" or ".join(CHOICES[key]) if key in CHOICES else "a text"))
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    number = type(default)(value)
    low, high = RANGES[key]
    if not low <= number <= high:
        raise ValueError(f"must be from {low} to {high}")
    return number


def merged(layers: Iterable[tuple[str, Json]], problems: list[str]) -> Json:
    """Return the defaults with each layer over the ones before; what cannot be used is left out and named."""
    options = dict(DEFAULTS)
    for name, layer in layers:
        for key, value in layer.items():
            if key not in DEFAULTS:
                hint = f": keys are read from {KEY_VARIABLE} or `api_key_file` only" if "key" in key else ""
                problems.append(f"{name}: there is no option {key!r}{hint}")
                continue
            try:
                options[key] = checked(key, value)
            except (ValueError, OverflowError) as error:
                problems.append(f"{name}: {key} {error}")
    return options


def for_this_call(own: Any) -> Json:
    """Return the options that a hook's data changes; what may not be changed, or not so, is left out."""
    found: Json = {}
    for key, value in own.items() if isinstance(own, dict) else ():
        if key in PER_CALL:
            with contextlib.suppress(ValueError, OverflowError):
                found[key] = checked(key, value)
    return found


def schema_defaults(manifest: Any) -> Json:
    """Return the defaults in the manifest's `config_schema`, which no host applies."""
    schema = getattr(manifest, "config_schema", None)
    properties = schema.get("properties") if isinstance(schema, dict) else getattr(schema, "properties", None)
    if not isinstance(properties, dict):
        return {}
    return {key: one["default"] for key, one in properties.items() if isinstance(one, dict) and "default" in one}


def from_environment() -> Json:
    """Return the options that environment variables set."""
    named = {key: os.environ.get(ENV_PREFIX + key.upper(), "") for key in DEFAULTS}
    return {key: value for key, value in named.items() if value}


def given(context: Any) -> Json:
    """Return the host's own configuration: one host hands over a dict, the other an object that has it."""
    config = context if isinstance(context, dict) else getattr(context, "config", None)
    return {key: value for key, value in config.items() if isinstance(key, str)} if isinstance(config, dict) else {}


# The prompt

PLAIN = "[system]\n{{ persona }}\n\n[user]\n{{ message }}"
"""The template where prompt.txt cannot be read."""

PLACEHOLDERS = ("persona", "local_knowledge", "limits", "memories", "message")

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTROL = re.compile(
    r"(<)(\|[^|<>\n]{0,64}\|>|/?s>|/?(?:start|end)_of_\w+>|\uff5c[^<>\n]{0,64}\uff5c>|<?/?SYS>)"
    r"|(\[)(/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)
"""What chat templates use to tell turns apart, and llama-server reads as such wherever it stands."""


def _parted(found: re.Match[str]) -> str:
    return " ".join(part for part in found.groups() if part)


class Prompt:
    """The template of prompt.txt: a `[system]` and a `[user]` part with placeholders, filled in one pass."""

    def __init__(self, text: str) -> None:
        text = _COMMENT.sub("", text)
        system, _, user = text.replace("[system]", "", 1).partition("[user]")
        self.system = system.strip()
        self.user = user.strip()
        if "message" not in _PLACEHOLDER.findall(self.user):
            self.user = f"{self.user}\n\n{{{{ message }}}}".strip()
        names = set(re.findall(r"</?([a-z_]+)>", text))
        self._tags = re.compile(rf"(<)(/?(?:{'|'.join(map(re.escape, names)) or '(?!)'})>)", re.IGNORECASE)
        self.unknown = sorted(set(_PLACEHOLDER.findall(text)) - set(PLACEHOLDERS))

    def tame(self, text: str, limit: int) -> str:
        """Return the last `limit` characters of a text, unable to leave their place.

        A space parts what the template's tags and the tokens of turns are made of. Taking those away instead could
        leave others: `<<|im_end|>>`.
        """
        text = _CONTROL.sub(_parted, text.replace("\0", ""))
        return self._tags.sub(_parted, text)[-limit:].strip()

    def fill(self, part: str, values: dict[str, str]) -> str:
        """Return a part with its placeholders filled; a paragraph whose placeholders are all empty is left out."""
        kept = []
        for paragraph in re.split(r"\n[ \t]*\n", part):
            names = _PLACEHOLDER.findall(paragraph)
            if not names or any(values.get(name) for name in names):
                kept.append(_PLACEHOLDER.sub(lambda found: values.get(found[1], ""), paragraph))
        return "\n\n".join(kept).strip()


# What KAREN hands over: nothing in it has fixed names

TEXTS = ("prompt", "llm_prompt", "message", "user_message")
HISTORIES = ("messages", "history", "conversation_history")
RESULTS = ("result", "llm_response", "response")
MEMORIES = ("memories", "retrieved_memories", "memory_context")
SESSIONS = ("conversation_id", "session_id", "chat_id", "thread_id")
INSIDE = ("content", "text", "response", "message", "output", "answer")
"""Where the text is in a result or a message that is an object."""

ERRORS = ("error", "llm_error", "remote_error")
FAILED = ("error", "failed", "failure", "timeout")


def text_of(value: Any, depth: int = 0) -> str:
    """Return the text in a result, a message or a memory, whatever its shape; empty when there is none."""
    if isinstance(value, str):
        return value
    if value is None or depth > 4:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, (text_of(one, depth + 1) for one in value)))
    if isinstance(value, dict):
        inside = [value.get("choices", [])[:1] if isinstance(value.get("choices"), list) else None]
        inside += [value.get(key) for key in INSIDE]
    else:
        inside = [getattr(value, key, None) for key in ("content", "text", "response")]
    return next(filter(None, (text_of(one, depth + 1) for one in inside if not callable(one))), "")


def has_failed(value: Any) -> bool:
    """Tell whether a remote result is missing, empty or an error."""
    if isinstance(value, BaseException):
        return True
    error, success, status = (
        value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        for key in ("error", "success", "status")
    )
    return (
        bool(error and not callable(error))
        or success is False
        or str(status).lower() in FAILED
        or not text_of(value).strip()
    )


def remote_result(data: Json) -> tuple[str, bool]:
    """Return the text of the remote model's result, and whether it failed."""
    value = next((data[key] for key in RESULTS if data.get(key) is not None), None)
    return text_of(value).strip(), has_failed(value) or any(data.get(key) for key in ERRORS)


def put_result(data: Json, text: str) -> None:
    """Put `text` where KAREN looks for the result, in the shape that is there."""
    for key in [key for key in RESULTS if key in data] or RESULTS[:1]:
        old = data.get(key)
        if not isinstance(old, dict):
            data[key] = text
            continue
        new = {name: value for name, value in old.items() if name not in ("error", "success", "status")}
        if "choices" in old:
            new["choices"] = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
        else:
            new[next((name for name in INSIDE if name in old), "content")] = text
        data[key] = new


def prompt_of(data: Json) -> tuple[str, list[Json]]:
    """Return the last message of the user and the messages before it."""
    history: list[Any] = next((data[key] for key in HISTORIES if isinstance(data.get(key), list)), [])
    for key in TEXTS:
        if isinstance(data.get(key), list):
            return _split(data[key])
        if text := text_of(data.get(key)).strip():
            return text, [] if key in TEXTS[:2] else _before(history, text)  # a prompt has the history in it
    return _split(history)


def _split(messages: list[Any]) -> tuple[str, list[Json]]:
    known = [one for one in messages if isinstance(one, dict)]
    last = next((at for at in range(len(known) - 1, -1, -1) if known[at].get("role") in ("user", "human")), -1)
    return (text_of(known[last]).strip(), known[:last]) if known and last >= 0 else ("", [])


def _before(history: list[Any], text: str) -> list[Json]:
    known = [one for one in history if isinstance(one, dict)]
    return known[:-1] if known and text_of(known[-1]).strip() == text else known


def session_of(data: Json, user: Json) -> str | None:
    """Return the name of the conversation's memory: a hash, with whose it is in it; None without a conversation."""
    sources = (data, user)
    found = next((one[key] for key in SESSIONS for one in sources if isinstance(one.get(key), str | int)), None)
    if found in (None, ""):
        return None
    whose = [str(next((one[key] for one in (user, data) if one.get(key)), "")) for key in ("tenant_id", "user_id")]
    return "karen-" + hashlib.sha256("\0".join([*whose, str(found)]).encode()).hexdigest()[:40]


def remote_is_down(data: Json) -> bool:
    """Tell whether KAREN says that its remote model cannot be reached."""
    status = str(data.get("remote_status", "")).lower()
    return data.get("remote_available") is False or bool(data.get("remote_down")) or status in ("down", *FAILED)


# The supervisor

LONGEST_LINE = 1 << 20
MOST_BYTES = 16 << 20
FACTS_SECONDS = 30.0
"""How long what the supervisor says of a model and of its switches holds."""
MAX_BACK_OFF = 60.0


class Failure(Exception):
    """A request came to nothing. `down`: nothing answered at all."""

    def __init__(self, reason: str, *, status: int = 0, kind: str = "", down: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.kind = kind
        self.down = down


class Server:
    """HTTP to the supervisor, over asyncio streams: a connection for each request, so nothing outlives a cancel."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", url):
            raise ValueError(f"url must look like {DEFAULTS['url']}")
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._key = key
        name = parts.netloc.rpartition("@")[2]
        self._headers = [f"Host: {name}", "Connection: close", "Content-Type: application/json"]

    async def get(self, path: str, *, with_key: bool = True) -> Json:
        """Return the JSON object at `path`. Raises `Failure`."""
        pieces: list[bytes] = []
        await self.request("GET", path, None, pieces.append, with_key=with_key)
        try:
            answer = json.loads(b"".join(pieces))
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Failure("the supervisor's answer is broken JSON")
        return answer

    async def request(
        self, method: str, path: str, body: Json | None, take: Callable[[bytes], object], *, with_key: bool = True
    ) -> None:
        """Hand the body of a 200 to `take` as it comes. Raises `Failure`."""
        content = json.dumps(body).encode() if body is not None else b""
        lines = [f"{method} {self._path}{path} HTTP/1.1", *self._headers, f"Content-Length: {len(content)}"]
        lines += [f"Authorization: Bearer {self._key}"] if self._key and with_key else []
        writer: asyncio.StreamWriter | None = None
        answered = False
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=LONGEST_LINE)
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            await writer.drain()
            status, headers = await _head(reader)
            answered = True
            pieces: list[bytes] = []
            await _body(reader, headers, take if status == 200 else pieces.append)
        except Failure:
            raise
        except (OSError, EOFError, ValueError) as error:
            what = "the answer was cut" if answered else f"the supervisor does not answer ({type(error).__name__})"
            raise Failure(what, down=not answered) from error
        finally:
            if writer is not None:
                writer.close()
        if status != 200:
            raise self._refusal(status, b"".join(pieces))

    def _refusal(self, status: int, body: bytes) -> Failure:
        error: Any = None
        with contextlib.suppress(ValueError):
            error = json.loads(body)
        error = error.get("error") if isinstance(error, dict) else None
        message = str(error.get("message", "")) if isinstance(error, dict) else ""
        if self._key:
            message = message.replace(self._key, "***")
        kind = str(error.get("type", "")) if isinstance(error, dict) else ""
        return Failure(f"HTTP {status}" + (f": {message[:200]}" if message else ""), status=status, kind=kind)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return the status and the headers, names in lower case. Raises `ValueError` for what is no HTTP."""
    first = (await reader.readline()).decode("latin-1").split(" ", 2)
    if len(first) < 2 or not first[0].startswith("HTTP/1."):
        raise ValueError("no HTTP")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str], take: Callable[[bytes], object]) -> None:
    """Hand a body to `take`, whichever way it is framed. Raises `EOFError` when it is cut, `Failure` when too large."""
    size = 0
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while length := int((await reader.readline()).split(b";")[0], 16):
            size += length
            if size > MOST_BYTES:
                raise Failure("the answer is too large")
            take(await reader.readexactly(length))
            await reader.readexactly(2)
        return
    expected = int(headers["content-length"]) if "content-length" in headers else None
    while expected is None or size < expected:
        piece = await reader.read(1 << 16 if expected is None else min(1 << 16, expected - size))
        if not piece and expected is not None:
            raise EOFError
        if not piece:
            return
        size += len(piece)
        if size > MOST_BYTES:
            raise Failure("the answer is too large")
        take(piece)


class Watch:
    """Whether the supervisor answers: one short probe at a time, with back-off while it does not."""

    def __init__(
        self, probe: Callable[[], Awaitable[object]], timeout: float, interval: float, clock: Callable[[], float]
    ) -> None:
        self.up: bool | None = None
        self.reason = "not looked yet"
        self._probe = probe
        self._timeout = timeout
        self._interval = interval
        self._clock = clock
        self._due = -1e9
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    async def look(self, *, urgent: bool) -> bool:
        """Tell whether the supervisor is up. One that was down is waited for only when `urgent`."""
        if self._clock() < self._due:
            return bool(self.up)
        loop = asyncio.get_running_loop()
        task = self._task
        if task is None or task.done() or task.get_loop().is_closed():
            task = self._task = loop.create_task(self._run())
        elif task.get_loop() is not loop:
            return bool(self.up)
        if self.up is not False or urgent:
            await asyncio.wait([task])  # which, unlike awaiting it, leaves the probe alone when we are cancelled
        return bool(self.up)

    async def _run(self) -> None:
        try:
            await asyncio.wait_for(self._probe(), self._timeout)
        except asyncio.TimeoutError:  # noqa: UP041 (another one before Python 3.11)
            self.note(f"the supervisor does not answer within {self._timeout:g} s")
        except Failure as failure:
            self.note(failure.reason)
        else:
            self.note(None)

    def note(self, failure: str | None) -> None:
        """Remember that the supervisor answered, or why it did not."""
        now = self._clock()
        if failure is None:
            self.up, self.reason, self._failures, self._due = True, "", 0, now + self._interval
        elif self.up is not False or now >= self._due:  # fifty requests that fail at once are one failure
            self.up, self.reason = False, failure
            self._due = now + min(MAX_BACK_OFF, 2.0**self._failures)
            self._failures = min(self._failures + 1, 10)

    def close(self) -> None:
        """Give a running probe up."""
        if self._task is not None and not self._task.done() and not self._task.get_loop().is_closed():
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self._task = None


class Reply:
    """An answer as it comes: server-sent events in, text out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.text = ""
        self.model = ""
        self.finish = ""
        self.usage: Json | None = None
        self.done = False
        self.first: float | None = None
        self.remembered = False
        self._clock = clock
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Read a piece of the stream. Raises `Failure` for an error in it and for broken JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
                continue
            try:
                event = json.loads(payload)
            except ValueError:
                raise Failure("the supervisor's answer is broken JSON") from None
            if isinstance(event, dict):
                self._event(event)

    def _event(self, event: Json) -> None:
        if event.get("error"):
            raise Failure(f"the answer was broken off: {text_of(event['error'])[:200]}")
        self.model = str(event.get("model") or self.model)
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices")
        for choice in choices[:1] if isinstance(choices, list) else []:
            piece = text_of(choice.get("delta")) if isinstance(choice, dict) else ""
            if piece:
                self.first = self._clock() if self.first is None else self.first
                self.text += piece
            self.finish = str((choice.get("finish_reason") if isinstance(choice, dict) else "") or self.finish)


# The extension


class _StandIn(ABC):
    """What a host's ExtensionBase offers, for use outside KAREN."""

    def __init__(self, manifest: Any, context: Any) -> None:
        self.manifest = manifest
        self.context = context
        self.logger = logging.getLogger(f"extension.{getattr(manifest, 'name', 'llama-supervisor')}")

    @abstractmethod
    async def initialize(self) -> None: ...

    @abstractmethod
    async def shutdown(self) -> None: ...

    @abstractmethod
    async def execute_hook(self, hook_point: Any, context: Any) -> Json: ...


HOSTS = (
    "ai_karen_engine.extension_host.base",
    "ai_karen_engine.extensions.platform.core.host.base",
    "extensions.core.host.base",
)
"""Where the hosts of KAREN have their ExtensionBase."""


def bases() -> tuple[type, ...]:
    """Return what to inherit from: each ExtensionBase that is loaded, else the first to be found, else our own.

    A host checks for its own, and has loaded it. The newer host's module goes by two names, and then has two classes.
    """
    loaded = [module for name, module in list(sys.modules.items()) if name.endswith(HOSTS)]
    found = {getattr(module, "ExtensionBase", None) for module in loaded}
    classes = [one for one in found if isinstance(one, type)]
    for name in () if classes else HOSTS:
        with contextlib.suppress(Exception):  # outside KAREN, or in the other one
            classes.append(importlib.import_module(name).ExtensionBase)
            break
    lowest = [one for one in classes if not any(other is not one and issubclass(other, one) for other in classes)]
    return tuple(sorted(lowest, key=lambda one: one.__module__)) or (_StandIn,)


_Base: Any = types.new_class("_Base", bases())


class LlamaSupervisorExtension(_Base):  # type: ignore[misc]
    """Local answers for KAREN's prompts, by llama-supervisor."""

    def __init__(self, manifest: Any, context: Any) -> None:
        super().__init__(manifest, context)
        self._clock: Callable[[], float] = time.monotonic
        self._options: Json = dict(DEFAULTS)
        self._prompt = Prompt(PLAIN)
        self._server: Server | None = None
        self._watch: Watch | None = None
        self._starting: asyncio.Task[None] | None = None
        self._facts: dict[str, tuple[float, Json]] = {}

    # The host's calls

    async def initialize(self) -> None:
        """Read the options and look for the supervisor, once however often this is called."""
        if self._watch is not None:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.get_running_loop().create_task(self._start())
        await asyncio.wait([self._starting])

    async def _start(self) -> None:
        problems: list[str] = []
        try:
            self._options, self._prompt, self._server = await asyncio.to_thread(self._read, problems)
        except Exception as error:  # without its options it stays silent, as KAREN expects
            problems.append(f"not usable: {type(error).__name__}: {error}")
        for problem in problems:
            self.logger.warning("llama-supervisor: %s", problem)
        options = self._options
        watch = Watch(self._ping, options["probe_timeout_seconds"], options["probe_interval_seconds"], self._clock)
        self._watch = watch
        if options["policy"] != "off":
            await watch.look(urgent=True)

    async def shutdown(self) -> None:
        """Let everything go. `initialize` may follow."""
        if self._starting is not None:
            self._starting.cancel()
        self._starting = None
        if self._watch is not None:
            self._watch.close()
        self._watch = None
        self._facts.clear()

    async def execute_hook(self, hook_point: Any, context: Any) -> Json:
        """Do what a hook is for; return what was done, also written into `context.data`. Never raises."""
        began = self._clock()
        name = getattr(hook_point, "value", hook_point)
        try:
            if self._watch is None:
                await self.initialize()
            data = getattr(context, "data", None)
            user = getattr(context, "user_context", None)
            result = await self._hook(name, data, user if isinstance(user, dict) else {})
        except Exception as error:
            # KAREN would drop us without a word; a message could hold what users wrote
            self.logger.warning("llama-supervisor: %s failed: %s", name, type(error).__name__)
            self.logger.debug("llama-supervisor: %s failed", name, exc_info=True)
            result = {"local_inference_used": False, "reason": f"internal: {type(error).__name__}"}
        result["hook_ms"] = round((self._clock() - began) * 1000, 3)
        return result

    def _read(self, problems: list[str]) -> tuple[Json, Prompt, Server]:
        """Read config.json, prompt.txt and the key; runs in a thread."""
        folder = Path(getattr(self.context, "extension_dir", None) or Path(__file__).parent)
        stored: Json = {}
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no object")
            stored = found
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            problems.append(f"config.json: {type(error).__name__}")
        layers = [("the manifest", schema_defaults(self.manifest)), ("config.json", stored)]
        layers += [("the environment", from_environment()), ("the host", given(self.context))]
        options = merged(layers, problems)
        prompt = Prompt(PLAIN)
        try:
            prompt = Prompt((folder / "prompt.txt").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"prompt.txt: {type(error).__name__}")
        problems += [f"prompt.txt: there is no placeholder {name!r}" for name in prompt.unknown]
        return options, prompt, Server(options["url"], self._read_key(options["api_key_file"], problems))

    @staticmethod
    def _read_key(file: str, problems: list[str]) -> str:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key and file:
            try:
                key = Path(file).expanduser().read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                problems.append(f"api_key_file: {type(error).__name__}")
        key = key.strip()
        if re.search(r"[^\x21-\x7e]", key):
            problems.append("the API key holds characters that no key has")
            return ""
        return key

    async def _ping(self) -> None:
        if self._server is None:
            raise Failure("the configuration cannot be used; see the log")
        await self._server.get("/health", with_key=False)

    # The hooks

    async def _hook(self, name: Any, data: Any, user: Json) -> Json:
        if name not in (PRE, POST) or not isinstance(data, dict) or self._watch is None:
            return {"local_inference_used": False, "reason": "nothing to do at this hook"}
        options = self._options | for_this_call(data.get("local_options"))
        result: Json = {"policy": options["policy"], "local_inference_used": False}
        if options["policy"] == "off":
            return result | {"reason": "the policy is off"}
        hook = self._pre if name == PRE else self._post
        return result | await hook(options, data, user)

    async def _pre(self, options: Json, data: Json, user: Json) -> Json:
        """Answer before the remote model is asked, where the policy, the request or its state says so."""
        assert self._watch is not None
        hybrid = options["policy"] == "hybrid"
        wanted = hybrid or options["policy"] == "prefer_local" or bool(data.get("use_local")) or remote_is_down(data)
        if not await self._watch.look(urgent=wanted and remote_is_down(data)):
            return {"available": False, "reason": self._watch.reason}
        if not wanted:
            return {"available": True, "reason": "the remote model comes first"}
        budget = options["hybrid_budget_seconds"] if hybrid else options["budget_seconds"]
        local, reason = await self._local(options, data, user, budget)
        if local is None:
            return {"available": bool(self._watch.up), "reason": reason}
        data["local_inference"] = local
        if hybrid:
            self._offer(options, data, local["response"])
        return {"available": True, "local_inference_used": True, "local_inference": local, "reason": reason}

    async def _post(self, options: Json, data: Json, user: Json) -> Json:
        """Answer when the remote model did not; else combine both as configured."""
        assert self._watch is not None
        remote, failed = remote_result(data)
        local = data.get("local_inference")
        if not isinstance(local, dict) or not isinstance(local.get("response"), str) or not local["response"].strip():
            local = None
        reason = "the answer was made before the remote model was asked"
        if local is None and failed:
            if not await self._watch.look(urgent=True):
                return {"available": False, "reason": self._watch.reason}
            local, reason = await self._local(options, data, user, options["budget_seconds"], fallback=True)
        if local is None:
            return {"available": bool(self._watch.up), "reason": reason if failed else "the remote model answered"}
        how = "fallback" if failed else self._combination(options, data)
        if how in ("fallback", "local_first"):
            put_result(data, local["response"])
        elif how == "merge" and local["response"].strip() != remote:
            put_result(data, f"{remote}\n\n{local['response']}")
        told = {
            "local_inference_used": how != "remote_first",
            "local_model": local.get("model"),
            "local_timing": local.get("timing"),
            "local_truncated": bool(local.get("truncated")),
            "combination": how,
        }
        before = data.get("metadata")
        data["metadata"] = (before if isinstance(before, dict) else {}) | told
        return told | {"available": bool(self._watch.up), "local_inference": local, "reason": reason}

    @staticmethod
    def _combination(options: Json, data: Json) -> str:
        if options["combination"] != "auto":
            return str(options["combination"])
        return "local_first" if options["policy"] == "prefer_local" or data.get("use_local") else "remote_first"

    def _offer(self, options: Json, data: Json, text: str) -> None:
        """Offer a local answer to the remote model, in the prompt that it is about to get."""
        data["local_context"] = text
        if not options["offer_context"]:
            return
        said = self._prompt.tame(text, options["max_chars"])
        block = f"A local model suggests this; use what is right in it:\n<suggestion>\n{said}\n</suggestion>"
        key = next((key for key in (*TEXTS, HISTORIES[0]) if data.get(key)), None)
        if key is not None and isinstance(data[key], str):
            data[key] = f"{data[key]}\n\n{block}"
        elif key is not None and isinstance(data[key], list):
            data[key] = [*data[key][:-1], {"role": "system", "content": block}, *data[key][-1:]]

    # The local model

    async def _local(
        self, options: Json, data: Json, user: Json, budget: float, *, fallback: bool = False
    ) -> tuple[Json | None, str]:
        """Return the local model's answer within `budget` seconds, or None; and why."""
        assert self._watch is not None
        began = self._clock()
        reply = Reply(self._clock)
        message, history = prompt_of(data)
        if not message:
            return None, "there is no prompt in the data"
        body = self._body(options, data, message, history)
        session = session_of(data, user) if options["remember"] else None
        reason = "answered by the local model"
        try:
            await asyncio.wait_for(self._ask(body, session, reply, fallback), budget)
        except asyncio.TimeoutError:  # noqa: UP041 (another one before Python 3.11)
            reason = f"no whole local answer within {budget:g} s"
        except Failure as failure:
            reason = failure.reason
            if failure.down:
                self._watch.note(failure.reason)
        if not reply.text.strip():
            return None, reason if not reply.done else "the local model had nothing to say"
        if not reply.done and not options["keep_partial"]:
            return None, reason
        return self._told(reply, began, session), reason

    async def _ask(self, body: Json, session: str | None, reply: Reply, fallback: bool) -> None:
        """Fill `reply`. Raises `Failure`."""
        assert self._server is not None
        facts = await self._ask_facts(body["model"])
        if facts.get("integration_enabled") is False or (fallback and facts.get("enable_local_fallback") is False):
            raise Failure("switched off at the supervisor, by its section `karen`")
        remembers = bool(session and facts.get("atlas") and facts.get("context_awareness", True))
        try:
            await self._server.request(
                "POST",
                "/v1/chat/completions",
                body | ({"atlas": {"memory_file": session}} if remembers else {}),
                reply.take,
            )
        except Failure as failure:
            if not remembers or reply.text or not failure.kind.startswith("atlas"):
                raise
            remembers = False  # its memory cannot be used: an answer without it is better than none
            await self._server.request("POST", "/v1/chat/completions", body, reply.take)
        reply.remembered = remembers
        if not reply.done:
            raise Failure("the answer was cut")

    async def _ask_facts(self, model: str) -> Json:
        """Return what the supervisor says of itself and of a model; nothing where an old one does not know."""
        assert self._server is not None
        found = self._facts.get(model)
        if found is not None and self._clock() < found[0]:
            return found[1]
        try:
            facts = await self._server.get(f"/karen/config?model={quote(model, safe='')}")
        except Failure as failure:
            if failure.status not in (404, 405):
                raise
            facts = {}
        if len(self._facts) > 100:
            self._facts.clear()
        self._facts[model] = (self._clock() + FACTS_SECONDS, facts)
        return facts

    def _body(self, options: Json, data: Json, message: str, history: list[Json]) -> Json:
        """Return the request: the filled template around what was said before."""
        limit, prompt = options["max_chars"], self._prompt
        memories: Any = next((data[key] for key in MEMORIES if data.get(key)), [])
        listed = memories if isinstance(memories, list | tuple) else [memories]
        lines = [prompt.tame(text_of(one), limit) for one in listed[: options["max_memories"]]]
        values = {
            "persona": prompt.tame(text_of(data.get("persona")) or options["persona"], limit),
            "local_knowledge": prompt.tame(text_of(data.get("local_knowledge")) or options["local_knowledge"], limit),
            "limits": options["limits"],
            "memories": "\n".join(f"- {line}" for line in lines if line)[:limit],
            "message": prompt.tame(message, limit),
        }
        said = [(one.get("role"), prompt.tame(text_of(one), limit)) for one in history]
        system = [prompt.fill(prompt.system, values), *(text for role, text in said if role == "system")]
        turns: list[Json] = []
        for role, text in reversed([one for one in said if one[0] != "system"]):
            limit -= len(text)
            if limit < 0:
                break  # what was said before that is not sent
            speaker = "assistant" if role in ("assistant", "ai", "bot") else "user"
            turns.insert(0, {"role": speaker, "content": text})
        head = "\n\n".join(filter(None, system))
        messages = [{"role": "system", "content": head}] if head else []
        return {
            "model": options["model"],
            "messages": [*messages, *turns, {"role": "user", "content": prompt.fill(prompt.user, values)}],
            "max_tokens": options["max_tokens"],
            "temperature": options["temperature"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _told(self, reply: Reply, began: float, session: str | None) -> Json:
        now = self._clock()
        timing = {"total_seconds": round(now - began, 4)}
        if reply.first is not None:
            timing["first_token_seconds"] = round(reply.first - began, 4)
        told: Json = {"response": reply.text.strip(), "model": reply.model, "timing": timing}
        told |= {"finish_reason": reply.finish or None, "truncated": not reply.done, "usage": reply.usage}
        return told | ({"memory_file": session} if reply.remembered else {})
