"""`llama-supervisor karen`: the extension goes into KAREN's folder, and is tried as KAREN would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import Fake, as_json, reply, run

from supervisor.errors import SupervisorError
from supervisor.setup import karen

CONFIG = "GET /karen/config?model=auto"
CHAT = "POST /v1/chat/completions"


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    server.routes["GET /health"] = reply({"status": "ok"})
    server.routes[CONFIG] = reply({"model": "tiny", "atlas": False})
    piece = {"model": "tiny", "choices": [{"delta": {"content": "Hello \x1b[2Jthere"}}]}
    server.routes[CHAT] = lambda fake, body: iter([f"data: {json.dumps(piece)}\n\n", "data: [DONE]\n\n"])
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMACPP_KAREN_API_KEY", raising=False)
    monkeypatch.delenv("LLAMA_SUPERVISOR_API_KEY", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """KAREN's folder."""
    (tmp_path / "karen" / "src" / "extensions").mkdir(parents=True)
    return tmp_path / "karen"


def files(home: Path) -> list[str]:
    folder = home / "src" / "extensions"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in str(path))


NAME = "llama_supervisor"
WHOLE = [NAME, *(f"{NAME}/{name}" for name in sorted([*karen.FILES, "config.json"]))]


def test_install(fake: Fake, home: Path) -> None:
    result = run("karen", "install", str(home), "--policy", "hybrid", "--model", "tiny", "--url", fake.url)
    assert result.exit_code == 0, result.output
    assert files(home) == WHOLE
    folder = home / "src" / "extensions" / NAME
    assert json.loads((folder / "config.json").read_text()) == {"url": fake.url, "policy": "hybrid", "model": "tiny"}
    assert result.stdout.splitlines()[0] == f"{folder}: installed"
    assert result.stdout.splitlines()[-1] == "restart KAREN to load it"


def test_install_once_more_keeps_what_is_the_users(fake: Fake, home: Path) -> None:
    run("karen", "install", str(home), "--model", "tiny", "--url", fake.url)
    folder = home / "src" / "extensions" / NAME
    (folder / "prompt.txt").write_text("[system]\nMine.")
    (folder / "handler.py").write_text("old")
    (folder / "stale.py").write_text("gone")
    (folder / "api.key").write_text("lsk-x")
    extensions = folder.parent
    words = ["--policy", "off", "--url", fake.url, "--json", "--api-key-file", str(folder / "api.key")]
    document = as_json(run("karen", "install", str(extensions), *words))
    assert (document["kept"], document["linked"]) == (["config.json", "prompt.txt"], False)
    assert files(home) == WHOLE
    assert (folder / "prompt.txt").read_text() == "[system]\nMine."
    assert (folder / "handler.py").read_text() == (karen.shipped_folder() / "handler.py").read_text()
    assert json.loads((folder / "config.json").read_text()) == {
        "url": fake.url,
        "model": "tiny",
        "policy": "off",
        "api_key_file": str(folder / "api.key"),
    }
    assert document["trial"]["hooks"]["post_llm_result"]["reason"] == "the policy is off"


def test_install_by_a_link(fake: Fake, home: Path) -> None:
    folder = home / "src" / "extensions" / NAME
    for _ in range(2):
        result = run("karen", "install", "--link", str(home), "--url", fake.url)
        assert result.exit_code == 0, result.output
        assert folder.resolve() == karen.shipped_folder().resolve()
    assert f"set LLAMACPP_KAREN_URL={fake.url}" in result.stdout
    assert not (karen.shipped_folder() / "config.json").exists()
    assert run("karen", "install", "--link", "--policy", "off", str(home), "--url", fake.url).exit_code == 2
    assert run("karen", "install", str(home), "--url", fake.url).exit_code == 0
    assert not folder.is_symlink()
    assert files(home) == WHOLE


def test_install_where_nothing_answers(fake: Fake, home: Path) -> None:
    fake.close()
    result = run("karen", "install", str(home), "--url", fake.url)
    assert result.exit_code == 0
    assert "where the remote model fails, KAREN gets nothing from here" in result.stdout


@pytest.mark.parametrize("what", ["nowhere", "other", "itself", "taken", "broken"])
def test_install_refuses(fake: Fake, home: Path, what: str) -> None:
    path = home
    folder = home / "src" / "extensions" / NAME
    if what in ("nowhere", "other"):
        path = home / what
        if what == "other":
            path.mkdir()
    elif what == "itself":
        path = karen.shipped_folder()
    else:
        folder.mkdir()
        if what == "taken":
            (folder / "precious.txt").write_text("x")
        else:
            (folder / karen.FILES[0]).write_text('{"id": "llama_supervisor"}')
            (folder / "config.json").write_text("{")
    before = files(home)
    result = run("karen", "install", str(path), "--url", fake.url)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert [name for name in files(home) if ".new" not in name] == before


def test_check(fake: Fake) -> None:
    result = run("karen", "check", "--url", fake.url, "--prompt", "Who are you?")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["pre_llm_prompt", "changed", "nothing"],
        ["post_llm_result", "answered", "here"],
    ]
    assert lines[-1] == "where the remote model fails, KAREN gets from tiny: Hello \\x1b[2Jthere"
    [body] = [body for path, body in fake.seen if path == CHAT]
    assert body["messages"][-1] == {"role": "user", "content": "Who are you?"}


def test_check_of_what_is_installed(fake: Fake, home: Path) -> None:
    run("karen", "install", str(home), "--url", fake.url)
    folder = home / "src" / "extensions" / NAME
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"policy": "prefer_local", "max_tokens": -1}))
    document = as_json(run("karen", "check", str(home), "--json"))
    assert document["answer"] == "Hello \x1b[2Jthere"
    assert document["hooks"]["pre_llm_prompt"]["policy"] == "prefer_local"
    assert document["warnings"] == ["llama-supervisor: config.json: max_tokens must be from 1 to 1000000"]
    (folder / "plugin_manifest.json").unlink()
    assert run("karen", "check", str(home)).exit_code == 1
    (folder / "plugin_manifest.json").write_text("{}")
    (folder / "handler.py").write_text("import nowhere")
    result = run("karen", "check", str(home))
    assert (result.exit_code, "does not load: ModuleNotFoundError" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("path", "answer", "reason"),
    [
        ("GET /health", reply({"error": {"message": "starting"}}, 503), "HTTP 503: starting"),
        (CHAT, reply({"error": {"message": "the API key is not valid"}}, 401), "HTTP 401: the API key is not valid"),
        (CONFIG, reply({"integration_enabled": False}), "switched off at the supervisor, by its section `karen`"),
    ],
)
def test_check_without_an_answer(fake: Fake, path: str, answer: Any, reason: str) -> None:
    fake.routes[path] = answer
    result = run("karen", "check", "--url", fake.url, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["answer"], document["hooks"]["post_llm_result"]["reason"]) == (None, reason)


def test_check_sends_the_key_of_the_commands(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SUPERVISOR_API_KEY", "lsk-test")
    monkeypatch.setenv("LLAMACPP_KAREN_API_KEY", "")
    assert run("karen", "check", "--url", fake.url).exit_code == 0
    asked = dict(zip((path for path, _ in fake.seen), fake.keys, strict=True))
    assert (asked[CHAT], asked["GET /health"]) == ("Bearer lsk-test", None)


def test_an_installation_without_the_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import supervisor

    monkeypatch.setattr(supervisor, "__file__", str(tmp_path / "supervisor" / "__init__.py"))
    with pytest.raises(SupervisorError, match="missing from this installation"):
        karen.shipped_folder()
