"""What is there to build llama-server with: compiler, cmake, ninja, headers, GPU toolkits, cores, memory?"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from supervisor.setup.fetch import SetupError, pip_install
from supervisor.setup.progress import say

if TYPE_CHECKING:
    from rich.console import Console


BACKENDS = ("auto", "cpu", "cuda", "metal", "vulkan")
"""What `--backend` takes."""

OLDEST_CMAKE = (3, 18)
JOB_MEMORY = 3 << 29
"""Bytes that one compiler job may need: 1.5 GiB."""

WHEELS = ["cmake>=3.28,<5", "ninja>=1.11,<2"]
"""What is installed when cmake or ninja are missing."""

INSTALL = {
    "debian": ("apt-get install -y", {"compiler": "build-essential", "zstd": "libzstd-dev", "vulkan": "glslc"}),
    "fedora": ("dnf install -y", {"compiler": "gcc-c++", "zstd": "libzstd-devel", "vulkan": "glslc"}),
    "suse": ("zypper install -y", {"compiler": "gcc-c++", "zstd": "libzstd-devel", "vulkan": "shaderc"}),
    "arch": ("pacman -S --needed", {"compiler": "base-devel", "zstd": "zstd", "vulkan": "shaderc"}),
    "alpine": ("apk add", {"compiler": "build-base linux-headers", "zstd": "zstd-dev", "vulkan": "shaderc"}),
    "macos": ("brew install", {"zstd": "zstd", "vulkan": "shaderc"}),
}
"""The install command and the package of each need, per family of systems."""

FAMILIES = {"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "opensuse": "suse", "sles": "suse"}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler and the first line of what it says about itself."""

    path: Path
    version: str


@dataclass(frozen=True)
class BuildTools:
    """cmake and ninja, with cmake's version."""

    cmake: Path
    ninja: Path
    cmake_version: str


def find_compiler() -> Compiler | None:
    """Return the C++ compiler that cmake would take, or None when it or the C compiler is missing."""
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "cc", "gcc", "clang")):
        return None
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name)
        if path is not None and (line := first_line([path, "--version"])):
            return Compiler(Path(path), line)
    return None


def has_zstd(compiler: Compiler | None) -> bool:
    """Return whether the headers of libzstd are there: for the compiler, or by pkg-config."""
    found = False
    if compiler is not None:
        command = [str(compiler.path), "-E", "-x", "c++", "-"]
        done = subprocess.run(command, input=b"#include <zstd.h>\n", capture_output=True, check=False)
        found = done.returncode == 0
    if not found and shutil.which("pkg-config"):
        done = subprocess.run(["pkg-config", "--exists", "libzstd"], capture_output=True, check=False)
        found = done.returncode == 0
    return found


def os_family(release: str | None = None) -> str:
    """Return which packages this system takes: a key of INSTALL, or `unknown`.

    `release` is the text of os-release; without it this machine is asked.
    """
    if release is None:
        if sys.platform == "darwin":
            return "macos"
        paths = (Path("/etc/os-release"), Path("/usr/lib/os-release"))
        release = next((path.read_text() for path in paths if path.is_file()), "")
    names: list[str] = []
    for key in ("ID", "ID_LIKE"):
        if match := re.search(rf"^{key}=\"?([^\"\n]*)", release, re.MULTILINE):
            names += match[1].split()
    for name in names:
        family = FAMILIES.get(name.split("-")[0], name.split("-")[0])
        if family in INSTALL:
            return family
    return "unknown"


def install_command(family: str, *needs: str) -> str:
    """Return what a person types to get `needs` (`compiler`, `zstd`, `vulkan`) on such a system."""
    commands = []
    if family == "macos" and "compiler" in needs:
        commands.append("xcode-select --install")
        needs = tuple(need for need in needs if need != "compiler")
    if family in INSTALL and needs:
        command, packages = INSTALL[family]
        commands.append(f"{command} {' '.join(packages[need] for need in needs)}")
    if not commands:
        words = {"compiler": "a C++ compiler", "zstd": "the headers of libzstd", "vulkan": "glslc"}
        return f"install {' and '.join(words[need] for need in needs)} with your system's package tool"
    prefix = "" if family == "macos" else "sudo "
    return " && ".join(prefix + command for command in commands)


def ensure_compiler(console: Console) -> Compiler:
    """Return the compiler; as root on Debian and its like, missing packages are installed.

    Raises SetupError with the command to type when there is no compiler, or no headers of libzstd.
    """
    family = os_family()
    compiler = find_compiler()
    needs = [] if compiler else ["compiler"]
    needs += [] if has_zstd(compiler) else ["zstd"]
    if needs and family == "debian" and os.geteuid() == 0 and shutil.which("apt-get"):
        _apt_install([INSTALL["debian"][1][need] for need in needs], console)
        compiler = find_compiler()
        needs = [] if has_zstd(compiler) else ["zstd"]
    if compiler is None:
        raise SetupError(f"there is no C++ compiler: {install_command(family, *needs)}")
    if "zstd" in needs:
        raise SetupError(f"the headers of libzstd are missing: {install_command(family, 'zstd')}")
    return compiler


