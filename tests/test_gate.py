"""API keys at the front, over HTTP, with children that say what reached them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import gguf_files
import pytest
from memory_files import memory_file
from test_access import World

from supervisor import api_keys
from supervisor.app import Supervisor, supervisor
from supervisor.config import Config
from supervisor.process import announce, is_loopback
from supervisor.routes.gate import NEEDS, name_of, needs
from supervisor.settings import Settings

FAKE = Path(__file__).with_name("fake_echo_server.py")
CHAT = "/v1/chat/completions"


class Front:
    """A supervisor over two models, its keys, and a client."""

    def __init__(self, running: Supervisor, http: aiohttp.ClientSession, world: World) -> None:
        self.supervisor = running
        self.http = http
        self.world = world

    async def ask(
        self, method: str, path: str, key: str | None = None, body: Any = None, **headers: str
    ) -> tuple[int, Any, aiohttp.typedefs.LooseHeaders]:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = self.supervisor.urls[0] + path
        async with self.http.request(method, url, json=body, headers=named) as response:
            text = await response.text()
            try:
                return response.status, json.loads(text), response.headers
            except ValueError:
                return response.status, text, response.headers

    async def seen(self, key: str | None = None, model: str = "one", **headers: str) -> dict[str, str]:
        """Return the headers that reach the child, in lower case."""
        status, answer, _ = await self.ask("POST", CHAT, key, {"model": model}, **headers)
        assert status == 200, answer
        names = [name.lower() for name, _ in answer["headers"]]
        assert len(names) == len(set(names))
        return {name.lower(): value for name, value in answer["headers"]}

    async def key(self, name: str, **more: object) -> str:
        """Add or change a key and let the supervisor see it."""
        secret = self.world.put(name, **more)
        await self.supervisor.access.look()
        return secret


@pytest.fixture
async def begin(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Return a function that starts the supervisor with these settings of `api`, and of `inference`."""
    async with AsyncExitStack() as stack:

        async def start(inference: dict[str, Any] | None = None, **api: object) -> Front:
            folder = short_tmp / "models"
            folder.mkdir()
            for name in ("one", "two"):
                (folder / f"{name}.gguf").write_bytes(gguf_files.gguf(gguf_files.llama()))
            binary = short_tmp / "fake"
            binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
            binary.chmod(0o755)
            world = World(short_tmp / "keys.json")
            monkeypatch.setattr(api_keys, "path_of", lambda api: world.path)  # also where it is the default
            own = {"aliases": ["uno"], "args": ["--slot-save-path", str(short_tmp)]}
            config = {
                "server": {"port": 0, "llama_server": binary, "runtime_dir": short_tmp / "run", "drain_seconds": 1},
                "models": {"directory": folder, "settle_seconds": 0, "overrides": {"one": own}},
                "atlas": {"memory_directory": short_tmp / "memory"},
                "logging": {"directory": short_tmp / "logs"},
                "api": {"keys_file": world.path} | api,
                "inference": inference or {},
            }
            settings = Settings(Config.model_validate(config), None, short_tmp, {})
            running = await stack.enter_async_context(supervisor(settings))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            return Front(running, http, world)

        yield start


@pytest.fixture
async def front(begin) -> Front:
    return await begin()


@pytest.fixture
async def open_front(begin) -> Front:
    return await begin(require_keys=False)


def error(answer: Any) -> tuple[str, str]:
    return answer["error"]["type"], answer["error"]["code"]


# Who gets in


def routes_of(front: Front) -> list[tuple[str, str]]:
    runner = front.supervisor._runner
    assert runner is not None
    return [(route.method, route.resource.canonical) for route in runner.app.router.routes() if route.resource]


async def test_every_route_says_what_it_needs(front):
    routes = routes_of(front)
    assert len(routes) > 80
    table = needs()
    for method, path in routes:
        if method != "OPTIONS":
            assert name_of(method, path) in table, f"routes/gate.py: what does {method} {path} need?"
    listed = [name for names in NEEDS.values() for name in re.split(r"\s{2,}", names.strip())]
    assert len(listed) == len(table), "a route is listed twice"


