"""Compilers, cmake, ninja, GPU toolkits: what is found, and what to type when it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_native import Transcript

from supervisor.setup import toolchain
from supervisor.setup.fetch import SetupError

RELEASES = {
    "debian": 'PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\n',
    "ubuntu": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
    "fedora": "ID=fedora\n",
    "rocky": 'ID="rocky"\nID_LIKE="rhel centos fedora"\n',
    "arch": "ID=arch\n",
    "alpine": "ID=alpine\n",
    "opensuse": 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n',
    "nixos": "ID=nixos\n",
}


@pytest.fixture
def out() -> Transcript:
    return Transcript()


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("debian", "sudo apt-get install -y build-essential libzstd-dev"),
        ("ubuntu", "sudo apt-get install -y build-essential libzstd-dev"),
        ("fedora", "sudo dnf install -y gcc-c++ libzstd-devel"),
        ("rocky", "sudo dnf install -y gcc-c++ libzstd-devel"),
        ("arch", "sudo pacman -S --needed base-devel zstd"),
        ("alpine", "sudo apk add build-base linux-headers zstd-dev"),
        ("opensuse", "sudo zypper install -y gcc-c++ libzstd-devel"),
        ("nixos", "install a C++ compiler and the headers of libzstd with your system's package tool"),
    ],
)
def test_what_to_type(release: str, command: str) -> None:
    family = toolchain.os_family(RELEASES[release])
    assert toolchain.install_command(family, "compiler", "zstd") == command


def test_what_to_type_on_macos() -> None:
    assert toolchain.install_command("macos", "compiler") == "xcode-select --install"
    both = toolchain.install_command("macos", "compiler", "zstd")
    assert both == "xcode-select --install && brew install zstd"


def test_no_compiler_is_an_error_with_the_command(out: Transcript, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    monkeypatch.setattr(toolchain, "has_zstd", lambda compiler: False)
    monkeypatch.setattr(toolchain, "os_family", lambda: "fedora")
    with pytest.raises(SetupError, match=r"sudo dnf install -y gcc-c\+\+ libzstd-devel"):
        toolchain.ensure_compiler(out.console)


def test_no_zstd_is_an_error_with_the_command(out: Transcript, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toolchain.Compiler(Path("/usr/bin/c++"), "c++ 12")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: compiler)
    monkeypatch.setattr(toolchain, "has_zstd", lambda compiler: False)
    monkeypatch.setattr(toolchain, "os_family", lambda: "arch")
    with pytest.raises(SetupError, match="sudo pacman -S --needed zstd"):
        toolchain.ensure_compiler(out.console)


def test_root_on_debian_gets_what_is_missing(out: Transcript, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toolchain.Compiler(Path("/usr/bin/c++"), "c++ 12")
    asked: list[list[str]] = []

    def apt(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        stale = len(asked) == 1  # the first try fails, as on an image without package lists
        return subprocess.CompletedProcess(command, 100 if stale else 0, "", "E: Unable to locate package")

    monkeypatch.setattr(toolchain, "find_compiler", lambda: compiler if len(asked) == 3 else None)
    monkeypatch.setattr(toolchain, "has_zstd", lambda compiler: len(asked) == 3)
    monkeypatch.setattr(toolchain, "os_family", lambda: "debian")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", apt)
    assert toolchain.ensure_compiler(out.console) is compiler
    assert [command[2] for command in asked] == ["install", "update", "install"]
    assert asked[0][-2:] == ["build-essential", "libzstd-dev"]
    assert "installing build-essential libzstd-dev with apt-get" in out.text


@pytest.mark.parametrize(
    ("system", "machine", "nvcc", "gpu", "expected"),
    [
        ("linux", "x86_64", None, False, "cpu"),
        ("linux", "x86_64", "/usr/bin/nvcc", False, "cpu"),
        ("linux", "x86_64", None, True, "cpu"),
        ("linux", "x86_64", "/usr/bin/nvcc", True, "cuda"),
        ("darwin", "arm64", None, False, "metal"),
        ("darwin", "x86_64", None, False, "cpu"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, nvcc: str | None, gpu: bool, expected: str
) -> None:
    pretend(monkeypatch, system, machine, nvcc, gpu)
    assert toolchain.pick_backend("auto") == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("cuda", "needs the CUDA toolkit"), ("vulkan", "glslc"), ("metal", "macOS only"), ("magic", "choose one of")],
)
def test_a_backend_without_its_tools(monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    pretend(monkeypatch, "linux", "x86_64", None, False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SetupError, match=message):
        toolchain.pick_backend(wanted)


def pretend(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, nvcc: str | None, gpu: bool) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc and Path(nvcc))
    monkeypatch.setattr(toolchain, "has_nvidia_gpu", lambda: gpu)


def test_jobs_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = toolchain.psutil.virtual_memory()
    monkeypatch.setattr(toolchain.psutil, "virtual_memory", lambda: memory._replace(available=1 << 30))
    assert toolchain.default_jobs() == 1


def test_an_old_cmake_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, version in (("old", "3.10.2"), ("tools/cmake/data/bin", "3.31.0")):
        (tmp_path / folder).mkdir(parents=True)
        program = tmp_path / folder / "cmake"
        program.write_text(f"#!/bin/sh\necho cmake version {version}\n")
        program.chmod(0o755)
    ninja = tmp_path / "old/ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "old"))
    assert toolchain.find_build_tools(tmp_path / "nowhere") is None
    found = toolchain.find_build_tools(tmp_path / "tools")
    assert found is not None
    assert (found.cmake_version, found.ninja) == ("3.31.0", ninja)
