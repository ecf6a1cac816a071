"""What would keep this machine from building and serving? Each finding comes with the next step."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.filesize import decimal

from supervisor import api_keys, runtime
from supervisor.config import ApiSection, Config
from supervisor.models.folder_scan import walk
from supervisor.setup import native, toolchain
from supervisor.setup.fetch import SetupError
from supervisor.setup.files import cache_root
from supervisor.setup.toolchain import Compiler

Status = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
BUILD_SPACE = 1 << 30
"""Bytes that should be free in the cache for a build."""
LOW_MEMORY = 2 << 30
"""Bytes of memory under which only the smallest models run."""
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else runtime.MAX_SOCKET_PATH
SOCKET_NAME = "/1234567890/12345.sock"
"""What comes after the runtime folder in a socket's path, at its longest."""

CPU_FEATURES = {
    "x86_64": ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2", "bf16"),
}
"""What ggml has faster code for, in the words of /proc/cpuinfo."""


@dataclass(frozen=True)
class Check:
    """One finding: `warn` works with less comfort, `fail` does not work; `advice` is empty when all is well."""

    name: str
    status: Status
    found: str
    advice: str = ""


def checks(config: Config, path: Path | None = None, problems: Sequence[str] = ()) -> list[Check]:
    """Look at everything and return the findings; nothing is changed.

    `path` is the configuration file in use. When it could not be read, `problems` says why and `config`
    holds the defaults.
    """
    return [
        _configuration(path, problems),
        _python(),
        _uvloop(),
        *_building(),
        *_server(config),
        *_machine(),
        _disk("disk (cache)", cache_root(), BUILD_SPACE),
        _disk("disk (models)", config.models.directory, 0),
        _models(config.models.directory),
        _runtime_folder(config.server.runtime_dir or runtime.default_root()),
        *_ports(config),
        _keys(config.api),
    ]


def _configuration(path: Path | None, problems: Sequence[str]) -> Check:
    if problems:
        return Check("configuration", "fail", "; ".join(problems), "correct these settings")
    return Check("configuration", "ok", str(path) if path else "no file, the defaults")


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "ok", found)


def _uvloop() -> Check:
    if importlib.util.find_spec("uvloop") is None:
        return Check("uvloop", "warn", "absent", "pip install uvloop: the relay is slower without it")
    return Check("uvloop", "ok", "present")


def _building() -> Iterator[Check]:
    family = toolchain.os_family()
    compiler = toolchain.find_compiler()
    yield _compiler(compiler, family)
    if toolchain.has_zstd(compiler):
        yield Check("zstd headers", "ok", "present")
    else:
        status: Status = "warn" if _built() else "fail"
        yield Check("zstd headers", status, "absent", toolchain.install_command(family, "zstd"))
    tools = toolchain.find_build_tools(cache_root() / "tools")
    later = "nothing to do: `llama-supervisor build` installs its own"
    if tools is None:
        yield Check("cmake and ninja", "warn", "not both present", later)
    else:
        yield Check("cmake", "ok", f"{tools.cmake_version} ({tools.cmake})")
        yield Check("ninja", "ok", str(tools.ninja))
    yield _optional("ccache", "makes builds after the first one much faster")
    yield _optional("git", "needed only when the package index has no llama.cpp")


def _compiler(compiler: Compiler | None, family: str) -> Check:
    if compiler is not None:
        return Check("compiler", "ok", compiler.version)
    status: Status = "warn" if _built() else "fail"
    return Check("compiler", status, "none", toolchain.install_command(family, "compiler"))


def _optional(program: str, use: str) -> Check:
    found = shutil.which(program)
    return Check(program, "ok", found) if found else Check(program, "ok", f"absent ({use})")


def _built() -> Path | None:
    try:
        return native.find_server()
    except SetupError:
        return None


def _server(config: Config) -> Iterator[Check]:
    """Which server would run, is it ours and new, and does it use the GPU that is there?"""
    server = config.server.llama_server or _built()
    if server is None:
        yield Check("llama-server", "fail", "not built", "llama-supervisor build")
        yield _backend(None)
        return
    try:
        version, series = native.server_version(server), native.patch_series()
    except SetupError as error:
        yield Check("llama-server", "fail", error.message, "llama-supervisor build")
        yield _backend(None)
        return
    found = f"b{version.build}, patches {version.patches or 'none'} ({server})"
    if version.patches == series:
        yield Check("llama-server", "ok", found)
    elif version.patches is None:
        advice = "a stock server: it serves, but has no ATLAS memory; unset server.llama_server for ours"
        yield Check("llama-server", "warn", found, advice)
    else:
        yield Check("llama-server", "warn", found, f"llama-supervisor build, for the patches {series}")
    facts = native.find_facts(server)
    yield _backend(facts.backend if facts else None)


