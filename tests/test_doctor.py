"""The doctor: each trouble is found, and told with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import platformdirs
import pytest

from supervisor.config import Config
from supervisor.setup import doctor, native, toolchain
from supervisor.setup.doctor import Check

SERIES = native.patch_series()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "models").mkdir()
    return Config.model_validate(
        {
            "server": {"port": 0, "runtime_dir": "/tmp/doctor-test", "llama_server": server(tmp_path, SERIES)},
            "models": {"directory": tmp_path / "models"},
        }
    )


def server(folder: Path, patches: str | None) -> Path:
    """Make a program that tells the version of a llama-server."""
    script = folder / "llama-server"
    lines = ["#!/bin/sh", "echo 'version: 0.6.0 (build 11434, commit b11434)' >&2"]
    lines += [f"echo 'patches: {patches}' >&2"] if patches else []
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return script


def changed(config: Config, section: str, **values: object) -> Config:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def look(config: Config, name: str, path: Path | None = None, problems: tuple[str, ...] = ()) -> Check:
    found = [check for check in doctor.checks(config, path, problems) if check.name == name]
    assert len(found) == 1
    return found[0]


def test_all_names_and_nothing_fails_on_a_good_machine(config: Config) -> None:
    (config.models.directory / "a.gguf").write_bytes(b"GGUF")
    found = doctor.checks(config)
    names = [check.name for check in found]
    expected = ["configuration", "python", "uvloop", "compiler", "zstd headers", "ccache", "git", "llama-server"]
    expected += ["backend", "cpu", "memory", "disk (cache)", "disk (models)", "models", "runtime folder", "port"]
    assert [name for name in names if name in expected] == expected
    assert len(names) == len(set(names))
    troubles = [check for check in found if check.status != "ok"]
    assert all(check.advice for check in troubles)
    assert not any(check.advice for check in found if check.status == "ok")


def test_configuration(config: Config, tmp_path: Path) -> None:
    assert look(config, "configuration").found == "no file, the defaults"
    assert look(config, "configuration", tmp_path / "config.json").found == str(tmp_path / "config.json")
    bad = look(config, "configuration", tmp_path, ("server.port: too large", "modles: unknown"))
    assert (bad.status, bad.found) == ("fail", "server.port: too large; modles: unknown")


def test_an_old_python(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (sys.version_info[0], sys.version_info[1] + 1))
    assert look(config, "python").status == "fail"


def test_no_compiler_matters_until_the_server_is_built(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    monkeypatch.setattr(toolchain, "os_family", lambda: "alpine")
    missing = look(config, "compiler")
    assert (missing.status, missing.advice) == ("fail", "sudo apk add build-base linux-headers")
    monkeypatch.setattr(native, "find_server", lambda: config.server.llama_server)
    assert look(config, "compiler").status == "warn"


def test_missing_headers_and_tools(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "has_zstd", lambda compiler: False)
    monkeypatch.setattr(toolchain, "os_family", lambda: "arch")
    monkeypatch.setattr(toolchain, "find_build_tools", lambda tools: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "find_server", lambda: None)
    zstd = look(config, "zstd headers")
    assert (zstd.status, zstd.advice) == ("fail", "sudo pacman -S --needed zstd")
    assert look(config, "cmake and ninja").status == "warn"
    assert look(config, "ccache").found.startswith("absent")


class TestServer:
    def test_ours(self, config: Config) -> None:
        check = look(config, "llama-server")
        assert (check.status, check.advice) == ("ok", "")
        assert f"b11434, patches {SERIES}" in check.found

    def test_not_built(self, config: Config) -> None:
        check = look(changed(config, "server", llama_server=None), "llama-server")
        assert (check.status, check.found, check.advice) == ("fail", "not built", "llama-supervisor build")

    def test_stock(self, config: Config, tmp_path: Path) -> None:
        server(tmp_path, None)
        check = look(config, "llama-server")
        assert check.status == "warn"
        assert "stock" in check.advice

    def test_older_patches(self, config: Config, tmp_path: Path) -> None:
        server(tmp_path, "llama-supervisor-1-00000000")
        check = look(config, "llama-server")
        assert check.status == "warn"
        assert check.advice == f"llama-supervisor build, for the patches {SERIES}"

    def test_does_not_run(self, config: Config, tmp_path: Path) -> None:
        (tmp_path / "llama-server").write_text("#!/bin/sh\necho 'libcudart.so.12: not found' >&2; exit 127\n")
        check = look(config, "llama-server")
        assert check.status == "fail"
        assert "libcudart.so.12: not found" in check.found


class TestBackend:
    def test_a_gpu_without_the_toolkit(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(toolchain, "has_nvidia_gpu", lambda: True)
        check = look(config, "backend")
        assert check.status == "warn"
        assert "CUDA toolkit" in check.advice

    def test_a_cpu_build_beside_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "pick_backend", lambda wanted: "cuda")
        assert doctor._backend("cpu").advice == "llama-supervisor build --backend cuda"
        assert doctor._backend("cuda").status == "ok"


class TestModels:
    def test_count(self, config: Config) -> None:
        assert look(config, "models").status == "warn"
        (config.models.directory / "deep").mkdir()
        for name in ("a.gguf", "deep/b.gguf", "c.txt"):
            (config.models.directory / name).write_bytes(b"GGUF")
        assert look(config, "models").found == f"2 GGUF files in {config.models.directory}"

    def test_missing(self, config: Config, tmp_path: Path) -> None:
        check = look(changed(config, "models", directory=tmp_path / "no"), "models")
        assert check.status == "warn"
        assert check.advice.startswith("llama-supervisor pull smollm2")

    def test_not_a_folder(self, config: Config, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert look(changed(config, "models", directory=tmp_path / "file"), "models").status == "warn"


class TestRuntimeFolder:
    def test_too_long(self, config: Config) -> None:
        check = look(changed(config, "server", runtime_dir=Path("/tmp") / ("x" * 90)), "runtime folder")
        assert check.status == "fail"
        assert "server.runtime_dir" in check.advice

    def test_there_already(self, config: Config) -> None:
        assert look(changed(config, "server", runtime_dir=Path("/tmp")), "runtime folder").status == "ok"

    def test_a_file_or_link_in_its_place(self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "MAX_SOCKET_PATH", 1000)
        (tmp_path / "link").symlink_to(tmp_path)
        assert look(changed(config, "server", runtime_dir=tmp_path / "link"), "runtime folder").status == "fail"

    def test_not_writable(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        check = doctor._runtime_folder(Path("/tmp/doctor-test"))
        assert (check.status, check.found) == ("fail", "/tmp/doctor-test cannot be made: /tmp is not writable")


class TestPort:
    def test_free_and_taken(self, config: Config) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            taken = look(changed(config, "server", port=port), "port")
        assert taken.status == "warn"
        assert f"127.0.0.1:{port}" in taken.found
        assert look(changed(config, "server", port=port), "port").status == "ok"

    def test_no_such_address(self, config: Config) -> None:
        assert look(changed(config, "server", host="192.0.2.1", port=8080), "port").status == "warn"


def test_low_disk(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check = look(config, "disk (cache)")
    assert (check.status, check.advice) == ("warn", "a build needs 1.1 GB: make room")


def test_keys(config: Config, tmp_path: Path) -> None:
    def found(**api: object) -> Check:
        return look(changed(config, "api", **api), "API keys")

    path = tmp_path / "keys.json"
    assert found(require_keys=False, keys_file=path).status == "ok"
    missing = found(keys_file=path)
    assert (missing.status, missing.advice) == ("warn", "llama-supervisor key add NAME")
    path.write_text("{")
    path.chmod(0o644)
    bad = found(keys_file=path)
    assert (bad.status, "chmod 600" in bad.found) == ("fail", True)
