"""The configuration changes while models run, with children that say what reached them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import gguf_files
import pytest
from test_gate import FAKE

from supervisor import app, live
from supervisor.entry import State
from supervisor.errors import ConfigInvalid
from supervisor.live import FIXED
from supervisor.scheduler import Limits, Scheduler, Stop
from supervisor.settings import load as load_settings

CHAT = "/v1/chat/completions"

Json = dict[str, Any]


class World:
    """A supervisor with a configuration file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.json"
        models = folder / "models"
        models.mkdir()
        for name in ("one", "two"):
            (models / f"{name}.gguf").write_bytes(gguf_files.gguf(gguf_files.llama()))
        binary = folder / "fake"
        binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
        binary.chmod(0o755)
        self.config: Json = {
            "server": {"port": 0, "llama_server": "fake", "runtime_dir": "run", "drain_seconds": 1},
            "models": {"settle_seconds": 0, "overrides": {}},
            "atlas": {"memory_directory": "memory"},
            "api": {"require_keys": False},
            "logging": {"directory": "logs"},
        }
        self.write()

    def write(self, **sections: Json) -> None:
        for section, values in sections.items():
            self.config.setdefault(section, {}).update(values)
        self.file.write_text(json.dumps(self.config))

    async def start(self, stack: AsyncExitStack) -> None:
        def load() -> Any:
            return load_settings(self.file, environ={})

        self.supervisor = await stack.enter_async_context(app.supervisor(load(), load))
        await self.supervisor.live.stop()  # the tests look themselves
        self.live = self.supervisor.live
        self.fleet = self.supervisor.fleet
        self.http = await stack.enter_async_context(aiohttp.ClientSession(self.supervisor.urls[0]))

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.http.request(method, path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def reload(self, **sections: Json) -> live.Outcome:
        self.write(**sections)
        return await self.live.reload("test")

    def pid(self, model: str) -> int | None:
        child = self.fleet.children.get(model)
        return child.pid if child else None


@pytest.fixture
async def world(short_tmp: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        made = World(short_tmp)
        await made.start(stack)
        yield made


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def begin_stream(world: World, model: str) -> aiohttp.ClientResponse:
    body = {"model": model, "say": ["data: 1\n\n"], "type": "text/event-stream", "hang": True}
    response = await world.http.post(CHAT, json=body)
    assert await response.content.readline() == b"data: 1\n"
    return response


async def test_only_models_with_other_settings_start_anew(world):
    streams = [await begin_stream(world, model) for model in ("one", "two")]
    before = {model: world.pid(model) for model in ("one", "two")}
    outcome = await world.reload(models={"overrides": {"two": {"context_size": 512}}})
    assert outcome == live.Outcome(["models.overrides.two.context_size"], ["two"], [])
    assert world.fleet.scheduler.entry("one").state is State.READY
    assert world.fleet.scheduler.entry("two").state is State.DRAINING  # its stream goes on
    asking = asyncio.create_task(world.ask("POST", CHAT, {"model": "two"}))
    await until(lambda: world.fleet.scheduler.entry("two").waiters)
    assert not any(stream.content.at_eof() for stream in streams)
    streams[1].close()
    assert (await asking)[0] == 200
    assert world.pid("one") == before["one"]
    assert world.pid("two") != before["two"]
    assert "512" in world.fleet.children["two"].command
    assert not streams[0].content.at_eof()
    streams[0].close()


@pytest.mark.parametrize(
    ("sections", "anew"),
    [
        ({"models": {"max_loaded_models": 5, "idle_unload_seconds": 999}}, False),
        ({"inference": {"queue_limit": 1}, "logging": {"level": "debug"}, "server": {"stop_seconds": 9}}, False),
        ({"models": {"overrides": {"one": {"pin": True}}}}, False),
        ({"models": {"overrides": {"two": {"args": ["--x"], "aliases": ["zwei"]}}}}, False),
        ({"performance": {"threads": 3}}, True),
        ({"models": {"overrides": {"one": {"env": {"A": "1"}}}}}, True),
        ({"models": {"overrides": {"one": {"aliases": ["eins"]}}}}, True),
        ({"monitoring": {"child_metrics": False}}, True),
        ({"atlas": {"enabled": "auto"}}, True),
    ],
)
async def test_what_makes_a_model_start_anew(world, sections, anew):
    assert (await world.ask("POST", CHAT, {"model": "one"}))[0] == 200
    pid = world.pid("one")
    outcome = await world.reload(**sections)
    assert outcome.changed
    assert outcome.restarted == (["one"] if anew else [])
    for alias in sections.get("models", {}).get("overrides", {}).get("one", {}).get("aliases", ["one"]):
        assert (await world.ask("POST", CHAT, {"model": alias}))[0] == 200
    assert (world.pid("one") != pid) == anew
    assert await world.reload() == live.Outcome()


async def test_another_llama_server_is_started(world, short_tmp):
    assert (await world.ask("POST", CHAT, {"model": "one"}))[0] == 200
    (short_tmp / "fake2").write_text((short_tmp / "fake").read_text())
    (short_tmp / "fake2").chmod(0o755)
    outcome = await world.reload(server={"llama_server": "fake2"})
    assert outcome.restarted == ["one"]
    assert (await world.ask("POST", CHAT, {"model": "one"}))[0] == 200
    assert world.fleet.children["one"].command[0] == str(short_tmp / "fake2")


async def test_rules_hold_for_running_models_at_once(world):
    for model in ("one", "two"):
        assert (await world.ask("POST", CHAT, {"model": model}))[0] == 200
    await world.reload(models={"overrides": {"two": {"pin": True, "idle_unload_seconds": 77}}})
    entry = world.fleet.scheduler.entry("two")
    assert (entry.pinned, entry.idle_unload) == (True, 77)
    await world.reload(models={"max_loaded_models": 1})
    await until(lambda: world.pid("one") is None)
    assert world.fleet.running() == ["two"]


async def test_a_bad_file_changes_nothing_and_is_told_everywhere(world):
    stream = await begin_stream(world, "one")
    good = world.live.settings
    world.file.write_text('{"server": {"prot": 1}, "models": {"max_loaded_models": 0}}')
    with pytest.raises(ConfigInvalid):
        await world.live.reload("test")
    assert world.live.settings is good
    _, status = await world.ask("GET", "/api/v1/status")
    _, config = await world.ask("GET", "/api/v1/config")
    code, answer = await world.ask("POST", "/api/v1/config/reload")
    assert (code, answer["error"]["code"]) == (422, "config_invalid")
    assert len(config["problems"]) == 2
    assert config["problems"] == status["problems"] == answer["error"]["problems"]
    assert not stream.content.at_eof()
    stream.close()
    world.file.unlink()
    assert (await world.ask("POST", "/api/v1/config/reload"))[0] == 422
    world.write()
    assert await world.ask("POST", "/api/v1/config/reload") == (
        200,
        {"changed": [], "restarted": [], "restart_needed": []},
    )
    assert (await world.ask("GET", "/api/v1/status"))[1]["problems"] == []


async def test_what_only_a_new_start_takes_over_is_named(world):
    port = world.supervisor.config.server.port
    outcome = await world.reload(server={"port": 1, "drain_seconds": 2})
    assert outcome == live.Outcome(["server.drain_seconds"], [], ["server.port"])
    assert (world.supervisor.config.server.port, world.supervisor.config.server.drain_seconds) == (port, 2)
    for path in ("/api/v1/status", "/api/v1/config"):
        assert (await world.ask("GET", path))[1]["restart_needed"] == ["server.port"]
    await world.reload(server={"port": port})
    assert world.live.restart_needed == []


def test_the_docs_name_what_needs_a_new_start():
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    for section, key in FIXED:
        assert f"`{section}.{key}`" in text.partition("## Changes while it runs")[2]


async def test_the_configuration_is_shown(world):
    await world.reload(models={"overrides": {"one": {"env": {"API_KEY": "geheim"}}}})
    _, config = await world.ask("GET", "/api/v1/config")
    rows = {row["key"]: row for row in config["settings"]}
    assert rows["server.drain_seconds"] | {"description": ""} == {
        "key": "server.drain_seconds",
        "value": 1,
        "source": "config.json",
        "description": "",
    }
    assert "geheim" not in json.dumps(config)
    assert config["path"] == str(world.file)


async def test_a_changed_file_is_taken_over_once_it_stands_still(world):
    world.live._seen = live.signature(world.file)
    await world.live.look()
    world.file.write_text('{"server": {')  # half written
    await world.live.look()
    world.write(inference={"queue_limit": 7})
    await world.live.look()
    assert world.supervisor.config.inference.queue_limit == 256
    assert world.live.problems == []
    await world.live.look()
    assert world.supervisor.config.inference.queue_limit == 7
    world.file.write_text("{")
    await world.live.look()
    with pytest.raises(ConfigInvalid):
        await world.live.look()
    await world.live.look()  # told once
    assert world.supervisor.config.inference.queue_limit == 7


async def test_the_file_is_followed(world, monkeypatch):
    monkeypatch.setattr(live, "POLL_SECONDS", 0.01)
    world.live.follow()
    world.write(inference={"queue_limit": 9})
    await until(lambda: world.supervisor.config.inference.queue_limit == 9)
    world.file.write_text("{")
    await until(lambda: world.live.problems)
    world.write(inference={"queue_limit": 10})
    await until(lambda: world.supervisor.config.inference.queue_limit == 10)
    assert world.live.problems == []


async def test_an_error_that_nobody_foresaw_changes_nothing(world, monkeypatch):
    async def fail() -> None:
        raise OSError("the disk is gone")

    good, models = world.live.settings, world.supervisor.catalog.settings
    monkeypatch.setattr(world.supervisor.catalog, "rescan", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        await world.reload(models={"unknown_model": "default"})
    assert world.live.settings is good
    assert world.supervisor.catalog.settings is models


async def test_a_model_that_failed_may_start_at_once(world, short_tmp):
    await world.reload(server={"llama_server": "/bin/false"})
    assert (await world.ask("POST", CHAT, {"model": "one"}))[0] == 503
    assert world.fleet.scheduler.entry("one").state is State.FAILED
    await world.reload(server={"llama_server": "fake"})
    assert (await world.ask("POST", CHAT, {"model": "one"}))[0] == 200


def test_models_that_are_too_many_go():
    s = Scheduler(Limits(max_loaded=3))
    for number, model in enumerate("abc"):
        s.load(model, number)
        s.ready(model, number)
    s.request(1, "a", 5)
    s.entry("b").pinned = True
    assert s.set_limits(Limits(max_loaded=1), 6) == [Stop("c", "fewer models may run")]
    assert s.entry("a").state is State.DRAINING
    assert s.entry("b").state is State.READY
    assert s.set_limits(Limits(max_loaded=0), 7) == []


async def test_sighup_reloads_and_sigterm_stops(short_tmp):
    """The process, not attached to a terminal."""
    world = World(short_tmp)
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_SUPERVISOR_")}
    command = [sys.executable, "-m", "supervisor", "start", "--config", str(world.file)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=env, stderr=pipe, stdout=pipe, start_new_session=True)
    assert process.stderr is not None

    async def line_with(text: str) -> None:
        async with asyncio.timeout(30):
            while text not in (line := (await process.stderr.readline()).decode()):
                assert line, f"ended before {text!r}"

    try:
        await line_with("the default is")
        world.write(inference={"queue_limit": 3})
        process.send_signal(signal.SIGHUP)
        await line_with("SIGHUP; changed settings: inference.queue_limit")
        world.file.write_text("{")
        process.send_signal(signal.SIGHUP)
        await line_with("the one from before stays in force")
        process.send_signal(signal.SIGTERM)
        await line_with("stopped")
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