def find_build_tools(tools: Path) -> BuildTools | None:
    """Return cmake and ninja from PATH, else from the private folder `tools`; None when one is missing."""
    cmake = _first_program("cmake", [tools / "cmake/data/bin/cmake", tools / "bin/cmake"])
    ninja = _first_program("ninja", [tools / "bin/ninja", tools / "ninja/data/bin/ninja"])
    if cmake is None or ninja is None:
        return None
    return BuildTools(cmake, ninja, first_line([str(cmake), "--version"]).removeprefix("cmake version "))


def ensure_build_tools(tools: Path, console: Console) -> BuildTools:
    """Return cmake and ninja; what is missing is installed as wheels into the private folder `tools`."""
    found = find_build_tools(tools)
    if found is None:
        pip_install(WHEELS, tools, console)
        found = find_build_tools(tools)
    if found is None:
        raise SetupError("cmake and ninja do not run here: install both with your system's package tool")
    return found


def find_nvcc() -> Path | None:
    """Return CUDA's compiler: from CUDACXX, PATH, or where the toolkit lies by default."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes.append("/usr/local/cuda")
    return _first_program(os.environ.get("CUDACXX", "nvcc"), [Path(home) / "bin/nvcc" for home in homes])


def nvcc_version() -> str:
    """Return the release of CUDA's compiler, as it says it itself."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ""
    done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=20, check=False)
    return next((line for line in done.stdout.splitlines() if "release" in line), "nvcc")


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA GPU and its driver are there."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return True
    return bool(shutil.which("nvidia-smi")) and "GPU 0" in first_line(["nvidia-smi", "-L"])


def pick_backend(wanted: str) -> str:
    """Return the backend to build: `wanted`, or for `auto` the best that this machine has the tools for.

    Raises SetupError when a backend that was asked for cannot be built here.
    """
    apple = sys.platform == "darwin"
    if wanted == "auto":
        if apple and platform.machine() == "arm64":
            return "metal"
        return "cuda" if not apple and find_nvcc() and has_nvidia_gpu() else "cpu"
    if wanted not in BACKENDS:
        raise SetupError(f"there is no backend {wanted!r}: choose one of {', '.join(BACKENDS)}")
    if wanted == "cuda" and find_nvcc() is None:
        raise SetupError(
            "the cuda backend needs the CUDA toolkit, and nvcc is neither on PATH nor in /usr/local/cuda: "
            "install the toolkit, or set CUDA_HOME"
        )
    if wanted == "vulkan" and shutil.which("glslc") is None:
        command = install_command(os_family(), "vulkan")
        raise SetupError(f"the vulkan backend needs the Vulkan SDK, and glslc is not on PATH: {command}")
    if wanted == "metal" and not apple:
        raise SetupError("the metal backend exists on macOS only: choose another one")
    return wanted


def cpu_identity() -> str:
    """Return a hash of this CPU's model and features: code built for it need not run on another one."""
    text = f"{platform.machine()} {platform.processor()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        block: list[str] = []
        with cpuinfo.open() as lines:  # the first processor's block only: there may be hundreds
            for line in lines:
                if not line.strip():
                    break
                if line.startswith(("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")):
                    block.append(" ".join(line.split()))
        text += "\n".join(block)
    elif sys.platform == "darwin":
        text += first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_jobs() -> int:
    """Return how many compiler jobs to run: one a core, as far as memory goes."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    memory = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:  # a container's own limits, where there are any
        quota, period = (group / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
        if (limit := (group / "memory.max").read_text().strip()) != "max":
            memory = min(memory, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(1, min(cores, memory // JOB_MEMORY))


def first_line(command: list[str]) -> str:
    """Return the first line a program prints on standard output; empty when it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def _first_program(name: str, places: list[Path]) -> Path | None:
    """Return the first of `name` on PATH and `places` that is there and, for cmake, new enough."""
    found = shutil.which(name)
    candidates = ([Path(found)] if found else []) + places
    for path in candidates:
        if os.access(path, os.X_OK) and (name != "cmake" or _is_new_enough(path)):
            return path
    return None


def _is_new_enough(cmake: Path) -> bool:
    match = re.search(r"(\d+)\.(\d+)", first_line([str(cmake), "--version"]))
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST_CMAKE


def _apt_install(packages: list[str], console: Console) -> None:
    """Install Debian packages as root; when the lists of packages are stale or absent, update them first."""
    say(console, f"installing {' '.join(packages)} with apt-get, as a build needs them")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages]
    for command in (install, ["apt-get", "-qq", "update"], install):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if command is install and done.returncode == 0:
            return
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    say(console, f"warning: apt-get could not install them: {reason}")