def _backend(built: str | None) -> Check:
    best = toolchain.pick_backend("auto")
    gpu = toolchain.has_nvidia_gpu()
    found = f"built for {built}, best here {best}" if built else f"best here {best}"
    if gpu and best == "cpu":
        return Check("backend", "warn", f"{found}; an NVIDIA GPU is there", "install the CUDA toolkit, then build")
    if built == "cpu" and best != "cpu":
        return Check("backend", "warn", found, f"llama-supervisor build --backend {best}")
    return Check("backend", "ok", found + ("; an NVIDIA GPU is there" if gpu else ""))


def _machine() -> Iterator[Check]:
    yield Check("cpu", "ok", _cpu())
    memory = psutil.virtual_memory()
    found = f"{decimal(memory.available)} free of {decimal(memory.total)}"
    if memory.available < LOW_MEMORY:
        yield Check("memory", "warn", found, "only small models will fit: close other programs")
    else:
        yield Check("memory", "ok", found)


def _cpu() -> str:
    machine = platform.machine()
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    known = [name for name in CPU_FEATURES.get(machine, ()) if name in flags]
    return " ".join([f"{os.cpu_count() or 1} x {machine}", *known])


def _disk(name: str, folder: Path, needed: int) -> Check:
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    found = f"{decimal(free)} free in {there}"
    if free < needed:
        return Check(name, "warn", found, f"a build needs {decimal(needed)}: make room")
    return Check(name, "ok", found)


def _models(folder: Path) -> Check:
    listing = walk(folder)
    if not folder.is_dir():
        advice = "llama-supervisor pull smollm2, or set models.directory"
        return Check("models", "warn", f"{folder} does not exist", advice)
    if listing.problems:
        return Check("models", "warn", listing.problems[0], "make the folder readable")
    count = len(listing.files)
    found = f"{count} GGUF {'file' if count == 1 else 'files'} in {folder}"
    if not count:
        return Check("models", "warn", found, "put GGUF files there, or: llama-supervisor pull smollm2")
    return Check("models", "ok", found)


def _runtime_folder(folder: Path) -> Check:
    """Can the folder of the sockets be made, private, and with short enough paths in it?"""
    name, advice = "runtime folder", "set server.runtime_dir to a short path of your own"
    length = len(os.fsencode(folder)) + len(SOCKET_NAME)
    if length > MAX_SOCKET_PATH:
        return Check(name, "fail", f"{folder}: sockets in it would have {length} of {MAX_SOCKET_PATH} bytes", advice)
    if folder.is_symlink() or folder.exists():
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            return Check(name, "fail", f"{folder} is not a folder of this user", advice)
        return Check(name, "ok", str(folder))
    there = _nearest(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} cannot be made: {there} is not writable", advice)
    return Check(name, "ok", f"{folder} (will be made)")


def _ports(config: Config) -> Iterator[Check]:
    port = config.server.port
    for host in (part.strip() for part in config.server.host.split(",")):
        where = f"{host}:{port}"
        if port == 0:
            yield Check("port", "ok", f"{where}: the system chooses one")
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            advice = "a supervisor that runs already, or another program: choose another --port"
            yield Check("port", "warn", f"{where}: {error.strerror or error}", advice)
        else:
            yield Check("port", "ok", f"{where} is free")


def _keys(api: ApiSection) -> Check:
    name, path = "API keys", api_keys.path_of(api)
    if not api_keys.required(api, there=path.exists()):
        return Check(name, "ok", "not required")
    try:
        file = api_keys.load(path)
    except api_keys.KeysFileError as error:
        return Check(name, "fail", "; ".join(error.problems), "correct the file: the supervisor does not start with it")
    count = len(file.keys) if file else 0
    if not count:
        return Check(name, "warn", f"required, and none in {path}", "llama-supervisor key add NAME")
    return Check(name, "ok", f"{count} in {path}")


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
