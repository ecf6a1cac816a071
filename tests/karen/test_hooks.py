"""What both hooks do: when the local model is asked, how its answer is combined, and how each failure ends."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
from karen_host import Host, names_of

from karen.scripted import Scripted, events

Json = dict[str, Any]

REMOTE = "The remote says so."
LOCAL = "Hello there"
NAME = "llama-supervisor"


async def chat(host: Host, data: Json, remote: Any = None, user: Json | None = None) -> Json:
    """One turn of chat; return what the extension said of it."""
    result: Json = (await host.chat(data, remote, user))[NAME]
    assert "error" not in result
    return result


async def pre(host: Host, data: Json, user: Json | None = None) -> Json:
    result: Json = (await host.run("pre_llm_prompt", data, user))[NAME]
    assert "error" not in result
    return result


# Policies


async def test_off_does_nothing(host_of, scripted):
    host = await host_of(url=scripted.url, policy="off")
    data = {"prompt": "Hi", "result": ""}
    await chat(host, data)
    assert data == {"prompt": "Hi", "result": ""}
    assert (scripted.probes, scripted.seen) == (0, [])


async def test_fallback_leaves_a_good_remote_answer_alone(host_of, scripted):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi"}
    result = await chat(host, data, REMOTE)
    assert data == {"prompt": "Hi", "result": REMOTE}
    assert (result["available"], result["local_inference_used"], scripted.seen) == (True, False, [])


async def test_fallback_answers_when_the_remote_failed(host_of, scripted):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi", "metadata": {"trace": 1}}
    result = await chat(host, data, {"error": "timeout", "content": None})
    assert data["result"] == {"content": LOCAL}
    told = data["metadata"]
    assert (told["trace"], told["local_inference_used"], told["local_model"]) == (1, True, "tiny")
    assert told["local_timing"]["total_seconds"] >= told["local_timing"]["first_token_seconds"] >= 0
    assert (told["combination"], told["local_truncated"]) == ("fallback", False)
    assert result["local_inference"]["usage"]["total_tokens"] == 9


@pytest.mark.parametrize(
    "said",
    [
        {"use_local": True},
        {"remote_available": False},
        {"remote_down": True},
        {"remote_status": "DOWN"},
        {"local_options": {"policy": "prefer_local"}},
    ],
)
async def test_fallback_asks_first_where_the_remote_is_down_or_the_request_says_so(host_of, scripted, said):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi"} | said
    result = await pre(host, data)
    assert result["local_inference_used"] is True
    assert data["local_inference"]["response"] == LOCAL
    await chat(host, data)
    assert data["result"] == LOCAL


async def test_prefer_local_answers_before_the_remote(host_of, scripted):
    host = await host_of(url=scripted.url, policy="prefer_local")
    data: Json = {"prompt": "Hi"}
    await chat(host, data, REMOTE)
    assert data["result"] == LOCAL
    assert data["metadata"]["combination"] == "local_first"
    assert len(scripted.seen) == 1  # the second hook takes what the first one made


@pytest.mark.parametrize("key", ["prompt", "messages"])
async def test_hybrid_offers_its_answer_to_the_remote(host_of, scripted, key):
    host = await host_of(url=scripted.url, policy="hybrid")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    data: Json = {key: "Hi" if key == "prompt" else messages}
    await pre(host, data)
    assert data["local_context"] == LOCAL
    offered = data[key] if key == "prompt" else data[key][-2]["content"]
    assert f"<suggestion>\n{LOCAL}\n</suggestion>" in offered
    assert key == "prompt" or data[key][-1] == messages[-1]
    await host.run("post_llm_result", data | {"result": REMOTE})
    assert data.get("result") in (None, REMOTE)


async def test_hybrid_need_not_touch_the_prompt(host_of, scripted):
    host = await host_of(url=scripted.url, policy="hybrid", offer_context=False)
    data: Json = {"prompt": "Hi"}
    await pre(host, data)
    assert (data["prompt"], data["local_context"]) == ("Hi", LOCAL)


async def test_hybrid_goes_on_without_an_answer_in_its_time(host_of, scripted):
    scripted.answers = [[]]
    scripted.wait["chat"] = asyncio.Event()
    host = await host_of(url=scripted.url, policy="hybrid", hybrid_budget_seconds=0.05, budget_seconds=600)
    data: Json = {"prompt": "Hi"}
    assert (await pre(host, data))["reason"] == "no whole local answer within 0.05 s"
    assert data == {"prompt": "Hi"}


# Combinations


@pytest.mark.parametrize(
    ("combination", "policy", "expected"),
    [
        ("auto", "hybrid", REMOTE),
        ("auto", "prefer_local", LOCAL),
        ("remote_first", "prefer_local", REMOTE),
        ("local_first", "hybrid", LOCAL),
        ("merge", "prefer_local", f"{REMOTE}\n\n{LOCAL}"),
    ],
)
async def test_combinations(host_of, scripted, combination, policy, expected):
    host = await host_of(url=scripted.url, policy=policy, combination=combination)
    data: Json = {"prompt": "Hi"}
    await chat(host, data, REMOTE)
    assert data["result"] == expected
    assert data["metadata"]["local_inference_used"] is (expected != REMOTE)
    data = {"prompt": "Hi"}
    await chat(host, data)
    assert (data["result"], data["metadata"]["combination"]) == (LOCAL, "fallback")


async def test_a_request_for_a_local_answer_gets_it(host_of, scripted):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi", "use_local": True}
    await chat(host, data, REMOTE)
    assert data["result"] == LOCAL


async def test_merge_of_the_same_answer_is_that_answer(host_of, scripted):
    host = await host_of(url=scripted.url, policy="prefer_local", combination="merge")
    data: Json = {"prompt": "Hi"}
    await chat(host, data, LOCAL)
    assert data["result"] == LOCAL


async def test_a_call_changes_what_it_may_and_nothing_else(host_of, scripted):
    host = await host_of(url=scripted.url, policy="off")
    options = {"policy": "prefer_local", "model": "other", "max_tokens": 3, "temperature": "hot"}
    options |= {"url": "http://127.0.0.1:9", "api_key_file": "/etc/hostname", "combination": 5}
    await chat(host, {"prompt": "Hi", "local_options": options})
    [body] = scripted.seen
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", 3, 0.7)
    await chat(host, {"prompt": "Hi"})  # only that call
    assert len(scripted.seen) == 1


# What KAREN hands over


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "Hi"},
        {"llm_prompt": "Hi"},
        {"message": "Hi"},
        {"user_message": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"message": {"content": "Hi"}},
        {"prompt": "", "user_message": "Hi"},
        {"message": "Hi", "history": [{"role": "user", "content": "Hi"}]},
    ],
)
async def test_aliases_of_the_prompt(host_of, scripted, data):
    data = dict(data)
    host = await host_of(url=scripted.url)
    await chat(host, data)
    assert [one["role"] for one in scripted.seen[0]["messages"]] == ["system", "user"]
    assert scripted.seen[0]["messages"][-1]["content"] == "Hi"
    assert data["result"] == LOCAL


async def test_what_was_said_before_goes_along(host_of, scripted):
    host = await host_of(url=scripted.url, max_chars=100)
    said = [
        {"role": "user", "content": "x" * 99},
        {"role": "assistant", "content": "y" * 50},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who?"},
        {"role": "ai", "content": "Me."},
    ]
    await chat(host, {"message": "And now?", "conversation_history": said, "persona": {"content": "Karen"}})
    system, *turns = scripted.seen[0]["messages"]
    assert system["content"].startswith("You are Karen.")
    assert system["content"].endswith("Be kind.")
    assert [one["content"] for one in turns] == ["y" * 50, "Who?", "Me.", "And now?"]  # the oldest had no room
    assert [one["role"] for one in turns] == ["assistant", "user", "assistant", "user"]


@pytest.mark.parametrize("key", ["result", "llm_response", "response"])
@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("", LOCAL),
        ("  \n", LOCAL),
        (None, LOCAL),
        ({}, {"content": LOCAL}),
        ({"content": ""}, {"content": LOCAL}),
        ({"text": "half", "success": False}, {"text": LOCAL}),
        ({"response": "x", "status": "timeout", "id": 7}, {"response": LOCAL, "id": 7}),
        (TimeoutError(), LOCAL),
        (
            {"choices": []},
            {
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": LOCAL}, "finish_reason": "stop"},
                ]
            },
        ),
    ],
)
async def test_aliases_and_shapes_of_a_failed_result(host_of, scripted, key, remote, expected):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi", key: remote}
    await chat(host, data)
    assert data[key] == expected
    assert {"result", "llm_response", "response"} & set(data) == {key}


@pytest.mark.parametrize("error", ["error", "llm_error", "remote_error"])
async def test_an_error_beside_the_result_is_a_failure(host_of, scripted, error):
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi", "response": "Sorry.", error: "429"}
    await chat(host, data)
    assert data["response"] == LOCAL


@pytest.mark.parametrize(
    "remote",
    [
        REMOTE,
        {"content": REMOTE},
        {"choices": [{"message": {"content": REMOTE}}]},
        {"message": {"content": REMOTE}},
        {"text": REMOTE, "success": True, "error": None},
        SimpleNamespace(content=REMOTE, error=print, status="ok"),
    ],
)
async def test_a_good_result_is_known_in_every_shape(host_of, scripted, remote):
    host = await host_of(url=scripted.url)
    assert (await chat(host, {"prompt": "Hi"}, remote))["reason"] == "the remote model answered"
    assert scripted.seen == []


@pytest.mark.parametrize("data", [{}, {"prompt": 5}, {"messages": []}, {"messages": "x"}, {"messages": [None, {}]}])
async def test_data_without_a_prompt_are_left_alone(host_of, scripted, data):
    host = await host_of(url=scripted.url)
    before = dict(data)
    if "x" not in str(data):
        assert (await chat(host, data))["local_inference_used"] is False
        assert data == before


@pytest.mark.parametrize("data", [None, [], "text", 7])
async def test_data_that_are_no_object(host_of, scripted, data):
    host = await host_of(url=scripted.url)
    assert (await host.run("post_llm_result", data))[NAME]["local_inference_used"] is False


# Failures: KAREN goes on, unchanged


async def test_down_changes_nothing_and_is_looked_at_again_later(host_of, scripted):
    await scripted.stop()
    host = await host_of(url=scripted.url)
    extension = host.loaded[0]
    now = [1000.0]
    extension._watch._clock = lambda: now[0]
    extension._watch._due = 0.0
    for step, tries in ((0.0, 1), (0.5, 1), (2.5, 2), (3.0, 2), (8.0, 3)):
        now[0] = 1000.0 + step
        data: Json = {"prompt": "Hi", "result": {"error": "x"}}
        result = await chat(host, data)
        assert (result["available"], data) == (False, {"prompt": "Hi", "result": {"error": "x"}})
        assert extension._watch._failures == tries + 1, step  # one was at the start
    await scripted.start()
    assert (await chat(host, {"prompt": "Hi"}))["available"] is False  # not yet due
    now[0] += 60
    data = {"prompt": "Hi"}
    assert (await chat(host, data))["local_inference_used"] is True
    assert data["result"] == LOCAL


async def test_the_first_hook_does_not_wait_for_one_that_was_down(host_of, scripted):
    await scripted.stop()
    host = await host_of(url=scripted.url, policy="prefer_local", probe_timeout_seconds=10)
    await scripted.start()
    scripted.wait["health"] = asyncio.Event()
    watch = host.loaded[0]._watch
    watch._due = 0.0
    for _ in range(3):
        assert (await pre(host, {"prompt": "Hi"}))["available"] is False
    scripted.wait["health"].set()
    await asyncio.wait([watch._task])
    assert (scripted.probes, scripted.most_busy) == (1, 1)
    assert (await pre(host, {"prompt": "Hi"}))["available"] is True


async def test_a_probe_that_hangs_is_given_up(host_of, scripted):
    scripted.wait["health"] = asyncio.Event()
    host = await host_of(url=scripted.url, probe_timeout_seconds=0.01)
    result = await chat(host, {"prompt": "Hi"})
    assert result["reason"] == "the supervisor does not answer within 0.01 s"


async def test_fifty_hooks_share_one_probe(host_of, scripted):
    host = await host_of(url=scripted.url, probe_interval_seconds=3600)
    host.loaded[0]._watch._due = 0.0
    scripted.wait["health"] = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, scripted.wait["health"].set)
    datas: list[Json] = [{"prompt": f"Hi {n}"} for n in range(50)]
    results = await asyncio.gather(*(chat(host, data) for data in datas))
    assert all(result["local_inference_used"] for result in results)
    assert all(data["result"] == LOCAL for data in datas)
    assert (scripted.probes, scripted.most_busy) == (2, 1)  # one was at the start
    assert sorted(body["messages"][-1]["content"] for body in scripted.seen) == sorted(d["prompt"] for d in datas)


SLOW = "no whole local answer within 0.2 s"


@pytest.mark.parametrize(
    ("answer", "wait", "reason"),
    [
        ([], "chat", SLOW),
        ((401, {"message": "the API key is not valid"}), "", "HTTP 401: the API key is not valid"),
        ((404, {"message": "model 'x' not found"}), "", "HTTP 404: model 'x' not found"),
        ((429, {"message": "too many"}), "", "HTTP 429: too many"),
        ((500, "no envelope"), "", "HTTP 500"),
        (["data: {broken\n\n"], "", "the supervisor's answer is broken JSON"),
        (["data: 5\n\n", "data: [1]\n\n", 'data: {"choices": [5, {}]}\n\n'], "", "the answer was cut"),
        ([], "cut", "the answer was cut"),
        (events("  "), "", "the local model had nothing to say"),
        (['data: {"error": {"message": "it died"}}\n\n'], "", "the answer was broken off: it died"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_failures_change_nothing(host_of, scripted, answer, wait, reason):
    scripted.answers = [answer]
    if wait:
        scripted.wait[wait] = asyncio.Event()
    budget = 0.2 if reason == SLOW else 60
    host = await host_of(url=scripted.url, policy="prefer_local", budget_seconds=budget)
    data: Json = {"prompt": "Hi", "response": {"error": "x"}}
    first = await pre(host, data)
    second = await chat(host, data)
    for result in (first, second):
        assert (result["local_inference_used"], result["reason"]) == (False, reason)
        assert "local_inference" not in result
    assert data == {"prompt": "Hi", "response": {"error": "x"}}


@pytest.mark.parametrize("how", ["slow", "cut", "error"])
async def test_what_came_of_an_answer_is_better_than_none(host_of, scripted, how):
    pieces = events("It begins", done=False)[:1]
    if how == "error":
        pieces.append('data: {"error": {"message": "it died"}}\n\n')
    else:
        scripted.wait["chat" if how == "slow" else "cut"] = asyncio.Event()
    scripted.answers = [pieces]
    host = await host_of(url=scripted.url, budget_seconds=2 if how == "slow" else 60)
    data: Json = {"prompt": "Hi"}
    result = await chat(host, data)
    assert (data["result"], data["metadata"]["local_truncated"]) == ("It begins", True)
    assert result["reason"] != "answered by the local model"
    data = {"prompt": "Hi", "local_options": {"keep_partial": False}}
    assert (await chat(host, data))["local_inference_used"] is False


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 2_000_000,
    ],
    ids=range(6),
)
async def test_something_else_answers(host_of, raw):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host = await host_of(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    data: Json = {"prompt": "Hi", "result": ""}
    assert (await chat(host, data))["local_inference_used"] is False
    assert data == {"prompt": "Hi", "result": ""}
    server.close()


async def test_an_endless_answer_is_too_large(host_of, scripted):
    scripted.answers = [[f": {'x' * (1 << 20)}\n"] * 20]
    host = await host_of(url=scripted.url)
    assert (await chat(host, {"prompt": "Hi"}))["reason"] == "the answer is too large"


async def test_a_cancelled_hook_leaves_nothing_behind(host_of, scripted):
    scripted.wait["chat"] = asyncio.Event()
    host = await host_of(url=scripted.url, budget_seconds=600)
    before = asyncio.all_tasks()
    data: Json = {"prompt": "Hi"}
    host.timeout = 0.2
    assert await host.run("post_llm_result", data) == {}
    assert data == {"prompt": "Hi"}
    async with asyncio.timeout(10):
        while {task for task in asyncio.all_tasks() if "Watch" in repr(task) or "_ask" in repr(task)} - before:
            await asyncio.sleep(0.01)


async def test_an_error_of_ours_is_kept_in(host_of, scripted, caplog):
    host = await host_of(url=scripted.url)

    class Odd(dict[str, Any]):
        def get(self, *args: Any) -> Any:
            raise RuntimeError("the user's secret")

    with caplog.at_level(logging.WARNING):
        result = (await host.run("post_llm_result", Odd()))[NAME]
    assert result["reason"] == "internal: RuntimeError"
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


# The supervisor's word


async def test_it_can_be_switched_off_at_the_supervisor(host_of, scripted):
    scripted.facts = {"integration_enabled": False}
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi"}
    result = await chat(host, data)
    assert ("switched off" in result["reason"], data, scripted.seen) == (True, {"prompt": "Hi"}, [])
    scripted.facts = {"integration_enabled": True, "enable_local_fallback": False}
    host.loaded[0]._facts.clear()
    assert (await chat(host, {"prompt": "Hi"}))["local_inference_used"] is False
    assert (await pre(host, {"prompt": "Hi", "use_local": True}))["local_inference_used"] is True  # that is no fallback


async def test_a_supervisor_without_that_route_serves_as_well(host_of, scripted):
    scripted.facts = None
    host = await host_of(url=scripted.url)
    assert (await chat(host, {"prompt": "Hi", "session_id": "s"}))["local_inference_used"] is True
    assert "atlas" not in scripted.seen[0]


# Sessions


async def sessions(host: Host, scripted: Scripted, *turns: tuple[Json, Json]) -> list[Any]:
    for data, user in turns:
        await chat(host, {"prompt": "Hi"} | data, user=user)
    return [body.get("atlas") for body in scripted.seen]


async def test_a_conversation_is_a_memory_of_its_own(host_of, scripted):
    host = await host_of(url=scripted.url)
    ada, bob = {"user_id": "ada"}, {"user_id": "bob"}
    turns = [({"conversation_id": "../c1"}, ada), ({"session_id": "../c1"}, ada), ({}, ada | {"session_id": "../c1"})]
    others = [
        ({"conversation_id": "../c1"}, bob),
        ({"conversation_id": 2}, ada),
        ({"tenant_id": "t"} | turns[0][0], ada),
    ]
    found = await sessions(host, scripted, *turns, *others)
    names = [one["memory_file"] for one in found]
    assert all(re.fullmatch(r"karen-[0-9a-f]{40}", name) for name in names)
    assert len(set(names[:3])) == 1
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("facts", "options", "data"),
    [
        ({"atlas": False}, {}, {"session_id": "s"}),
        ({"atlas": None}, {}, {"session_id": "s"}),
        ({}, {}, {"session_id": "s"}),
        ({"atlas": True, "context_awareness": False}, {}, {"session_id": "s"}),
        ({"atlas": True}, {"remember": False}, {"session_id": "s"}),
        ({"atlas": True}, {}, {}),
        ({"atlas": True}, {}, {"session_id": ""}),
        ({"atlas": True}, {}, {"session_id": ["s"]}),
    ],
)
async def test_no_memory_without_support_or_a_conversation(host_of, scripted, facts, options, data):
    scripted.facts = facts
    host = await host_of(url=scripted.url, **options)
    assert await sessions(host, scripted, (data, {})) == [None]


async def test_an_answer_without_its_memory_is_better_than_none(host_of, scripted):
    broken = (400, {"message": "corruption", "type": "atlas_memory_error"})
    scripted.answers = [broken, events("Hello", " there")]
    host = await host_of(url=scripted.url)
    data: Json = {"prompt": "Hi", "session_id": "s"}
    await chat(host, data)
    assert data["result"] == LOCAL
    assert ["atlas" in body for body in scripted.seen] == [True, False]


# Options and secrets


async def test_each_layer_wins_over_the_ones_before(extensions, scripted, monkeypatch):
    folder = extensions / "llama_supervisor"
    manifest = json.loads((folder / "extension_manifest.json").read_text())
    manifest["config_schema"]["properties"]["max_tokens"]["default"] = 11
    (folder / "extension_manifest.json").write_text(json.dumps(manifest))

    async def value(config: Json | None = None) -> int:
        host = Host(extensions, "A", config)
        extension = await host.start()
        await host.stop()
        return int(extension._options["max_tokens"])

    monkeypatch.setenv("LLAMACPP_KAREN_URL", scripted.url)
    assert await value() == 11
    (folder / "config.json").write_text('{"max_tokens": 12}')
    assert await value() == 12
    monkeypatch.setenv("LLAMACPP_KAREN_MAX_TOKENS", "13")
    assert await value() == 13
    assert await value({"max_tokens": 14}) == 14


async def test_what_cannot_be_used_is_named_and_left_out(extensions, scripted, caplog, monkeypatch):
    (extensions / "llama_supervisor" / "config.json").write_text("{")
    (extensions / "llama_supervisor" / "prompt.txt").write_text("{{ persona }} {{ nobody }}")
    monkeypatch.setenv("LLAMACPP_KAREN_KEEP_PARTIAL", "perhaps")
    config = {"policy": "maybe", "max_tokens": 0, "api_key": "lsk-secret", "nonsense": 1, "url": scripted.url}
    config |= {"temperature": None, "model": 5, "budget_seconds": True, "max_chars": "1e999"}
    host = Host(extensions, "A", config)
    extension = await host.start()
    defaults = names_of(extension).DEFAULTS
    assert {key: value for key, value in extension._options.items() if value != defaults[key]} == {"url": scripted.url}
    for name in (
        "policy",
        "max_tokens",
        "'api_key'",
        "'nonsense'",
        "keep_partial",
        "temperature",
        "model",
        "max_chars",
    ):
        assert name in caplog.text
    assert "config.json: JSONDecodeError" in caplog.text
    assert "no placeholder 'nobody'" in caplog.text
    assert "lsk-secret" not in caplog.text
    assert (await chat(host, {"prompt": "Hi"}))["local_inference_used"] is True
    await host.stop()


async def test_a_bad_address_is_a_supervisor_that_is_down(host_of, caplog):
    host = await host_of(url="ftp://x y")
    assert "url must look like" in caplog.text
    assert (await chat(host, {"prompt": "Hi"}))["available"] is False


@pytest.mark.parametrize("source", ["variable", "file"])
async def test_the_key_is_sent_and_never_told(host_of, scripted, monkeypatch, tmp_path, caplog, source):
    secret = "lsk-0123456789"
    (tmp_path / "key").write_text(f"{secret}\n")
    if source == "variable":
        monkeypatch.setenv("LLAMACPP_KAREN_API_KEY", secret)
    scripted.answers = [(401, {"message": f"the key {secret} is not valid"}), events(LOCAL)]
    options = {"api_key_file": str(tmp_path / "key")} if source == "file" else {}
    with caplog.at_level(logging.DEBUG):
        host = await host_of(url=scripted.url, **options)
        refused = await chat(host, {"prompt": "Hi"})
        answered = await chat(host, {"prompt": "Hi"})
    assert [headers["Authorization"] for headers in scripted.headers] == [f"Bearer {secret}"] * 2
    assert refused["reason"] == "HTTP 401: the key *** is not valid"
    assert secret not in caplog.text + str(refused) + str(answered)


async def test_fifty_hooks_before_it_is_initialized(extensions, scripted):
    host = Host(extensions, "A", {"url": scripted.url})
    host.load(extensions / "llama_supervisor")
    datas: list[Json] = [{"prompt": "Hi"} for _ in range(50)]
    await asyncio.gather(*(chat(host, data) for data in datas))
    assert all(data["result"] == LOCAL for data in datas)
    assert scripted.probes == 1
    await host.stop()


async def test_initialize_and_shutdown_may_come_in_any_number(host_of, scripted):
    host = await host_of(url=scripted.url)
    extension = host.loaded[0]
    assert scripted.probes == 1
    await extension.shutdown()
    await extension.shutdown()
    assert (await chat(host, {"prompt": "Hi"}))["local_inference_used"] is True  # it starts again by itself
    await extension.initialize()
    assert scripted.probes == 2
