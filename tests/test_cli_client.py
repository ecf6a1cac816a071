"""Do the commands that ask a running supervisor say the right thing, with the right exit code?"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import Fake, Reply, as_json, event, listing, model, progress, reply, run, start_process

from supervisor.errors import ConfigInvalid, InvalidApiKey, ModelNotFound

LONG = "a-very-long-model-name-" * 8 + "Q4_K_M"
NOT_FOUND = reply(ModelNotFound("tiyn", ["tiny"], 1).body(), 404)


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("COLUMNS", "80")
    for name in list(os.environ):
        if name.startswith("LLAMA_SUPERVISOR_"):
            monkeypatch.delenv(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- commands that ask a supervisor ---------------------------------------------------------------------------------

STATUS: dict[str, Any] = {
    "version": "0.1.0", "pid": 7, "uptime_seconds": 4000.5, "state": "running", "config": None,
    "addresses": ["http://127.0.0.1:8080"], "native": {"path": "/x/llama-server", "build": "b11434", "ours": False},
    "models_directory": "/m", "problems": ["models folder \x1b[31m is slow"], "loaded": 1, "max_loaded": 3,
    "restart_needed": ["server.port"],
    "models": [
        {"id": LONG, "state": "ready", "leases": 2, "waiting": 1, "pid": 9,
         "queue": [{"position": 1, "waited_seconds": 2.5, "priority": "normal"}],
         "rss_bytes": 3 << 29, "idle_seconds": 0.2,
         "restarts": 0, "error": None, "pinned": True},
        {"id": "[red]b", "state": "starting", "progress": 0.5, "stage": "text_model", "leases": 0, "waiting": 0,
         "pid": None, "rss_bytes": None, "idle_seconds": None, "restarts": 1, "error": None},
        {"id": "c", "state": "failed", "error": "exit code 1; its last lines:\nbad \x1b[2J magic"},
    ],
}  # fmt: skip


def test_status(fake: Fake) -> None:
    fake.routes["GET /api/v1/status"] = reply(STATUS)
    result = run("status", "--url", fake.url)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "Supervisor:    0.1.0, running for 1 h 6 min, pid 7" in lines
    assert "llama-server:  /x/llama-server build b11434 (not ours)" in lines
    assert f"{LONG}  ready, pinned" in result.stdout
    assert "  1 (2.5 s)  " in result.stdout
    assert "[red]b" in result.stdout
    assert "starting text_model 50%" in result.stdout
    assert "    bad \\x1b[2J magic" in lines
    assert "New start for: server.port" in lines
    assert "\x1b" not in result.stdout
    assert as_json(run("status", "--json", "--url", fake.url)) == STATUS


def test_status_of_an_idle_supervisor_with_few_fields(fake: Fake) -> None:
    fake.routes["GET /api/v1/status"] = reply({"version": "9", "state": "draining"})
    result = run("status", "--url", fake.url)
    assert result.exit_code == 0
    assert "No model runs" in result.stdout


def test_models(fake: Fake) -> None:
    broken = model("broken", "invalid", error="not a GGUF file")
    shown = model(LONG, "loading", progress=0.25, context_length=2048, architecture_name="llama", quantization="Q4_K_M")
    fake.routes["GET /v1/models"] = listing(shown, broken)
    fake.routes["GET /v1/models?reload=1"] = listing({**shown, "aliases": [LONG, "smol"]})
    result = run("models", "--url", fake.url)
    lines = result.stdout.splitlines()
    assert lines[1].split() == [LONG, "loading", "25%", "1.0", "GiB", "2048", "llama", "Q4_K_M"]
    assert lines[-1] == "broken: not a GGUF file"
    assert run("models", "--reload", "--url", fake.url).stdout.splitlines()[1].endswith("  smol")
    assert as_json(run("models", "--json", "--url", fake.url)) == {"models": [shown, broken]}
    fake.routes["GET /v1/models"] = listing()
    assert "pull" in run("models", "--url", fake.url).stdout


def test_url_from_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.routes["GET /v1/models"] = listing()
    monkeypatch.setenv("LLAMA_SUPERVISOR_URL", f"{fake.url.removeprefix('http://')}/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert run("models").exit_code == 0


def sse(fake: Fake, *events: str, ready: Callable[[Fake], None] = lambda _: None) -> None:
    """Script a load: the events come once the load has been asked for."""
    asked = threading.Event()

    def load(_: Fake, body: dict[str, Any]) -> Reply:
        asked.set()
        return reply({"success": True})

    def stream(_: Fake, body: dict[str, Any]) -> Iterator[str]:
        yield ": hello\n\n"
        assert asked.wait(10)
        yield from events
        ready(fake)

    fake.routes["GET /models/sse"] = stream
    fake.routes["POST /models/load"] = load


def test_load_waits_until_the_model_is_ready(fake: Fake) -> None:
    fake.routes["GET /v1/models"] = listing(model("tiny", aliases=["tiny", "t"]))
    sse(
        fake,
        event("other", status="unloaded", failed=True, error="not ours"),
        event("tiny", status="unloaded"),
        event("tiny", status="loading", progress=progress(1)),
        "data: no json\n\n",
        event("tiny", status="loading", progress=None),
        event("tiny", status="loaded"),
    )
    result = run("load", "t", "--url", fake.url)
    assert (result.exit_code, result.stderr) == (0, "Loading tiny: 100 % (100/100, 0:00)\n")
    assert result.stdout.startswith("tiny is ready (")
    assert ("POST /models/load", {"model": "tiny"}) in fake.seen
    document = as_json(run("load", "tiny", "--json", "--url", fake.url))
    assert (document["model"], document["status"]) == ("tiny", "loaded")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"status": "unloaded", "failed": True, "error": "model 'tiny': exit code 1"}, "model 'tiny': exit code 1"),
        ({"status": "unloaded", "failed": True, "error": "out of memory"}, "model 'tiny': out of memory"),
        ({"status": "unloaded"}, "model 'tiny' was unloaded while it loaded"),
    ],
)  # fmt: skip
def test_load_that_fails(fake: Fake, last: dict[str, Any], message: str) -> None:
    fake.routes["GET /v1/models"] = listing(model("tiny", "failed", failed=True, error="an older failure"))
    sse(fake, event("tiny", status="loading", progress=progress(0.1)), event("tiny", **last))
    result = run("load", "tiny", "--url", fake.url)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {message}"
    result = run("load", "tiny", "--json", "--url", fake.url)
    assert (result.exit_code, as_json(result)["error"]["message"]) == (1, message)


def test_load_goes_on_when_the_event_stream_breaks(fake: Fake) -> None:
    def now_loaded(server: Fake) -> None:
        server.routes["GET /v1/models"] = listing(model("tiny", "loaded"))

    fake.routes["GET /v1/models"] = listing(model("tiny"))
    sse(fake, ready=now_loaded)
    assert run("load", "tiny", "--url", fake.url).exit_code == 0

    def now_failed(server: Fake) -> None:
        server.routes["GET /v1/models"] = listing(model("tiny", "failed", failed=True, error="no memory"))

    fake.routes["GET /v1/models"] = listing(model("tiny"))
    sse(fake, ready=now_failed)
    result = run("load", "tiny", "--url", fake.url)
    assert (result.exit_code, result.stderr) == (1, "Error: model 'tiny': no memory\n")


def test_load_without_an_event_stream(fake: Fake) -> None:
    def load(server: Fake, body: dict[str, Any]) -> Reply:
        server.routes["GET /v1/models"] = listing(model("tiny", "loaded"))
        return reply({"success": True})

    fake.routes["GET /v1/models"] = listing(model("tiny"))
    fake.routes["POST /models/load"] = load
    assert run("load", "tiny", "--url", fake.url).exit_code == 0


def test_load_refused(fake: Fake) -> None:
    fake.routes["GET /v1/models"] = listing(model("tiny"), model("broken", "invalid"))
    fake.routes["POST /models/load"] = NOT_FOUND
    result = run("load", "tiyn", "--url", fake.url)
    assert (result.exit_code, result.stderr) == (4, "Error: model 'tiyn' not found; did you mean 'tiny'?\n")
    error = as_json(run("load", "tiyn", "--json", "--url", fake.url))["error"]
    assert (error["code"], error["near"], error["status"]) == ("model_not_found", ["tiny"], 404)
    refusal = {
        "error": {
            "message": "cannot be loaded",
            "type": "invalid_request_error",
            "code": "model_invalid",
            "param": "model",
        }
    }
    fake.routes["POST /models/load"] = reply(refusal, 422)
    assert run("load", "broken", "--url", fake.url).exit_code == 1
    assert run("load", "tiny", "--url", fake.url).exit_code == 1


def test_load_without_waiting(fake: Fake) -> None:
    fake.routes["GET /v1/models"] = listing(model("tiny"))
    fake.routes["POST /models/load"] = reply({"success": True})
    result = run("load", "tiny", "--no-wait", "--url", fake.url)
    assert (result.exit_code, result.stdout) == (0, "tiny is loading\n")
    assert "GET /models/sse" not in [path for path, _ in fake.seen]


def test_unload(fake: Fake) -> None:
    fake.routes["POST /models/unload"] = reply({"success": True})
    assert run("unload", "tiny", "--url", fake.url).stdout == "tiny is being unloaded\n"
    document = as_json(run("unload", "--force", "tiny", "--json", "--url", fake.url))
    assert document == {"model": "tiny", "status": "unloading"}
    assert [body for _, body in fake.seen] == [{"model": "tiny", "force": False}, {"model": "tiny", "force": True}]
    fake.routes["POST /models/unload"] = NOT_FOUND
    assert run("unload", "tiyn", "--url", fake.url).exit_code == 4


def test_logs(fake: Fake) -> None:
    fake.routes["GET /api/v1/models/a%2Fb%20c/logs?lines=2"] = (200, "text/plain", "one\ntwo é\x1b[0m\n")
    fake.routes["GET /api/v1/models/tiny/logs?lines=100&follow=1"] = iter(["one\nt", "wo\n"])
    assert run("logs", "-n", "2", "a/b c", "--url", fake.url).stdout == "one\ntwo é\x1b[0m\n"
    document = as_json(run("logs", "-n", "2", "a/b c", "--json", "--url", fake.url))
    assert document == {"model": "a/b c", "lines": ["one", "two é\x1b[0m"]}
    assert run("logs", "-f", "tiny", "--url", fake.url).stdout == "one\ntwo\n"
    fake.routes["GET /api/v1/models/tiyn/logs?lines=100"] = NOT_FOUND
    assert run("logs", "tiyn", "--url", fake.url).exit_code == 4


@pytest.mark.parametrize("command", [["status"], ["models"], ["load", "m"], ["unload", "m"], ["logs", "m"]])
def test_nobody_answers(command: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run(*command, "--url", url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(
        f"Error: no supervisor answers at {url} (Connection refused); `llama-supervisor start`"
    )
    result = run(*command, "--url", url, "--json")
    assert (result.exit_code, as_json(result)["error"]["type"]) == (3, "no_supervisor")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((404, "text/html", "<h1>nginx</h1>"), 3),
        ((200, "text/html", "<h1>hello</h1>"), 3),
        ((200, "application/json", "[1]"), 3),
        (reply({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404), 3),
        ((500, "text/plain", "500 Internal Server Error"), 1),
        (reply({"error": {"message": "stopping", "type": "unavailable_error", "code": "shutting_down"}}, 503), 1),
    ],
)  # fmt: skip
def test_something_else_answers(fake: Fake, answer: Reply, code: int) -> None:
    fake.routes["GET /api/v1/status"] = answer
    assert run("status", "--url", fake.url).exit_code == code


@pytest.mark.parametrize("url", ["http://", "ftp://x", "http://a:99999", "http://[::1", "http://a b", "http://\x00"])
def test_wrong_address(url: str) -> None:
    result = run("status", "--url", url)
    assert result.exit_code == 3
    assert result.exception is None or isinstance(result.exception, SystemExit)


# --- the process ----------------------------------------------------------------------------------------------------


def test_interrupt_ends_quietly(fake: Fake) -> None:
    hold = threading.Event()

    def forever() -> Iterator[str]:
        yield "one\n"
        hold.wait(30)

    fake.routes["GET /api/v1/models/tiny/logs?lines=100&follow=1"] = forever()
    process = start_process("logs", "-f", "tiny", "--url", fake.url)
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    hold.set()
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_interrupt_of_a_load_ends_quietly(fake: Fake) -> None:
    asked, hold = threading.Event(), threading.Event()

    def load(_: Fake, body: dict[str, Any]) -> Reply:
        asked.set()
        return reply({"success": True})

    def stream() -> Iterator[str]:
        yield ": hello\n\n"
        hold.wait(30)

    fake.routes["GET /v1/models"] = listing(model("tiny"))
    fake.routes["GET /models/sse"] = stream()
    fake.routes["POST /models/load"] = load
    process = start_process("load", "tiny", "--json", "--url", fake.url)
    assert asked.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    hold.set()
    assert (process.returncode, err.strip()) == (130, "")
    assert json.loads(out)["error"]["type"] == "interrupted"


@pytest.mark.parametrize("lines", [1, 100_000], ids=["a short answer", "a long answer"])
def test_reader_that_goes_away(fake: Fake, lines: int) -> None:
    fake.routes["GET /api/v1/models/tiny/logs?lines=100"] = (200, "text/plain", "line\n" * lines)
    process = start_process("logs", "tiny", "--url", fake.url)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.routes["GET /v1/models"] = listing(model("tiny"))
    run("models", "--url", fake.url)
    monkeypatch.setenv("LLAMA_SUPERVISOR_API_KEY", " lsk-hush\n")
    run("models", "--url", fake.url)
    assert fake.keys == [None, "Bearer lsk-hush"]


def test_a_refused_key(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.routes["GET /api/v1/status"] = reply(InvalidApiKey("the API key is not valid").body(), 401)
    monkeypatch.setenv("LLAMA_SUPERVISOR_API_KEY", "lsk-hush")
    result = run("status", "--url", fake.url)
    assert result.exit_code == 1
    assert (
        result.stderr == "Error: the API key is not valid (LLAMA_SUPERVISOR_API_KEY holds the key of these commands)\n"
    )
    assert as_json(run("status", "--url", fake.url, "--json"))["error"]["code"] == "invalid_api_key"


# --- the configuration of a running supervisor -----------------------------------------------------------------------


def test_config_reload(fake: Fake) -> None:
    outcome = {"changed": ["a.b", "c.d"], "restarted": ["tiny"], "restart_needed": ["server.port"]}
    fake.routes["POST /api/v1/config/reload"] = reply(outcome)
    result = run("config", "reload", "--url", fake.url)
    assert result.exit_code == 0
    assert result.stdout == (
        "changed: a.b, c.d\nstarting anew after their running answers: tiny\n"
        "only a new start of the supervisor takes over: server.port\n"
    )
    assert json.loads(run("config", "reload", "--url", fake.url, "--json").stdout) == outcome
    fake.routes["POST /api/v1/config/reload"] = reply({"changed": [], "restarted": [], "restart_needed": []})
    assert run("config", "reload", "--url", fake.url).stdout == "changed: nothing\n"


def test_config_reload_with_mistakes(fake: Fake) -> None:
    fake.routes["POST /api/v1/config/reload"] = reply(ConfigInvalid(["config.json: bad"]).body(), 422)
    result = run("config", "reload", "--url", fake.url)
    assert result.exit_code == 1
    assert result.stderr == "Error: the configuration cannot be used:\n  config.json: bad\n"
