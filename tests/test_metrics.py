"""What /metrics and /readyz say, and which request a log line is about."""

from __future__ import annotations

import asyncio
import json
import logging
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_gate import CHAT, Front

from supervisor import logs, request_id
from supervisor.config import LoggingSection
from supervisor.entry import State
from supervisor.errors import StartFailed
from supervisor.metrics import labelled
from supervisor.scheduler import Limits, Scheduler
from supervisor.usage import Tokens, told

pytest_plugins = ["test_gate"]

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(front: Front) -> Values:
    status, text, headers = await front.ask("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples), "a series appears twice"
    return values


def value(values: Values, name: str, **labels: str) -> float:
    return values[f"llama_supervisor_{name}", frozenset(labels.items())]


# The metrics


async def test_requests_are_counted(open_front):
    say = json.dumps(
        {"usage": {"prompt_tokens": 30, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 5}}}
    )
    for model in ("one", "uno", "two"):
        status, _, _ = await open_front.ask("POST", CHAT, None, {"model": model, "say": [say[:20], say[20:]]})
        assert status == 200
    event = 'data: {"timings":{"cache_n":1,"prompt_n":2,"predicted_n":3}}\n\n'
    body = {"model": "one", "say": [event, "data: [DONE]\n\n"], "type": "text/event-stream"}
    assert (await open_front.ask("POST", CHAT, None, body))[0] == 200
    assert (await open_front.ask("POST", CHAT, None, {"model": "one", "status": 400}))[0] == 400
    assert (await open_front.ask("POST", CHAT, None, {"model": "none"}))[0] == 404
    found = await scrape(open_front)
    assert value(found, "requests_total", model="one", route=CHAT, status="200") == 3
    assert value(found, "requests_total", model="two", route=CHAT, status="200") == 1
    assert value(found, "requests_total", model="one", route=CHAT, status="400") == 1
    assert value(found, "errors_total", code="model_not_found") == 1
    assert [value(found, "tokens_total", model="one", kind=kind) for kind in Tokens._fields] == [52, 11, 19]
    assert value(found, "queue_seconds_count", model="one") == 4
    assert value(found, "request_seconds_count", model="one") == 4
    assert value(found, "time_to_first_token_seconds_count", model="one") == 1
    assert value(found, "model_load_seconds_count", model="one") == 1
    assert value(found, "model_starts_total", model="two") == 1
    assert value(found, "requests_in_flight", model="one") == 0
    assert value(found, "model_state", model="one", state="ready") == 1
    assert value(found, "model_memory_bytes", model="one") > 1 << 20
    assert ("process_resident_memory_bytes", frozenset()) in found


async def test_a_client_that_leaves_is_counted(open_front):
    body = {"model": "one", "hang": True, "say": []}
    asking = asyncio.create_task(open_front.ask("POST", CHAT, None, body))
    scheduler = open_front.supervisor.fleet.scheduler
    async with asyncio.timeout(10):
        while not scheduler.entry("one").leases:
            await asyncio.sleep(0.01)
        assert value(await scrape(open_front), "requests_in_flight", model="one") == 1
        asking.cancel()
        while scheduler.entry("one").leases:
            await asyncio.sleep(0.01)
    found = await scrape(open_front)
    counts = {
        status: found.get(
            ("llama_supervisor_requests_total", frozenset({"model": "one", "route": CHAT, "status": status}.items()))
        )
        for status in ("200", "499")
    }
    assert 1 in counts.values()


async def test_a_scrape_neither_loads_a_model_nor_keeps_it(open_front):
    assert (await open_front.ask("POST", CHAT, None, {"model": "one"}))[0] == 200
    entries = open_front.supervisor.fleet.scheduler.entries
    before = entries["one"].last_used
    found = await scrape(open_front)
    assert value(found, "model_scraped", model="one") == 1  # the fake child answers with JSON, which is no metric
    assert not [labels for name, labels in found if ("model", "two") in labels]
    assert entries["one"].last_used == before
    assert (await open_front.ask("GET", "/metrics?model=two"))[0] == 503
    assert "two" not in open_front.supervisor.fleet.children


async def test_of_one_model_the_answer_is_its_own(open_front):
    assert (await open_front.ask("POST", CHAT, None, {"model": "one"}))[0] == 200
    status, answer, _ = await open_front.ask("GET", "/metrics?model=uno")
    assert (status, answer["target"]) == (200, "/metrics?model=uno")


