"""The extension loads in both generations of KAREN's host, as they check it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from karen_host import EXTENSION, GENERATIONS, Host, LoadError, Role, names_of
from pydantic import ValidationError

import supervisor


def manifest_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXTENSION / name).read_text())
    return found


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_loads_and_answers_hooks(extensions: Path, generation: str, scripted) -> None:
    before = set(sys.modules)
    host = Host(extensions, generation, {"url": scripted.url})
    extension = await host.start()
    assert not {name for name in set(sys.modules) - before if "handler" in name}
    assert type(extension).__name__ == "LlamaSupervisorExtension"
    assert extension._options["url"] == scripted.url  # both ways of handing over the configuration
    results = await host.chat({"prompt": "Hi"}, {"error": "timeout"})
    assert list(results) == ["llama-supervisor"]
    assert results["llama-supervisor"]["local_inference_used"] is True
    await host.stop()


@pytest.mark.parametrize(
    ("policy", "alone", "beside"),
    [
        ("off", None, "Remote."),
        ("fallback", "Hello there", "Remote."),
        ("prefer_local", "Hello there", "Hello there"),
        ("hybrid", "Hello there", "Remote."),
    ],
)
async def test_each_policy(extensions: Path, generation: str, scripted, policy: str, alone: Any, beside: str) -> None:
    host = Host(extensions, generation, {"url": scripted.url, "policy": policy})
    await host.start()
    data: dict[str, Any] = {"prompt": "Hi"}
    await host.chat(data)
    assert data.get("result") == alone
    data = {"prompt": "Hi"}
    await host.chat(data, "Remote.")
    assert data["result"] == beside
    await host.stop()


@pytest.mark.parametrize("role", [None, *(role.value for role in Role)])
async def test_every_role_may_use_it(extensions: Path, generation: str, scripted, role: str | None) -> None:
    host = Host(extensions, generation, {"url": scripted.url})
    await host.start()
    assert list(await host.run("pre_llm_prompt", {"prompt": "Hi"}, role=role)) == ["llama-supervisor"]
    assert await host.run("pre_llm_prompt", {}, role="nobody") == {}
    await host.stop()


async def test_a_link_to_the_folder_is_as_good(tmp_path: Path, generation: str, scripted) -> None:
    (tmp_path / "llama_supervisor").symlink_to(EXTENSION, target_is_directory=True)
    host = Host(tmp_path, generation, {"url": scripted.url})
    extension = await host.start()
    assert "memories" in extension._prompt.user  # prompt.txt was found
    await host.stop()


async def test_it_works_outside_karen_too(extensions: Path, scripted) -> None:
    import importlib.util
    from types import SimpleNamespace

    spec = importlib.util.spec_from_file_location("alone", extensions / "llama_supervisor" / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = module.LlamaSupervisorExtension(SimpleNamespace(), {"url": scripted.url})
    data = {"prompt": "Hi", "result": ""}
    result = await extension.execute_hook("post_llm_result", SimpleNamespace(data=data))
    assert (result["local_inference_used"], data["result"]) == (True, "Hello there")
    await extension.shutdown()


def test_loading_opens_and_starts_nothing(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import subprocess
    import threading

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a side effect")

    for owner, name in ((socket, "socket"), (subprocess, "Popen"), (threading.Thread, "start")):
        monkeypatch.setattr(owner, name, refuse)
    Host(extensions, "A").load(extensions / "llama_supervisor")


# The hosts refuse what KAREN refuses, or these tests would prove nothing


@pytest.mark.parametrize("change", [{"extra": 1}, {"id": "llama-supervisor"}, {"hook_points": []}, {"version": "1"}])
def test_schema_a_refuses(extensions: Path, change: dict[str, Any]) -> None:
    path = extensions / "llama_supervisor" / "extension_manifest.json"
    path.write_text(json.dumps(manifest_of("extension_manifest.json") | change))
    with pytest.raises(ValidationError):
        Host(extensions, "A").load(path.parent)


@pytest.mark.parametrize("change", [{"name": "llama_supervisor"}, {"license": None}, {"dependencies": []}])
def test_schema_b_refuses(extensions: Path, change: dict[str, Any]) -> None:
    path = extensions / "llama_supervisor" / "plugin_manifest.json"
    path.write_text(json.dumps(manifest_of("plugin_manifest.json") | change))
    with pytest.raises(ValidationError):
        Host(extensions, "B").load(path.parent)


def test_a_legacy_manifest_is_refused(extensions: Path) -> None:
    path = extensions / "llama_supervisor" / "plugin_manifest.json"
    path.write_text(json.dumps(manifest_of("plugin_manifest.json") | {"intent": "chat"}))
    with pytest.raises(LoadError):
        Host(extensions, "B").load(path.parent)


def test_a_class_of_another_base_is_refused(extensions: Path, generation: str) -> None:
    handler = extensions / "llama_supervisor" / "handler.py"
    handler.write_text(handler.read_text().replace("_Base: Any = types.new_class", "_Base: Any = object  # "))
    with pytest.raises((LoadError, TypeError)):
        Host(extensions, generation).load(handler.parent)


async def test_who_raises_or_is_late_is_left_out(extensions: Path) -> None:
    import asyncio

    host = Host(extensions, "A", {"policy": "off"}, timeout=0.01)
    extension = await host.start()

    async def raising(*args: Any) -> None:
        raise RuntimeError

    async def late(*args: Any) -> None:
        await asyncio.sleep(60)

    for bad in (raising, late):
        extension.execute_hook = bad
        assert await host.run("pre_llm_prompt", {}) == {}


# The manifests and the page


@pytest.mark.parametrize("name", ["extension_manifest.json", "plugin_manifest.json"])
def test_manifests_say_what_the_handler_does(extensions: Path, name: str) -> None:
    raw = manifest_of(name)
    handler = names_of(Host(extensions, "A").load(extensions / "llama_supervisor"))
    described = raw["config_schema"]["properties"]
    assert {key: one["default"] for key, one in described.items()} == handler.DEFAULTS
    assert {key: tuple(one["enum"]) for key, one in described.items() if "enum" in one} == handler.CHOICES
    assert {key: (one["minimum"], one["maximum"]) for key, one in described.items() if "minimum" in one} == (
        handler.RANGES
    )
    assert raw["version"] == supervisor.__version__
    assert raw["hook_points"] == [handler.PRE, handler.POST]
    assert (EXTENSION / raw["prompt_files"]["system"]).is_file()


def test_the_page_names_every_option_and_key(extensions: Path) -> None:
    handler = names_of(Host(extensions, "A").load(extensions / "llama_supervisor"))
    page = (EXTENSION.parent / "docs" / "karen.md").read_text()
    rows = {
        row[1]: (row[2] == " *", row[3].strip("`")) for row in re.finditer(r"\| `(\w+)`( \*)? \| ([^|]*?) ?\|", page)
    }
    described = {key: rows[key] for key in handler.DEFAULTS}
    shown = {True: "true", False: "false"}
    for key, value in handler.DEFAULTS.items():
        default = shown[value] if isinstance(value, bool) else value if isinstance(value, str) else f"{value:g}"
        assert described[key] == (key in handler.PER_CALL, default), key
    for group in ("TEXTS", "HISTORIES", "RESULTS", "MEMORIES", "SESSIONS", "INSIDE", "ERRORS", "FAILED"):
        assert not [name for name in getattr(handler, group) if f"`{name}`" not in page], group
    assert handler.KEY_VARIABLE in page
    assert all(f"{{{{ {name} }}}}" in page for name in handler.PLACEHOLDERS)
