"""Does the command line say the right thing, as text and as JSON, with the right exit code?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from fake_supervisor import as_json, run, start_process

from supervisor import cli as program
from supervisor import config, console, errors, reference, settings
from supervisor.cli import cli
from supervisor.cli_options import client
from supervisor.setup import doctor, embedded, native

ROOT = Path(__file__).parent.parent
LONG = "a-very-long-model-name-" * 8 + "Q4_K_M"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("COLUMNS", "80")
    for name in list(os.environ):
        if name.startswith("LLAMA_SUPERVISOR_"):
            monkeypatch.delenv(name)


# --- help, typos, docs ----------------------------------------------------------------------------------------------


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda item: " ".join(item) if isinstance(item, tuple) else ""
)
def test_help_of_each_command_has_an_example_and_json(path: tuple[str, ...], command: click.Command) -> None:
    text = run(*path, "--help").stdout
    assert f"\n    llama-supervisor {' '.join(path)}" in text
    assert isinstance(command, click.Group) or "--json" in text
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not undocumented


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda item: " ".join(item) if isinstance(item, tuple) else ""
)
def test_examples_parse(path: tuple[str, ...], command: click.Command) -> None:
    """Each example is a command line that the command takes."""
    lines = [line.split("#")[0].split() for line in (command.epilog or "").splitlines() if line.startswith("  llama-")]
    for line in lines:
        words = line[1 : line.index(">")] if ">" in line else line[1:]
        if "--source" in words:
            words[words.index("--source") + 1] = str(ROOT)
        words = [str(ROOT / "README.md") if word.endswith((".txt", ".atlas")) else word for word in words]
        words = [str(ROOT) if word == "memory" else word for word in words]  # they must exist
        assert words[: len(path)] == list(path)
        if not isinstance(command, click.Group):
            command.make_context(path[-1], words[len(path) :])


def test_help_names_all_exit_codes() -> None:
    text = run("--help").stdout
    for code in (
        0,
        program.FAILED,
        program.USAGE,
        program.NO_SUPERVISOR,
        program.NO_MODEL,
        program.BAD_CONFIG,
        program.INTERRUPTED,
        program.READER_GONE,
    ):
        assert f" {code}  " in text
        assert f"{code} " in (ROOT / "docs/cli.md").read_text(encoding="utf-8").partition("<!--")[0]


def test_documentation_embeds_the_real_help() -> None:
    page = " ".join((ROOT / "docs/cli.md").read_text(encoding="utf-8").split())
    for path, _ in commands():
        assert " ".join(run(*path, "--help").stdout.split()) in page
    assert " ".join(run("--help").stdout.split()) in page
    assert not reference.stale(ROOT / "docs"), "run scripts/docs"


def test_version() -> None:
    assert run("--version").stdout == f"llama-supervisor {program.__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["staus"], "No such command 'staus'. Did you mean 'status'?"),
        (["config", "chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["zzzzzz"], "No such command 'zzzzzz'."),
        (["status", "--ulr", "x"], "--url"),
        (["start", "--prot", "1"], "--port"),
        (["start", "--port", "99999"], "99999 is not in the range 0<=x<=65535"),
        (["start", "--log-level", "loud"], "'loud' is not one of"),
        (["load"], "Missing argument 'MODEL'"),
        (["build", "--backend", "cdua"], "'cdua' is not one of"),
    ],
)
def test_wrong_command_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_wrong_command_line_as_json() -> None:
    result = run("logs", "-f", "--json", "m")
    assert result.exit_code == 2
    assert as_json(result)["error"]["message"].endswith("does not go with --follow")
    result = run("staus", "--json")
    error = as_json(result)["error"]
    assert (result.exit_code, error["type"]) == (2, "usage_error")
    assert "'status'" in error["message"]


# --- configuration --------------------------------------------------------------------------------------------------


def test_config_check() -> None:
    result = run("config", "check")
    assert (result.exit_code, result.stdout) == (0, "no configuration file; the environment: good\n")
    Path("config.json").write_text('{"server": {"prot": 1, "port": true}}')
    result = run("config", "check")
    assert (result.exit_code, result.stdout) == (78, "")
    assert "  config.json: server.prot: unknown key; did you mean 'port'?\n" in result.stderr
    result = run("config", "check", "--json")
    assert result.exit_code == 78
    error = as_json(result)["error"]
    assert error["type"] == "config_error"
    assert error["problems"] == [
        "config.json: server.port: true is not a whole number",
        "config.json: server.prot: unknown key; did you mean 'port'?",
    ]
    Path("good.json").write_text("{}")
    result = run("config", "check", "--config", "good.json", "--json")
    assert (result.exit_code, as_json(result)) == (0, {"ok": True, "path": str(Path.cwd() / "good.json")})


def test_config_show() -> None:
    Path("config.json").write_text('{"server": {"port": 81}}')
    lines = run("config", "show").stdout.splitlines()
    assert lines[0].split() == ["KEY", "VALUE", "SOURCE", "MEANING"]
    assert [line.split()[:3] for line in lines if line.startswith("server.port")] == [
        ["server.port", "81", "config.json"]
    ]
    shown = as_json(run("config", "show", "--json"))
    assert shown["path"] == str(Path.cwd() / "config.json")
    assert {"key": "server.port", "value": 81, "source": "config.json"}.items() <= shown["settings"][1].items()


def test_config_schema() -> None:
    assert as_json(run("config", "schema")) == as_json(run("config", "schema", "--json")) == config.schema()


def test_client_command_with_a_bad_configuration() -> None:
    Path("config.json").write_text("{")
    result = run("status", "--json")
    assert (result.exit_code, as_json(result)["error"]["type"]) == (78, "config_error")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:81"),
        ("0.0.0.0", "http://127.0.0.1:81"),
        ("::", "http://[::1]:81"),
        ("fe80::1,127.0.0.1", "http://[fe80::1]:81"),
        ("box.local", "http://box.local:81"),
    ],
)
def test_address_from_the_configuration(host: str, url: str) -> None:
    Path("config.json").write_text(json.dumps({"server": {"host": host, "port": 81}}))
    assert client(None, None).url == url


def test_address_that_only_the_system_knows() -> None:
    Path("config.json").write_text('{"server": {"port": 0}}')
    result = run("status")
    assert result.exit_code == 2
    assert "--url" in result.stderr


# --- start and build ------------------------------------------------------------------------------------------------


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> list[settings.Settings]:
    """Put a fake in the place of `supervisor.process` and return what it is run with."""
    from supervisor import process

    started: list[settings.Settings] = []

    def fake_run(given: settings.Settings, load: Callable[[], settings.Settings]) -> int:
        started.append(given)
        assert load() == given  # as SIGHUP would have it
        print("banner")
        return 1 if given.config.server.port == 1 else 0

    monkeypatch.setattr(process, "run", fake_run)
    return started


def test_start_hands_its_options_over(app: list[settings.Settings]) -> None:
    Path("config.json").write_text('{"server": {"port": 81, "host": "::1"}}')
    args = ["--models", "m", "--port", "82", "--llama-server", "bin/ls", "--max-loaded", "2", "--default-model", "a",
            "--log-level", "debug", "--preload", "a", "--preload", "b"]  # fmt: skip
    result = run("start", *args)
    assert (result.exit_code, result.stdout) == (0, "banner\n")
    config = app[0].config
    assert (config.server.host, config.server.port) == ("::1", 82)
    assert config.server.llama_server == Path.cwd() / "bin/ls"
    assert config.models.directory == Path.cwd() / "m"
    assert (config.models.max_loaded_models, config.models.default_model) == (2, "a")
    assert config.models.preload == ["a", "b"]
    assert config.logging.level == "debug"
    assert app[0].sources["server.port"] == "command line"


def test_start_without_options_keeps_the_configuration(app: list[settings.Settings]) -> None:
    Path("config.json").write_text('{"models": {"preload": ["x"]}}')
    assert run("start").exit_code == 0
    assert app[0].config.models.preload == ["x"]
    assert "command line" not in app[0].sources.values()


def test_a_file_that_is_gone_is_missed_when_the_settings_are_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the defaults would hold, or another file."""
    from supervisor import process

    def fake_run(given: settings.Settings, load: Callable[[], settings.Settings]) -> int:
        Path("config.json").unlink()
        with pytest.raises(errors.ConfigError, match="no such file"):
            load()
        return 0

    monkeypatch.setattr(process, "run", fake_run)
    Path("config.json").write_text("{}")
    assert run("start").exit_code == 0