async def test_without_a_key_only_what_is_open_answers(front):
    table = needs()
    for method, canonical in routes_of(front):
        if method in ("HEAD", "*"):
            continue
        path = canonical.replace("{id}", "one").replace("{id_slot}", "0")
        need = "nothing" if method == "OPTIONS" else table[name_of(method, canonical)]
        for key in (None, "lsk-wrong"):
            status, answer, headers = await front.ask(method, path, key, {"model": "one"})
            if need in ("nothing", "list"):
                assert status == 200, (method, path, answer)
            else:
                assert status == 401, (method, path)
                assert headers["WWW-Authenticate"] == "Bearer"
                if path.startswith("/v1/messages"):
                    assert answer["error"]["type"] == "authentication_error"
                else:
                    assert error(answer) == ("invalid_request_error", "invalid_api_key")
    for method, path in (("GET", "/nothing"), ("GET", CHAT), ("POST", "/health"), ("PUT", "/v1/models")):
        status, answer, _ = await front.ask(method, path)
        assert status == 401, path
        assert not front.supervisor.fleet.running()


async def test_scopes_decide(front):
    keys = {scope: await front.key(scope, scopes=[scope]) for scope in ("infer", "manage", "admin")}
    asks = {
        ("POST", "/tokenize"): {"infer"},
        ("GET", "/v1/atlas/status"): {"infer"},
        ("GET", "/slots"): {"manage"},
        ("GET", "/metrics"): {"manage"},
        ("POST", "/props"): {"manage"},
        ("GET", "/props"): {"infer"},
        ("GET", "/api/v1/status"): {"manage"},
        ("POST", "/models/load"): {"manage"},
        ("POST", "/tools"): set(),
        ("GET", "/"): {"infer", "manage"},
        ("GET", "/v1/models?reload=1"): {"manage"},
    }
    for (method, path), scopes in asks.items():
        for scope, key in keys.items():
            status, answer, _ = await front.ask(method, path, key, {"model": "one"})
            if scope in scopes or scope == "admin":
                assert status == 200, (path, scope, answer)
            else:
                assert status == 403, (path, scope, answer)
                assert error(answer) == ("permission_error", "missing_scope")
    assert (await front.ask("GET", "/v1/models?reload=1"))[0] == 401
    assert (await front.ask("GET", "/nothing", keys["infer"]))[0] == 404
    status, answer, _ = await front.ask("POST", "/v1/messages", keys["manage"], {"model": "one"})
    assert (status, answer["error"]["type"]) == (403, "permission_error")


async def test_both_headers_are_understood(front):
    key = await front.key("a")
    body = {"model": "one"}
    assert (await front.ask("POST", "/v1/messages", None, body, x_api_key=key))[0] == 200
    assert (await front.ask("POST", "/v1/messages", None, body, X_API_KEY=key))[0] == 200
    assert (await front.ask("POST", "/v1/messages", None, body, Authorization=f"bearer {key}"))[0] == 200
    assert (await front.ask("POST", "/v1/messages", None, body, Authorization=key))[0] == 401
    assert (await front.ask("POST", "/v1/messages", "wrong", body, x_api_key=key))[0] == 401
    assert (await front.ask("POST", f"/v1/messages?key={key}", None, body))[0] == 401


async def test_models(front):
    key = await front.key("a", models=["uno"], scopes=["infer", "manage"])
    assert (await front.ask("POST", CHAT, key, {"model": "one"}))[0] == 200
    assert (await front.ask("POST", CHAT, key, {"model": "uno"}))[0] == 200
    assert (await front.ask("POST", CHAT, key, {}))[0] == 200  # the default
    refused = [
        ("POST", CHAT, {"model": "two"}),
        ("POST", "/tokenize?model=two", {}),
        ("GET", "/props?model=two", None),
        ("GET", "/slots?model=two", None),
        ("GET", "/v1/models/two", None),
        ("POST", "/models/load", {"model": "two"}),
        ("POST", "/models/unload", {"model": "two"}),
        ("GET", "/api/v1/models/two/logs", None),
    ]
    for method, path, body in refused:
        status, answer, _ = await front.ask(method, path, key, body)
        assert status == 403, path
        assert error(answer) == ("permission_error", "model_not_allowed")
        assert answer["error"]["param"] == "model"
    assert front.supervisor.fleet.running() == ["one"]


