"""Do the layers of settings combine as the docs say, and is every mistake told well?"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor import config, settings
from supervisor.config import Config, ModelOverride
from supervisor.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with an empty user configuration folder."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return cwd


def write(content: Any, path: str = "config.json") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def refused(content: Any = None, environ: dict[str, str] | None = None, cli: Any = None) -> list[str]:
    """Return the problems of a file with this content."""
    path = write(content) if content is not None else None
    with pytest.raises(ConfigError) as caught:
        settings.load(path, cli, environ or {})
    return caught.value.problems


def variable(key: str) -> str:
    section, _, name = key.partition(".")
    return f"LLAMA_SUPERVISOR_{section}__{name}".upper()


# --- layers ---------------------------------------------------------------------------------------------------------


def test_defaults_without_anything(elsewhere: Path) -> None:
    found = settings.load(environ={})
    assert found.path is None
    assert found.base == elsewhere
    assert found.config == Config.model_validate({"models": {"directory": elsewhere / "models"}})
    assert set(found.sources.values()) == {"default"}


def test_command_line_over_environment_over_file_over_defaults() -> None:
    path = write({"server": {"port": 1001, "host": "::1", "drain_seconds": 11}})
    found = settings.load(
        path,
        {"server": {"port": 1003, "drain_seconds": None}},
        {variable("server.port"): "1002", variable("server.host"): "0.0.0.0"},
    )
    server = found.config.server
    assert (server.port, server.host, server.drain_seconds, server.stop_seconds) == (1003, "0.0.0.0", 11, 5)
    assert {key: found.sources[f"server.{key}"] for key in ("port", "host", "drain_seconds", "stop_seconds")} == {
        "port": "command line",
        "host": "env LLAMA_SUPERVISOR_SERVER__HOST",
        "drain_seconds": "config.json",
        "stop_seconds": "default",
    }


def test_file_is_searched_in_order(elsewhere: Path, tmp_path: Path) -> None:
    user = write({"server": {"port": 4}}, str(tmp_path / "user/llama-supervisor/config.json"))
    assert settings.load(environ={}).path == user
    here = write({"server": {"port": 3}})
    assert settings.load(environ={}).path == elsewhere / here
    named = write({"server": {"port": 2}}, "env/named.json")
    environ = {"LLAMA_SUPERVISOR_CONFIG": str(named)}
    found = settings.load(environ=environ)
    assert (found.config.server.port, found.sources["server.port"]) == (2, "named.json")
    assert settings.load(write({"server": {"port": 1}}, "given.json"), environ=environ).config.server.port == 1
    assert settings.load(environ={"LLAMA_SUPERVISOR_CONFIG": ""}).config.server.port == 3


def test_relative_paths_start_at_the_file_or_the_current_folder(elsewhere: Path, tmp_path: Path) -> None:
    path = write(
        {"models": {"directory": "../m"}, "logging": {"directory": "~/logs"}, "server": {"runtime_dir": "/run/x"}},
        "etc/config.json",
    )
    environ = {variable("server.llama_server"): "bin/llama-server"}
    found = settings.load(path, None, environ)
    assert found.base == elsewhere / "etc"
    assert found.config.models.directory == elsewhere / "m"
    assert found.config.logging.directory == tmp_path / "home/logs"
    assert found.config.server.runtime_dir == Path("/run/x")
    assert found.config.server.llama_server == elsewhere / "bin/llama-server"
    found = settings.load(path, {"models": {"directory": Path("here")}}, {})
    assert found.config.models.directory == elsewhere / "here"


def test_default_models_folder_is_beside_the_file(elsewhere: Path) -> None:
    assert settings.load(write({}, "etc/config.json"), None, {}).config.models.directory == elsewhere / "etc/models"


def test_folder_of_a_linked_file_is_that_of_the_link(elsewhere: Path, tmp_path: Path) -> None:
    real = write({}, str(tmp_path / "real/config.json"))
    Path("config.json").symlink_to(real)
    assert settings.load(environ={}).base == elsewhere


def test_environment_values(elsewhere: Path) -> None:
    environ = {
        variable("server.port"): "9000",
        variable("server.drain_seconds"): "2.5",
        variable("models.preload"): '["a", "b"]',
        variable("performance.threads"): "null",
        variable("performance.gpu_layers"): "20",
        variable("monitoring.child_metrics"): "false",
        variable("logging.directory"): "logs",
        variable("models.default_model"): "",
        "llama_supervisor_api__max_body_mb": "8",
        "LLAMA_SUPERVISOR_URL": "http://127.0.0.1:1",
        "LLAMA_SUPERVISOR_PORT": "tcp://10.0.0.1:80",
        "LLAMA_SUPERVISOR_SERVER": "x",
        "UNRELATED__THING": "1",
    }
    config = settings.load(write({"performance": {"threads": 4}}), None, environ).config
    assert (config.server.port, config.server.drain_seconds) == (9000, 2.5)
    assert config.models.preload == ["a", "b"]
    assert (config.performance.threads, config.performance.gpu_layers) == (None, 20)
    assert config.monitoring.child_metrics is False
    assert config.logging.directory == elsewhere / "logs"
    assert config.models.default_model is None
    assert config.api.max_body_mb == 8


def test_overrides_are_merged_by_key() -> None:
    path = write({"models": {"overrides": {"a.b": {"pin": True, "args": ["-fa"], "env": {"X": "1"}}, "c": {}}}})
    environ = {variable("models.overrides"): '{"a.b": {"env": {"Y": "2"}}, "d": {"pin": true}}'}
    found = settings.load(path, None, environ)
    assert found.config.models.overrides == {
        "a.b": ModelOverride(pin=True, args=["-fa"], env={"Y": "2"}),
        "c": ModelOverride(),
        "d": ModelOverride(pin=True),
    }
    assert found.sources["models.overrides.a.b.pin"] == "config.json"
    assert found.sources["models.overrides.a.b.env"] == "env LLAMA_SUPERVISOR_MODELS__OVERRIDES"


def test_byte_order_mark_is_no_mistake() -> None:
    assert settings.load(write(b'\xef\xbb\xbf{"server": {"port": 7}}'), None, {}).config.server.port == 7


# --- mistakes in the file -------------------------------------------------------------------------------------------

SECTIONS = "server, models, performance, inference, atlas, karen, api, monitoring, logging"

MISTAKES: list[tuple[str, str]] = [
    ('{"server": {"prot": 1}}', "config.json: server.prot: unknown key; did you mean 'port'?"),
    ('{"server": {"Port": 1}}', "config.json: server.Port: unknown key; did you mean 'port'?"),
    (
        '{"server": {"drain-seconds": 1}}',
        "config.json: server.drain-seconds: unknown key; did you mean 'drain_seconds'?",
    ),
    ('{"port": 1}', "config.json: port: unknown key; did you mean 'server.port'?"),
    ('{"modles": {}}', "config.json: modles: unknown key; did you mean 'models'?"),
    ('{"server": {"threads": 1}}', "config.json: server.threads: unknown key; did you mean 'performance.threads'?"),
    ('{"server": {"port": 99999}}', "config.json: server.port: 99999 is not less than or equal to 65535"),
    ('{"server": {"port": true}}', "config.json: server.port: true is not a whole number"),
    ('{"server": {"port": "8080"}}', "config.json: server.port: '8080' is not a whole number"),
    ('{"server": {"port": 80.5}}', "config.json: server.port: 80.5 is not a whole number"),
    ('{"server": {"port": null}}', "config.json: server.port: null is not a whole number"),
    ('{"server": {"port": NaN}}', "config.json: server.port: NaN is not a JSON number"),
    ('{"server": {"drain_seconds": -Infinity}}', "config.json: server.drain_seconds: -Infinity is not a JSON number"),
    ('{"server": {"drain_seconds": 1e999}}', "config.json: server.drain_seconds: 1e999 is too large for a number"),
    ('{"server": {"port": ' + "9" * 400 + "}}", "config.json: server.port: a number of 400 digits is too large"),
    ('{"server": {"port": ' + "9" * 9000 + "}}", "config.json: server.port: a number of 9000 digits is too large"),
    ('{"server": {"drain_seconds": true}}', "config.json: server.drain_seconds: true is not a number"),
    ('{"server": {"host": ""}}', "config.json: server.host: '': string should have at least 1 character"),
    ('{"server": {"host": "\\ud800"}}', r"config.json: server.host: '\ud800' is not valid text"),
    ('{"server": 5}', "config.json: server: 5 is not an object"),
    ('{"server": []}', "config.json: server: a list is not an object"),
    ('{"models": {"directory": 5}}', "config.json: models.directory: 5 is not a path (a string)"),
    ('{"models": {"directory": ""}}', "config.json: models.directory: '' is not a usable path"),
    ('{"models": {"directory": "a\\u0000"}}', r"config.json: models.directory: 'a\x00' is not a usable path"),
    (
        '{"models": {"directory": "~nobody-here/x"}}',
        "config.json: models.directory: '~nobody-here/x' is not a usable path",
    ),
    ('{"models": {"preload": "a"}}', "config.json: models.preload: 'a' is not a list"),
    ('{"models": {"preload": ["a", 1]}}', "config.json: models.preload[1]: 1 is not a string"),
    (
        '{"models": {"unknown_model": "eror"}}',
        "config.json: models.unknown_model: 'eror' is not 'error' or 'default'; did you mean 'error'?",
    ),
    (
        '{"models": {"overrides": {"m": {"pinn": 1}}}}',
        "config.json: models.overrides.m.pinn: unknown key; did you mean 'pin'?",
    ),
    ('{"models": {"overrides": {"m": []}}}', "config.json: models.overrides.m: a list is not an object"),
    (
        '{"models": {"overrides": {"m": {"args": ["--port=1"]}}}}',
        "config.json: models.overrides.m.args: --port is set by the supervisor and cannot be overridden",
    ),
    (
        '{"performance": {"gpu_layers": "al"}}',
        "config.json: performance.gpu_layers: 'al' is not a whole number, 'auto' or 'all'; did you mean 'all'?",
    ),
    (
        '{"performance": {"gpu_layers": true}}',
        "config.json: performance.gpu_layers: true is not a whole number, 'auto' or 'all'",
    ),
    ('{"monitoring": {"child_metrics": 1}}', "config.json: monitoring.child_metrics: 1 is not true or false"),
    (
        '{"karen": {"x": 1}}',
        "config.json: karen.x: unknown key; known here: integration_enabled, enable_local_fallback, context_awareness",
    ),
    ('{"zzz": 1}', f"config.json: zzz: unknown key; known here: {SECTIONS}"),
    ('{"\\u001b[31m": 1}', rf"config.json: '\x1b[31m': unknown key; known here: {SECTIONS}"),
    ('{"server": {}, "server": {}}', "config.json: server: appears twice"),
    ('{"models": {"preload": [{"a": 1, "a": 2}]}}', "config.json: models.preload[0].a: appears twice"),
    ('{"server": {"host": ' + "[" * 50 + "]" * 50 + "}}", "config.json: server.host: nested too deeply"),
    ('{"a":' * 5000, "config.json: nested too deeply"),
    ('{"server":\n {"port" 1}}', "config.json:2:10: Expecting ':' delimiter"),
    ('{"server": {"port": 1}', "config.json:1:23: Expecting ',' delimiter"),
    ("", "config.json:1:1: Expecting value"),
    ("[]", 'config.json: the top must be an object: {"server": {...}, ...}'),
    ("NaN", "config.json: NaN is not a JSON number"),
]


@pytest.mark.parametrize(("text", "problem"), MISTAKES, ids=[problem[13:60] for _, problem in MISTAKES])
def test_mistake_in_the_file(text: str, problem: str) -> None:
    assert problem in refused(text)


def test_all_mistakes_are_told_at_once() -> None:
    problems = refused(
        {"server": {"port": True, "prot": 1, "host": 3}, "logging": {"level": "loud"}},
        {variable("server.port"): "x", variable("server.prot"): "1"},
        {"models": {"max_loaded_models": 0}},
    )
    assert problems == [
        "config.json: server.host: 3 is not a string",
        "config.json: server.port: true is not a whole number",
        "config.json: server.prot: unknown key; did you mean 'port'?",
        "config.json: logging.level: 'loud' is not 'debug', 'info', 'warning' or 'error'",
        "env LLAMA_SUPERVISOR_SERVER__PORT: 'x' is not a whole number",
        "env LLAMA_SUPERVISOR_SERVER__PROT: names no setting; did you mean LLAMA_SUPERVISOR_SERVER__PORT?",
        "command line: models.max_loaded_models: 0 is not greater than or equal to 1",
    ]


def test_thousands_of_mistakes_are_told_in_short() -> None:
    problems = refused({"server": {f"x{number}": 1 for number in range(10_000)}})
    assert len(problems) == settings.MAX_PROBLEMS + 1
    assert problems[-1] == "... and 9950 more"
    twice = "{" + ", ".join(f'"{number % 20_000}": 1' for number in range(40_000)) + "}"
    assert refused(twice)[0] == "config.json: 0: appears twice"


def test_file_that_cannot_be_read(elsewhere: Path) -> None:
    def problems(path: Path) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            settings.load(path, None, {})
        return caught.value.problems

    assert problems(Path("missing.json")) == ["missing.json: no such file"]
    assert problems(Path("/missing/config.json")) == ["/missing/config.json: no such file"]
    Path("folder.json").mkdir()
    assert problems(Path("folder.json")) == ["folder.json: is a folder, not a file"]
    assert problems(write(b'{"server": "\xff"}')) == ["config.json: not UTF-8 text at byte 13"]
    assert problems(write(" " * (1 << 21))) == ["config.json: larger than 1 MiB, so it is no configuration"]
    assert problems(Path("/dev/zero")) == ["/dev/zero: larger than 1 MiB, so it is no configuration"]
    loop = Path("loop.json")
    loop.symlink_to(loop)
    assert problems(loop)[0].startswith("loop.json: cannot be read: Too many levels")


def test_file_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    write({})

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root may read everything, so chmod won't do

    monkeypatch.setattr(Path, "open", refuse)
    assert refused() == ["config.json: cannot be read: Permission denied"]


# --- mistakes in the environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SERVER__PORT", "99999", "'99999' is not less than or equal to 65535"),
        ("SERVER__PORT", "true", "'true' is not a whole number"),
        ("SERVER__PORT", "9" * 5000, f"'{'9' * 56}... is not a whole number"),
        ("SERVER__DRAIN_SECONDS", "nan", "'nan' is not a finite number"),
        ("MONITORING__CHILD_METRICS", "maybe", "'maybe' is not true or false"),
        ("MODELS__PRELOAD", "a,b", 'not JSON at character 1: Expecting value; example: ["a", "b"]'),
        ("MODELS__PRELOAD", "[1]", "[0]: 1 is not a string"),
        ("MODELS__PRELOAD", "[" * 9000, "nested too deeply"),
        ("MODELS__OVERRIDES", '{"a": {"pin": 1}}', "a.pin: 1 is not true or false"),
        ("MODELS__OVERRIDES", '{"a": {}, "a": {}}', "a: appears twice"),
        ("MODELS__DIRECTORY", "~nobody-here", "'~nobody-here' is not a usable path"),
        ("PERFORMANCE__GPU_LAYERS", "al", "'al' is not a whole number, 'auto' or 'all'; did you mean 'all'?"),
        ("SERVR__PORT", "1", "names no setting; did you mean LLAMA_SUPERVISOR_SERVER__PORT?"),
        ("MODELS__OVERRIDES__A__PIN", "1", "names no setting; did you mean LLAMA_SUPERVISOR_MODELS__OVERRIDES?"),
        ("Q__", "1", "names no setting; docs/configuration.md lists the names"),
    ],
)
def test_mistake_in_the_environment(name: str, value: str, problem: str) -> None:
    problems = refused(None, {f"LLAMA_SUPERVISOR_{name}": value})
    assert problems[0].startswith(f"env LLAMA_SUPERVISOR_{name}: ")
    assert problem in problems[0]


def test_missing_file_named_in_the_environment() -> None:
    assert refused(None, {"LLAMA_SUPERVISOR_CONFIG": "gone.json"}) == ["gone.json: no such file"]


# --- secrets --------------------------------------------------------------------------------------------------------


def test_secrets_are_not_repeated_in_messages() -> None:
    problems = refused(
        {
            "server": {"port": "my token: hush", "api_key": "hush"},
            "models": {
                "overrides": {
                    "m": {
                        "env": {"HF_TOKEN": 5555, "AWS_ACCESS_KEY_ID": 5555, "dbPassword": 5555},
                        "args": "--api-key hush",
                    }
                }
            },
        }
    )
    assert len(problems) == 6
    assert not [problem for problem in problems if "hush" in problem or "5555" in problem]


def test_secrets_are_not_shown() -> None:
    override = {
        "env": {"HF_TOKEN": "hush", "OPENAI_APIKEY": "hush", "LANG": "C"},
        "args": ["--api-key", "hush", "--ssl-key-file=hush", "--temp", "0"],
    }
    found = settings.load(write({"models": {"overrides": {"my-token-model": override}}}), None, {})
    rows = {row.key: row for row in settings.show(found)}
    assert "hush" not in json.dumps(list(rows.values()))
    assert json.loads(rows["models.overrides.my-token-model.env"].value)["LANG"] == "C"
    args = json.loads(rows["models.overrides.my-token-model.args"].value)
    assert args == ["--api-key", "********", "--ssl-key-file=********", "--temp", "0"]


def test_where_secrets_are_is_no_secret() -> None:
    found = settings.load(write({"api": {"keys_file": "keys.json"}}), None, {})
    rows = {row.key: row for row in settings.show(found)}
    assert json.loads(rows["api.keys_file"].value).endswith("/keys.json")
    assert refused({"api": {"keys_file": 5}}) == ["config.json: api.keys_file: 5 is not a path (a string)"]


# --- show and the default file ------------------------------------------------------------------------------------


def test_show_lists_every_setting_once() -> None:
    found = settings.load(write({"server": {"port": 81}}), None, {})
    rows = settings.show(found)
    names = {f"{section}.{key}" for section, model in config.sections().items() for key in model.model_fields}
    assert [row.key for row in rows] == list(dict.fromkeys(row.key for row in rows))
    assert {row.key for row in rows} == names == set(found.sources)
    port = next(row for row in rows if row.key == "server.port")
    assert (port.value, port.source) == ("81", "config.json")
    assert all(row.description for row in rows)


def test_default_file_has_all_sections_and_only_defaults() -> None:
    path = ROOT / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data) == list(Config.model_fields)
    found = settings.load(path, None, {}).config
    assert found == Config.model_validate({"models": {"directory": ROOT / "models"}})


def test_loading_is_quick() -> None:
    """Client commands load the settings each time; neither aiohttp nor rich may come along."""
    code = "import sys, supervisor.settings; print(sorted({'aiohttp', 'rich', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