def test_the_series_of_several_children_are_one_family_each():
    text = (
        "# HELP llamacpp:n_decode_total Calls.\n# TYPE llamacpp:n_decode_total counter\nllamacpp:n_decode_total 3\n"
        "# HELP llamacpp:n_tokens_max Most.\n# TYPE llamacpp:n_tokens_max counter\nllamacpp:n_tokens_max 7\n"
        'llamacpp:odd{model="x",quoted="a\\"b"} 1\n'
    )
    families = labelled({"a": text, 'b"\\': text, "broken": "llamacpp:odd{ 1\n"})
    assert [(one.name, one.type) for one in families] == [
        ("llamacpp:n_decode", "counter"),
        ("llamacpp:n_tokens_max", "unknown"),
        ("llamacpp:odd", "unknown"),
    ]
    assert [(s.name, s.labels, s.value) for s in families[1].samples] == [
        ("llamacpp:n_tokens_max", {"model": "a"}, 7),
        ("llamacpp:n_tokens_max", {"model": 'b"\\'}, 7),
    ]
    assert families[2].samples[0].labels == {"model": "a", "quoted": 'a"b'}


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"usage": {"prompt_tokens": 12, "total_tokens": 12}}, (12, 0, 0)),
        ({"usage": {"input_tokens": 20, "cache_read_input_tokens": 4, "output_tokens": 8}}, (20, 4, 8)),
        (
            {"usage": {"input_tokens": 20, "output_tokens": 8, "total_tokens": 28, "d": {"cached_tokens": 4}}},
            (16, 4, 8),
        ),
        ({"usage": {"prompt_tokens": 1}, "timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3}}, (2, 1, 3)),
        ({"tokens": [1]}, (0, 0, 0)),
        ({"usage": "none", "timings": None}, (0, 0, 0)),
    ],
)
def test_what_an_answer_tells(answer, tokens):
    text = json.dumps(answer).encode()
    assert told(text, b"") == told(b"", text) == told(text, text) == tokens


def test_anthropics_streams_tell_at_both_ends():
    assert told(b'{"usage": {"input_tokens": 2, "output_tokens": 0}}', b'{"usage": {"output_tokens": 9}}') == (2, 0, 9)


def test_the_scheduler_counts_what_happens_to_models():
    s = Scheduler(Limits(max_loaded=1))
    s.request(1, "a", 0)
    s.ready("a", 1)
    s.release(1, 2)
    s.request(2, "b", 3)
    s.stopped("a", 4)
    s.failed("b", StartFailed("boom"), 5)
    a, b = s.entry("a"), s.entry("b")
    assert (a.starts, a.made_room, a.idled_out, a.restarts, a.start_failures) == (1, 1, 0, 0, 0)
    assert (b.starts, b.made_room, b.start_failures) == (1, 0, 1)
    a.idle_unload = 1
    s.request(3, "a", 6)
    s.ready("a", 7)
    s.release(3, 8)
    s.tick(9)
    assert (a.starts, a.idled_out, a.made_room) == (2, 1, 1)


# Readiness


async def readiness(front: Front) -> tuple[int, dict]:
    status, answer, _ = await front.ask("GET", "/readyz")
    return status, answer


async def test_ready(open_front):
    status, answer = await readiness(open_front)
    assert (status, answer["status"]) == (200, "ok")
    assert {one["status"] for one in answer["components"].values()} == {"ok"}
    open_front.supervisor.catalog.problems.append("a folder cannot be read")
    status, answer = await readiness(open_front)
    assert (status, answer["components"]["models"]["status"]) == (200, "degraded")


async def test_who_has_no_key_learns_no_names(front):
    front.supervisor.catalog.problems.append("/srv/secret cannot be read")
    status, answer = await readiness(front)
    assert (status, answer["components"]["models"]) == (200, {"status": "degraded"})
    assert "secret" not in json.dumps(answer)


async def test_not_ready_without_a_llama_server(open_front):
    open_front.supervisor.fleet.launch.binary = lambda: None
    status, answer = await readiness(open_front)
    assert (status, answer["status"], answer["components"]["llama_server"]["status"]) == (
        503,
        "unavailable",
        "degraded",
    )