async def test_the_list_shows_what_one_may_see(front):
    await front.ask("POST", "/models/load", await front.key("m", scopes=["manage"]), {"model": "one"})
    keys = {
        "nobody": (None, {"one", "two"}, False),
        "wrong": ("lsk-wrong", {"one", "two"}, False),
        "infer": (await front.key("i"), {"one", "two"}, False),
        "one of them": (await front.key("o", models=["two"]), {"two"}, False),
        "manage": (await front.key("m", scopes=["manage"]), {"one", "two"}, True),
    }
    for who, (key, models, details) in keys.items():
        for path in ("/v1/models", "/models"):
            _, answer, _ = await front.ask("GET", path, key)
            auto = {"auto"} if path == "/v1/models" and "one" in models else set()  # which is the default
            assert {model["id"] for model in answer["data"]} == models | auto, who
            assert all(("path" in model) == details for model in answer["data"]), who
            assert any("args" in model["status"] for model in answer["data"]) == details, who
        name = next(iter(models))
        _, answer, _ = await front.ask("GET", f"/v1/models/{name}", key)
        assert ("path" in answer) == details


async def test_the_list_may_need_a_key(begin):
    front = await begin(open_models=False)
    key = await front.key("a", models=["two"])
    for path in ("/v1/models", "/models", "/v1/models/two"):
        assert (await front.ask("GET", path))[0] == 401
        assert (await front.ask("GET", path, key))[0] == 200
    assert (await front.ask("GET", "/health"))[0] == 200


async def test_without_keys_everything_is_as_before(open_front):
    await open_front.key("a")
    for key in (None, "wrong"):
        assert (await open_front.ask("POST", CHAT, key, {"model": "one"}))[0] == 200
        assert (await open_front.ask("GET", "/api/v1/status", key))[0] == 200
        assert "path" in (await open_front.ask("GET", "/v1/models?reload=1", key))[1]["data"][0]
    seen = await open_front.seen(Authorization="Bearer x", x_api_key="y")
    assert (seen["authorization"], seen["x-api-key"]) == ("Bearer x", "y")  # a child may have a key of its own


async def test_a_running_supervisor_takes_over_new_and_revoked_keys(front):
    assert (await front.ask("POST", CHAT, "x", {"model": "one"}))[0] == 401
    secret = front.world.put("a")
    await until(lambda: front.ask("POST", CHAT, secret, {"model": "one"}), 200)
    front.world.drop("a")
    await until(lambda: front.ask("POST", CHAT, secret, {"model": "one"}), 401)


async def until(ask: Any, status: int) -> None:
    end = time.monotonic() + 30
    while (await ask())[0] != status:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_a_stream_goes_on_when_its_key_is_revoked(front):
    key = await front.key("a")
    body = {"model": "one", "say": ["data: 1\n\n"] * 50, "type": "text/event-stream"}
    url, headers = front.supervisor.urls[0] + CHAT, {"Authorization": f"Bearer {key}"}
    async with front.http.post(url, json=body, headers=headers) as response:
        await response.content.readany()
        front.world.drop("a")
        await front.supervisor.access.look()
        assert (await front.ask("POST", CHAT, key, body))[0] == 401
        rest = await response.text()
    assert rest.endswith("data: 1\n\n")


# What children see


@pytest.mark.parametrize("name", ["X-Atlas-Owner", "x-atlas-owner", "X-ATLAS-OWNER"])
async def test_nobody_names_the_owner_but_the_supervisor(begin, name):
    front = await begin()
    key = await front.key("a", owner="theowner")
    seen = await front.seen(key, **{name: "someone"})
    assert seen["x-atlas-owner"] == "theowner"
    connection = await front.seen(key, **{name: "someone", "Connection": "x-atlas-owner, keep-alive"})
    assert connection["x-atlas-owner"] == "theowner"


async def test_without_keys_nobody_names_an_owner(open_front):
    assert "x-atlas-owner" not in await open_front.seen(X_Atlas_Owner="someone")
    assert "x-atlas-owner" not in await open_front.seen(x_atlas_owner="someone")


async def test_keys_stay_here(front):
    key = await front.key("a")
    seen = await front.seen(key, x_api_key=key, X_More="kept")
    assert seen["x-more"] == "kept"
    assert not any(key in value for value in seen.values())
    assert not {"authorization", "x-api-key"} & seen.keys()
    _, answer, _ = await front.ask("OPTIONS", CHAT, key, x_api_key=key, X_Atlas_Owner="someone")
    assert key not in str(answer)
    assert "someone" not in str(answer)