def test_start_as_json(app: list[settings.Settings]) -> None:
    result = run("start", "--json")
    assert (result.exit_code, json.loads(result.stdout), result.stderr) == (0, {"exit_code": 0}, "banner\n")
    result = run("start", "--port", "1", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (1, "start_failed")


def test_start_with_a_bad_configuration(app: list[settings.Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SUPERVISOR_SERVER__PROT", "1")
    result = run("start")
    assert result.exit_code == 78
    assert "did you mean LLAMA_SUPERVISOR_SERVER__PORT?" in result.stderr
    assert app == []


def test_start_options_agree_with_the_settings() -> None:
    """The options' limits are written twice, as the settings are slow to import; here they are compared."""
    properties = {
        name: section.model_json_schema()["properties"]
        for name, section in config.sections().items()
        if section.model_fields
    }
    options = [option for option in cli.commands["start"].params if "__" in (option.name or "")]
    assert options
    for option in options:
        section, _, key = str(option.name).partition("__")
        field = properties[section][key]
        if isinstance(option.type, click.IntRange):
            assert (option.type.min, option.type.max) == (field["minimum"], field["maximum"])
        if isinstance(option.type, click.Choice):
            assert list(option.type.choices) == field["enum"]


def test_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[native.BuildOptions] = []
    facts = native.BuildFacts("k", 11434, "c", "1-abc", "s", "cpu", [], "cc", "cmake", "cpu", "0" * 64, 1.0, 1.0)

    def fake_build(options: native.BuildOptions, _: Any) -> native.BuildResult:
        asked.append(options)
        return native.BuildResult(Path("/cache/llama-server"), facts, True, 125.0)

    monkeypatch.setattr(native, "build", fake_build)
    result = run("build", "--backend", "cpu", "--source", str(tmp_path), "--jobs", "2", "--keep")
    assert result.stdout == "/cache/llama-server (built in 2 min 5 s: b11434, cpu, patches 1-abc)\n"
    assert asked == [native.BuildOptions(backend="cpu", source=tmp_path, jobs=2, keep=True)]
    assert as_json(run("build", "--json")) == {
        "server": "/cache/llama-server",
        "built": True,
        "seconds": 125.0,
        "build": 11434,
        "patches": "1-abc",
        "backend": "cpu",
    }


def test_build_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from supervisor.setup.fetch import SetupError

    def fake_build(*_: Any) -> Any:
        raise SetupError("no compiler: apt install g++")

    monkeypatch.setattr(native, "build", fake_build)
    result = run("build")
    assert (result.exit_code, result.stderr) == (1, "Error: no compiler: apt install g++\n")
    result = run("build", "--json")
    assert (result.exit_code, as_json(result)["error"]["message"]) == (1, "no compiler: apt install g++")


def test_pull(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Path, str]] = []

    def fake_install(directory: Path, name: str, *, console: Any) -> Path:
        asked.append((directory, name))
        return directory / "smol.gguf"

    monkeypatch.setattr(embedded, "install", fake_install)
    Path("config.json").write_text('{"models": {"directory": "m"}}')
    assert run("pull", "smollm2").stdout == f"{Path.cwd() / 'm/smol.gguf'}\n"
    document = as_json(run("pull", "smollm2", "--models", str(tmp_path), "--json"))
    assert document == {"model": "smollm2", "path": str(tmp_path / "smol.gguf")}
    assert asked == [(Path.cwd() / "m", "smollm2"), (tmp_path, "smollm2")]
    result = run("pull", "smolm2", "--json")
    assert (result.exit_code, as_json(result)["error"]["code"]) == (4, "model_not_found")
    text = run("pull", "--help").stdout
    assert not [name for name in embedded.MODELS if name not in text]


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    found = [doctor.Check("cpu", "ok", "2 x x86_64"), doctor.Check("port", "warn", "in use", "choose another")]

    def fake_checks(*args: Any) -> list[doctor.Check]:
        asked.append(args)
        return found

    monkeypatch.setattr(doctor, "checks", fake_checks)
    result = run("doctor")
    assert result.exit_code == 0
    assert re.split(" {2,}", result.stdout.splitlines()[-1]) == ["port", "warn", "in use", "choose another"]
    found.append(doctor.Check("compiler", "fail", "none", "apt install g++"))
    Path("config.json").write_text('{"server": {"port": true}}')
    result = run("doctor", "--json")
    assert result.exit_code == 1
    document = as_json(result)
    assert (document["ok"], document["checks"][0]) == (
        False,
        {"name": "cpu", "status": "ok", "found": "2 x x86_64", "advice": ""},
    )
    assert asked[1][2] == ["config.json: server.port: true is not a whole number"]


def test_help_is_quick() -> None:
    """Heavy modules wait for the commands that need them. What counts is processor time, whoever else works."""
    heavy = {"aiohttp", "asyncio", "http.client", "pydantic", "rich"}
    code = f"import sys, supervisor.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    best = 10.0
    for _ in range(3):
        before = os.times()
        with start_process("--help") as process:
            process.communicate(timeout=30)
        after = os.times()
        best = min(best, after.children_user - before.children_user + after.children_system - before.children_system)
    assert best < 0.4


# --- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (5 << 40, "5.0 TiB")]
)
def test_size(count: int | None, text: str) -> None:
    assert console.size(count) == text


def test_table_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Long ids are folded to the width, nothing is lost, and NO_COLOR holds."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console.table(["MODEL", ">SIZE"], [[LONG, "1 GiB"], ["[red]x[/]\x1b", "2 GiB"]])
    text = capsys.readouterr().out
    assert "\x1b[3" not in text
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, text.splitlines())) <= 80
    assert LONG in "".join(line.split("  ")[0].strip() for line in text.splitlines()[1:])
    assert "[red]x[/]\\x1b" in text