async def test_not_ready_when_a_child_is_left_alone(open_front):
    """As after an error that nobody foresaw: its task is gone, and it would be `starting` for ever."""
    fleet = open_front.supervisor.fleet
    fleet.scheduler.entry("one").state = State.STARTING
    status, answer = await readiness(open_front)
    fleet.scheduler.entry("one").state = State.ABSENT
    assert status == 503
    assert answer["components"]["scheduler"]["problems"] == ["nobody looks after model 'one', which is starting"]


async def test_not_ready_when_nothing_wakes_the_scheduler(open_front):
    assert (await open_front.ask("POST", CHAT, None, {"model": "one"}))[0] == 200
    entry = open_front.supervisor.fleet.scheduler.entry("one")
    entry.idle_unload = 1000.0
    status, answer = await readiness(open_front)
    assert status == 503
    assert answer["components"]["scheduler"]["problems"] == [
        "nothing wakes the scheduler when its next decision is due"
    ]


async def test_not_ready_while_shutting_down(open_front):
    open_front.supervisor.fleet.scheduler.closing = True
    status, answer = await readiness(open_front)
    assert (status, answer["components"]["scheduler"]["problems"]) == (503, ["the supervisor is shutting down"])


def test_what_is_overdue():
    s = Scheduler(Limits(max_loaded=1, queue_timeout=10, drain=5))
    s.request(1, "a", 0)
    assert s.overdue(9) == []
    assert s.overdue(10) == ["a request for model 'a' waits for longer than inference.queue_timeout_seconds"]
    s.entry("a").state = State.ABSENT
    assert s.overdue(9) == ["model 'a' could start and does not"]
    s.entry("a").state = State.STARTING
    s.ready("a", 9)
    s.unload("a", 10)
    assert s.overdue(14) == []
    assert s.overdue(15) == ["model 'a' still drains though its time is over"]


# Ids and the log


async def test_a_request_id_goes_to_the_child_and_back(open_front):
    url = open_front.supervisor.urls[0] + CHAT
    for sent, stays in (("mine-1", True), ("with space", False), ("x" * 129, False), (None, False)):
        headers = {"X-Request-ID": sent} if sent else {}
        async with open_front.http.post(url, json={"model": "one"}, headers=headers) as response:
            seen = [value for name, value in (await response.json())["headers"] if name.lower() == "x-request-id"]
            assert seen == response.headers.getall("X-Request-Id")
            assert (seen == [sent]) == stays
            assert len(seen) == 1


async def test_errors_have_the_id_too(front):
    for status, path in ((401, "/v1/models/x"), (404, "/nothing")):
        front.supervisor.access.on = status == 401
        _, _, headers = await front.ask("GET", path, X_Request_Id="mine")
        assert headers["X-Request-Id"] == "mine"


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]):
    """Return what gives the log's lines since the last time; the handler is taken away afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level

    def read() -> list[str]:
        return capsys.readouterr().err.splitlines()

    yield read
    root.handlers = before
    root.setLevel(level)


async def test_log_lines_say_which_request_they_are_about(lines, open_front):
    logs.set_up(LoggingSection(level="debug", format="json"))
    assert (await open_front.ask("POST", CHAT, None, {"model": "one"}, X_Request_Id="mine"))[0] == 200
    mine = [line for line in map(json.loads, lines()) if line.get("request_id") == "mine"]
    assert any(line["message"].startswith(f"POST {CHAT}: 200 from model one after ") for line in mine)
    assert {"time", "level", "logger", "message"} <= mine[0].keys()


async def test_what_is_no_http_is_not_logged(lines, open_front):
    logs.set_up(LoggingSection(level="debug"))
    url = urlsplit(open_front.supervisor.urls[0])
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"\x16\x03\x01 what\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert not [line for line in lines() if "Traceback" in line or "Error handling" in line]


def test_text_and_json(lines):
    log = logging.getLogger("supervisor.test")
    logs.set_up(LoggingSection(level="info"))
    log.info("plain")
    token = request_id._current.set("mine")
    log.info("about one")
    logs.set_up(LoggingSection(level="info", format="json"))
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("with a\nreason")
    request_id._current.reset(token)
    log.debug("not shown")
    text, about, structured = lines()
    assert text.endswith("INFO    plain")
    assert about.endswith("INFO    about one [mine]")
    found = json.loads(structured)
    assert (found["level"], found["request_id"], found["message"]) == ("error", "mine", "with a\nreason")
    assert "ValueError: bad" in found["error"]