async def test_keys_are_nowhere_in_logs_and_errors(front, caplog, short_tmp):
    caplog.set_level(logging.DEBUG)
    key = await front.key("a", models=["one"], requests_per_minute=2)
    for secret in (key, key[:-1] + "-"):
        for body in ({"model": "one"}, {"model": "two"}, {"model": "none"}, {"model": 1}):
            _, answer, headers = await front.ask("POST", CHAT, secret, body, x_api_key=secret)
            assert secret not in str(answer) + str(headers)
    logs = caplog.text + "".join(path.read_text() for path in (short_tmp / "logs").iterdir())
    assert key[:-1] not in logs


async def test_memory_files_of_a_model_that_does_not_run_are_their_keys_own(front, short_tmp):
    mine, theirs = await front.key("mine"), await front.key("theirs")
    folder = short_tmp / "memory" / "one"
    for part in ("mine", "theirs", "."):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{part.strip('.')}book.atlas").write_bytes(memory_file())
    path = "/v1/atlas/memory"
    for key, name in ((mine, "minebook"), (theirs, "theirsbook")):
        _, answer, _ = await front.ask("GET", f"{path}?model=one", key, X_Atlas_Owner="mine")
        assert [one["file"] for one in answer["files"]] == [f"{name}.atlas"]
    for name in ("minebook", "book"):
        assert (await front.ask("GET", f"{path}/info?model=one&file={name}", theirs))[0] == 404
        assert (await front.ask("DELETE", f"{path}?model=one&file={name}", theirs))[0] == 404
    assert (await front.ask("GET", f"{path}?model=two", await front.key("one", models=["one"])))[0] == 403
    assert (await front.ask("DELETE", f"{path}?model=one&file=minebook", mine))[0] == 200
    assert {file.name for file in folder.rglob("*.atlas")} == {"theirsbook.atlas", "book.atlas"}
    assert not front.supervisor.fleet.children


# Limits


async def test_requests_are_limited_per_key(front):
    busy, other = await front.key("busy", requests_per_minute=2), await front.key("other")
    for _ in range(2):
        assert (await front.ask("POST", CHAT, busy, {"model": "one"}))[0] == 200
    status, answer, headers = await front.ask("POST", CHAT, busy, {"model": "one"})
    assert status == 429
    assert error(answer) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(headers["Retry-After"]) <= 30
    status, answer, _ = await front.ask("POST", "/v1/messages", busy, {"model": "one"})
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert (await front.ask("GET", "/v1/models", busy))[0] == 200
    assert (await front.ask("POST", CHAT, other, {"model": "one"}))[0] == 200


USAGE = '"usage": {"prompt_tokens": 90, "completion_tokens": 11, "total_tokens": 101}}'


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ({"say": ['{"choices": [], ' + USAGE]}, -1),
        (
            {
                "say": ['data: {"a": 1}\n\n', "data: {" + USAGE + "\n\n", "data: [DONE]\n\n"],
                "type": "text/event-stream",
            },
            -1,
        ),
        ({"say": ['{"error": 1, ' + USAGE], "status": 400}, 100),
        ({"say": ['{"tokens": [1, 2]}']}, 100),
    ],
    ids=["whole", "stream", "error", "tells nothing"],
)
async def test_tokens_are_counted(front, body, left):
    key = await front.key("a", tokens_per_minute=100)
    caller = front.supervisor.access.identify({"Authorization": f"Bearer {key}"})
    caller._clock = lambda: 0.0  # before its bucket was made: nothing flows in
    await front.ask("POST", CHAT, key, {"model": "one"} | body)
    assert round(caller._tokens._level) == left
    status, answer, headers = await front.ask("POST", CHAT, key, {"model": "one"})
    if left > 0:
        assert status == 200
    else:
        assert (status, error(answer)) == (429, ("rate_limit_error", "rate_limit_exceeded"))
        assert headers["Retry-After"] == "2"  # until one of 100 a minute is there: 2 of 0.6 s


