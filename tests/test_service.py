"""The systemd unit, and what systemd is told."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest
from fake_supervisor import run
from test_live import World

from supervisor.config import Config
from supervisor.notify import Notifier
from supervisor.settings import Settings
from supervisor.setup.service import Service, quoted

# The unit


def unit(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in list(os.environ):
        if name.startswith("LLAMA_SUPERVISOR_"):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize("kind", ["--system", "--user"])
def test_the_unit_is_good(here, kind):
    odd = here / "a folder with 100% 'odd' $names"
    odd.mkdir()
    config = odd / "config.json"
    config.write_text(json.dumps({"server": {"drain_seconds": 100}, "logging": {"directory": "logs"}}))
    result = run("install-service", kind, "--print", "--config", str(config))
    assert (result.exit_code, result.stderr) == (0, "")
    found = unit(result.stdout)
    assert (found["Type"], found["KillMode"], found["NoNewPrivileges"]) == ("notify", "mixed", "yes")
    assert found["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(found["TimeoutStopSec"]) > 100 + 5 + 30
    assert ("ProtectSystem" in found) == ("User" in found) == (kind == "--system")
    assert list((here / "user").rglob("*")) == []
    if shutil.which("systemd-analyze"):
        (here / "test.service").write_text(result.stdout.replace("network-online.target", ""))
        command = ["systemd-analyze", "verify", str(here / "test.service")]
        command[1:1] = ["--user"] if kind == "--user" else []
        verified = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (verified.returncode, verified.stderr) == (0, "")


def test_a_users_unit_is_written(here):
    result = run("install-service", "--user", "--name", "models", "--json")
    found = json.loads(result.stdout)
    path = here / "user" / "systemd" / "user" / "models.service"
    assert found["path"] == str(path)
    assert path.read_text() == found["unit"]
    assert f"WorkingDirectory={here}\n" in found["unit"]
    assert "systemctl --user enable --now models" in found["next"]
    assert "systemctl --user daemon-reload" in run("install-service", "--user").stdout


def test_a_systems_unit_may_write_where_the_settings_say():
    folders = {"runtime_dir": "/run/x", "directory": "/var/log/a b"}
    config = Config.model_validate(
        {"server": {"runtime_dir": folders["runtime_dir"]}, "logging": {"directory": folders["directory"]}}
    )
    service = Service("x", Settings(config, None, Path("/srv"), {}), "nobody")
    found = unit(service.text())
    assert service.path == Path("/etc/systemd/system/x.service")
    assert found["ReadWritePaths"] == '-/run/x "-/var/log/a b"'
    assert "RuntimeDirectory" not in found
    assert (found["User"], found["CapabilityBoundingSet"]) == ("nobody", "")


@pytest.mark.parametrize("args", [["--user", "--run-as", "x"], ["--name", "../x"], ["--name", ""]])
def test_what_makes_no_unit(here, args):
    assert run("install-service", "--print", *args).exit_code == 2


@pytest.mark.parametrize(
    ("word", "written"), [("a", "a"), ("a b", '"a b"'), ("", '""'), ('"\\', '"\\"\\\\"'), ("$a%b", "$$a%%b")]
)
def test_words_are_quoted(word, written):
    assert quoted(word) == written


# What systemd is told


class Manager:
    """What systemd is: a socket that gets lines."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(30)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(65536).decode().split("\n"))

    def until(self, name: str) -> dict[str, str]:
        while name not in (found := self.next()):
            pass
        return found


@pytest.fixture
def manager(short_tmp: Path) -> Iterator[Manager]:
    made = Manager(str(short_tmp / "notify"))
    yield made
    made.socket.close()


def test_messages(manager, short_tmp):
    environ = {"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "6000000", "OTHER": "1"}
    notifier = Notifier(environ)
    assert environ == {"OTHER": "1"}  # no child finds them
    assert (notifier.is_on, notifier.pause) == (True, 2.0)
    notifier.ready("a")
    assert manager.next() == {"READY": "1", "STATUS": "a"}
    notifier.reloading()
    assert int(manager.until("RELOADING")["MONOTONIC_USEC"]) > 0
    notifier.alive("b")
    assert manager.next() == {"WATCHDOG": "1", "STATUS": "b"}
    notifier.ill("c")
    assert manager.next() == {"STATUS": "c"}
    notifier.stopping("d")
    assert manager.next() == {"STOPPING": "1", "STATUS": "d"}


def test_another_process_is_watched(manager, short_tmp):
    environ = {"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    Notifier(environ).alive("a")
    assert manager.next() == {"STATUS": "a"}


def test_an_abstract_socket():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"llama-supervisor-test-{os.getpid()}"
        listener.bind("\0" + name)
        listener.settimeout(10)
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready("a")
        assert listener.recv(100) == b"READY=1\nSTATUS=a"


def test_nobody_listens(short_tmp, caplog):
    Notifier({}).ready("a")
    assert not Notifier({}).is_on
    assert caplog.text == ""
    Notifier({"NOTIFY_SOCKET": str(short_tmp / "none")}).ready("a")
    assert "systemd cannot be told READY=1" in caplog.text


def test_a_change_of_state_waits_while_the_queue_is_full(manager, short_tmp):
    notifier = Notifier({"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "300000"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, pytest.raises(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"STATUS=old", str(short_tmp / "notify"))
    notifier.alive("lost")
    slow = threading.Timer(0.2, manager.next)
    slow.start()
    notifier.ready("here")
    slow.join()
    seen = manager.until("READY")
    assert seen["STATUS"] == "here"


async def test_a_life_under_systemd(manager, short_tmp):
    world = World(short_tmp)
    world.write(models={"preload": ["one"]})
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_SUPERVISOR_")}
    env |= {"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "300000"}
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor", "start", "--config", str(world.file)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await asyncio.to_thread(manager.until, "READY")
        while "one loaded" not in (await asyncio.to_thread(manager.until, "WATCHDOG"))["STATUS"]:
            pass
        (child,) = psutil.Process(process.pid).children()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys()
        world.file.write_text("{")
        process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(manager.until, "RELOADING")
        assert (await asyncio.to_thread(manager.until, "READY"))["STATUS"].startswith("bad configuration")
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(manager.until, "STOPPING")
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


async def test_the_watchdog_hears_nothing_while_models_are_not_started_as_they_must(manager, short_tmp, monkeypatch):
    from supervisor import process

    notifier = Notifier({"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "30000"})
    world = World(short_tmp)
    async with AsyncExitStack() as stack:
        await world.start(stack)
        monkeypatch.setattr(world.fleet, "problems", lambda: ["stuck"])
        telling = asyncio.create_task(process.report(world.supervisor, notifier))
        assert await asyncio.to_thread(manager.next) == {"STATUS": "stuck"}
        monkeypatch.undo()
        assert (await asyncio.to_thread(manager.until, "WATCHDOG"))["STATUS"].startswith("no model loaded; 0 requests")
        telling.cancel()