async def test_a_client_that_leaves_pays_for_what_it_got(front):
    key = await front.key("a", tokens_per_minute=1000)
    body = {"model": "one", "say": ["data: 1\n\n"] * 5, "type": "text/event-stream", "hang": True}
    url, headers = front.supervisor.urls[0] + CHAT, {"Authorization": f"Bearer {key}"}
    caller = front.supervisor.access.identify(headers)
    caller._clock = lambda: 0.0  # before its bucket was made: nothing flows in
    async with front.http.post(url, json=body, headers=headers) as response:
        got = b""
        while got.count(b"data: ") < 5:
            got += await response.content.readany()
        size = len(json.dumps(body))
        assert caller._tokens._level == 1000
        response.close()
    for _ in range(500):
        await asyncio.sleep(0.01)
        if caller._tokens._level != 1000:
            break
    assert caller._tokens._level == 1000 - 5 - size // 4


# Conversations


async def test_conversations_are_their_keys_own(front):
    mine, theirs = await front.key("mine"), await front.key("theirs")
    heir = await front.key("heir", owner="mine")
    start = {"X_Conversation_Id": "talk"}
    assert (await front.ask("POST", CHAT, mine, {"model": "one"}, **start))[0] == 200
    status, answer, _ = await front.ask("POST", CHAT, theirs, {"model": "one"}, **start)
    assert (status, error(answer)[1]) == (409, "conversation_in_use")
    for key, status in ((mine, 200), (heir, 200), (theirs, 404)):
        assert (await front.ask("GET", "/v1/stream?conv_id=talk", key))[0] == status
    await front.ask("POST", CHAT, theirs, {"model": "one"}, X_Conversation_Id="other")
    assert (await front.ask("GET", "/v1/stream?conv_id=other&conv_id=talk", theirs))[0] == 404
    assert (await front.ask("GET", "/v1/stream?conv_id=talk&model=one", theirs))[0] == 404
    assert (await front.ask("GET", "/v1/stream?conv_id=unknown&model=one", theirs))[0] == 404
    assert (await front.ask("DELETE", "/v1/stream?conv_id=talk", theirs))[0] == 204
    found = [{"conversation_id": "talk"}, {"conversation_id": "other"}, {"conversation_id": "unknown"}]
    lookup = {"conversation_ids": ["talk"], "say": [json.dumps(found)]}
    for key, names in ((mine, ["talk"]), (theirs, ["other"])):
        _, answer, _ = await front.ask("POST", "/v1/streams/lookup", key, lookup)
        assert [one["conversation_id"] for one in answer] == names
    assert (await front.ask("GET", "/v1/stream?conv_id=talk", mine))[0] == 200


async def test_a_conversation_from_before_there_were_keys_may_go_on(begin):
    front = await begin(keys_file=None, require_keys=None)
    assert (await front.ask("POST", CHAT, None, {"model": "one"}, X_Conversation_Id="talk"))[0] == 200
    key = await front.key("a")
    assert (await front.ask("POST", CHAT, None, {"model": "one"}, X_Conversation_Id="talk"))[0] == 401
    assert (await front.ask("GET", "/v1/stream?conv_id=talk", key))[0] == 404
    assert (await front.ask("POST", CHAT, key, {"model": "one"}, X_Conversation_Id="talk"))[0] == 200
    assert (await front.ask("GET", "/v1/stream?conv_id=talk", key))[0] == 200


async def test_without_keys_conversations_are_everybodys(open_front):
    assert (await open_front.ask("POST", CHAT, "a", {"model": "one"}, X_Conversation_Id="talk"))[0] == 200
    assert (await open_front.ask("POST", CHAT, "b", {"model": "one"}, X_Conversation_Id="talk"))[0] == 200
    assert (await open_front.ask("GET", "/v1/stream?conv_id=talk", "b"))[0] == 200


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(url, loopback):
    assert is_loopback(f"http://{url}:8080") is loopback


async def test_the_start_warns_when_no_key_is_good(front, caplog):
    announce(front.supervisor)
    assert "no API key is valid yet" in caplog.text


async def test_the_status_tells_of_a_bad_file(front):
    key = await front.key("a", scopes=["manage"])
    front.world.write("{")
    await front.supervisor.access.look()
    _, status, _ = await front.ask("GET", "/api/v1/status", key)
    assert status["keys_required"] is True
    assert [problem for problem in status["problems"] if str(front.world.path) in problem]
