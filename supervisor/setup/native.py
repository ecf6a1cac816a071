"""How is the patched llama-server found, or built when it is not there?

A build has its own folder in the cache, named by a hash of everything that goes into it. Its parts appear in
this order, so each tells how far an interrupted build came: `src` (patched, complete), `build` (ninja's own
state), `llama-server`, `build.json`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from supervisor.setup import compile_run, sources, toolchain
from supervisor.setup.fetch import DownloadFailed, SetupError, disk_errors, need_space
from supervisor.setup.files import cache_root, file_lock, link_atomic, sha256_file, try_lock, write_atomic
from supervisor.setup.patching import PatchSeries, patch_series, patches_folder
from supervisor.setup.progress import say
from supervisor.setup.sources import Source
from supervisor.setup.toolchain import Compiler

if TYPE_CHECKING:
    from rich.console import Console


__all__ = [
    "BuildFacts",
    "BuildOptions",
    "BuildResult",
    "ServerVersion",
    "build",
    "build_key",
    "build_needed",
    "find_facts",
    "find_server",
    "find_tool",
    "is_cpu_build",
    "native_folder",
    "parse_version",
    "patch_series",
    "server_version",
]

SERVER = "llama-server"
EVAL = "llama-atlas-eval"

PATCHED_IN = {EVAL: "tools/atlas-eval"}
"""Programs that llama.cpp gets from our patches, each with its folder: built when the series brings that."""

CMAKE_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    f"-DLLAMA_BUILD_NUMBER={sources.BUILD_NUMBER}",
]

BACKEND_OPTIONS = {
    "cpu": ["-DGGML_METAL=OFF"],
    "cuda": ["-DGGML_CUDA=ON"],
    "metal": ["-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"],
    "vulkan": ["-DGGML_VULKAN=ON", "-DGGML_METAL=OFF"],
}

NEEDED_SPACE = {"cuda": 6 << 30}
"""Bytes of disk a build takes, where it is not the usual 700 MiB."""

FLAG_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAARCHS")
"""Environment variables that cmake reads, so that they belong to the key."""

ABANDONED_SECONDS = 7 * 86400
"""Age at which the half-finished builds of other keys are removed."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `cache` and `patches` replace the user's cache folder and the shipped patches."""

    backend: str = "auto"
    source: Path | None = None
    jobs: int | None = None
    keep: bool = False
    cache: Path | None = None
    patches: Path | None = None


class BuildFacts(msgspec.Struct, frozen=True):
    """All about a finished build: the content of `build.json`. `created` is in Unix seconds."""

    key: str
    build: int
    commit: str
    patches: str
    source: str
    backend: str
    options: list[str]
    compiler: str
    cmake: str
    cpu: str
    sha256: str
    seconds: float
    created: float
    programs: list[str] = msgspec.field(default_factory=lambda: [SERVER])


@dataclass(frozen=True)
class BuildResult:
    """Where the server is; `built` is False when it was there already. `seconds` is what this call took."""

    server: Path
    facts: BuildFacts
    built: bool
    seconds: float


@dataclass(frozen=True)
class ServerVersion:
    """What `llama-server --version` says. `patches` is None for a server that is not ours."""

    build: int
    commit: str
    patches: str | None


@dataclass(frozen=True)
class _Recipe:
    """Everything that decides about the result except the source."""

    root: Path
    backend: str
    series: PatchSeries
    compiler: str
    cpu: str

    def options(self, source: Source) -> list[str]:
        own = [f"-DLLAMA_BUILD_COMMIT={source.commit}", f"-DLLAMA_PATCH_SERIES={self.series.label}"]
        return [*CMAKE_OPTIONS, *own, *BACKEND_OPTIONS[self.backend]]

    @property
    def targets(self) -> list[str]:
        """What ninja makes; the tools of llama.cpp that we do not run are left out."""
        return targets(self.series)

    def folder(self, source: Source) -> Path:
        return self.root / build_key(
            source.identity,
            self.series.digest,
            backend=self.backend,
            options=self.options(source),
            compiler=self.compiler,
            cpu=self.cpu,
            programs=self.targets,
        )


def targets(series: PatchSeries) -> list[str]:
    """Return the programs that llama.cpp with this series has for us, the server first."""
    folders = {path.parent.as_posix() for path in series.files}
    return [SERVER, *(name for name, folder in PATCHED_IN.items() if folder in folders)]


def build_key(
    source: str,
    patches: str,
    *,
    backend: str,
    options: list[str],
    compiler: str,
    cpu: str,
    programs: Sequence[str] = (SERVER,),
) -> str:
    """Return the name of a build's folder: a hash of its arguments and of the flags in the environment."""
    flags = {name: os.environ[name] for name in FLAG_VARIABLES if name in os.environ}
    parts = msgspec.json.encode([source, patches, backend, options, compiler, cpu, flags, list(programs)])
    return hashlib.sha256(parts).hexdigest()[:16]


def native_folder(cache: Path | None = None) -> Path:
    """Return the folder of all builds."""
    return (cache or cache_root()) / "native"


def find_server(cache: Path | None = None, patches: Path | None = None) -> Path | None:
    """Return the newest built server for this CPU, one with the present patches first; None when there is none.

    Quick: reads a few small files and starts nothing.
    """
    root = native_folder(cache)
    series, cpu = patch_series(patches), toolchain.cpu_identity()
    current = _finished(root / "current")
    if current is not None and current.patches == series and current.cpu == cpu:
        return root / current.key / SERVER
    found = [facts for path in root.glob("*/build.json") if (facts := _finished(path.parent))]
    found = [facts for facts in found if facts.cpu == cpu]
    best = max(found, key=lambda facts: (facts.patches == series, facts.created), default=None)
    return root / best.key / SERVER if best else None


def find_tool(name: str, cache: Path | None = None, patches: Path | None = None) -> Path | None:
    """Return the program `name` beside the server that `find_server` finds; None when that build has none."""
    server = find_server(cache, patches)
    tool = server.with_name(name) if server else None
    return tool if tool and os.access(tool, os.X_OK) else None


def find_facts(server: Path) -> BuildFacts | None:
    """Return what `build.json` says about a server that we built; None for any other one."""
    return _finished(server.parent)


def is_cpu_build(server: Path) -> bool:
    """Return whether `server` surely uses no GPU; of a server that is not our build, nothing is sure."""
    facts = find_facts(server)
    return facts is not None and facts.backend == "cpu"


def build_needed(options: BuildOptions) -> bool:
    """Return whether `build` would have to compile anything; takes a few hundredths of a second."""
    return _already(options) is None


def build(options: BuildOptions, console: Console) -> BuildResult:
    """Return the server that `options` ask for, building it when it is not in the cache.

    Blocks for minutes; to be called from the command line only. Raises SetupError when something is missing
    or fails. Interrupted, it leaves a state from which the next call goes on.
    """
    started = time.monotonic()
    there = _already(options)
    if there is not None:
        return _use(there, False, started)
    compiler = toolchain.ensure_compiler(console)
    recipe = _recipe(options, compiler)
    failures: list[str] = []
    for source in sources.sources(options.source, recipe.root.parent / "downloads"):
        folder = recipe.folder(source)
        lock = folder.with_suffix(".lock")
        with (
            disk_errors("llama-server cannot be built"),
            file_lock(lock, lambda: say(console, "another build of this is running: waiting for it")),
        ):
            if _finished(folder) is not None:
                return _use(folder, False, started)
            need_space(folder, NEEDED_SPACE.get(recipe.backend, 700 << 20), "building llama-server")
            try:
                _prepare(folder, source, recipe.series, console)
            except DownloadFailed as error:
                failures.append(error.message)
                say(console, f"{error.message}; trying the next source")
                continue
            _compile(folder, source, recipe, options, console)
        _remove_abandoned(recipe.root, folder)
        return _use(folder, True, started)
    raise SetupError(
        "llama.cpp's source could not be had: " + "; ".join(failures) + ". With a llama.cpp tree at hand "
        f"({sources.TAG}), run: llama-supervisor build --source DIR"
    )


def server_version(server: Path) -> ServerVersion:
    """Ask a llama-server for its version; raises SetupError when it does not run or answer."""
    try:
        done = subprocess.run(
            [str(server), "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{server} does not run ({error}): run llama-supervisor build") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise SetupError(f"{server} --version ends with code {done.returncode} ({last})")
    return parse_version(done.stderr + done.stdout)


def parse_version(text: str) -> ServerVersion:
    """Read the output of `llama-server --version`, of our build, of a stock one, and of older ones."""
    match = re.search(r"^version: \S+ \(build (\d+), commit (\S+)\)", text, re.MULTILINE)
    match = match or re.search(r"^version: (\d+) \((\S+)\)", text, re.MULTILINE)
    if match is None:
        raise SetupError("this is not a llama-server: its --version names no build")
    patches = re.search(r"^patches:\s+(\S+)", text, re.MULTILINE)
    return ServerVersion(int(match[1]), match[2], patches[1] if patches else None)


def _recipe(options: BuildOptions, compiler: Compiler) -> _Recipe:
    backend = toolchain.pick_backend(options.backend)
    versions = [compiler.version] + ([toolchain.nvcc_version()] if backend == "cuda" else [])
    series = PatchSeries(options.patches or patches_folder())
    return _Recipe(native_folder(options.cache), backend, series, "; ".join(versions), toolchain.cpu_identity())


def _already(options: BuildOptions) -> Path | None:
    """Return the folder of the finished build that `options` ask for."""
    compiler = toolchain.find_compiler()
    if compiler is not None:
        recipe = _recipe(options, compiler)
        candidates = sources.sources(options.source, recipe.root)
        folders = (recipe.folder(source) for source in candidates)
        return next((folder for folder in folders if _finished(folder)), None)
    # A machine without a compiler, such as a container, keeps what was built for it.
    server = find_server(options.cache, options.patches) if options.source is None else None
    facts = find_facts(server) if server else None
    if server is None or facts is None or facts.patches != patch_series(options.patches):
        return None
    return server.parent if options.backend in ("auto", facts.backend) else None


def _finished(folder: Path) -> BuildFacts | None:
    """Return the facts of a finished build whose programs are all there."""
    try:
        facts = msgspec.json.decode((folder / "build.json").read_bytes(), type=BuildFacts)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return facts if all(os.access(folder / name, os.X_OK) for name in facts.programs) else None


def _use(folder: Path, built: bool, started: float) -> BuildResult:
    """Make a finished build the current one."""
    facts = _finished(folder)
    if facts is None:
        raise SetupError(f"{folder} lost its build.json or one of its programs: run the build again")
    current = folder.parent / "current"
    if not current.is_symlink() or str(current.readlink()) != folder.name:
        link_atomic(current, folder.name)
    return BuildResult(folder / SERVER, facts, built, time.monotonic() - started)


def _prepare(folder: Path, source: Source, series: PatchSeries, console: Console) -> None:
    """Make `src`, the patched tree, unless an interrupted build left it complete."""
    tree = folder / "src"
    if tree.is_dir():
        say(console, f"going on with the interrupted build in {folder}")
        return
    part = folder / "src.part"
    for leftover in (part, folder / "build"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    source.put(part, console)
    series.apply(part)
    part.replace(tree)


def _compile(folder: Path, source: Source, recipe: _Recipe, options: BuildOptions, console: Console) -> None:
    """Configure, compile, check and keep the server; the folder is finished afterwards."""
    started = time.monotonic()
    tools = toolchain.ensure_build_tools(recipe.root.parent / "tools", console)
    environment = compile_run.environment(folder, tools.ninja)
    if recipe.backend == "cuda" and (nvcc := toolchain.find_nvcc()):
        environment["CUDACXX"] = str(nvcc)
    log = folder / "build.log"
    jobs = options.jobs or toolchain.default_jobs()
    say(console, f"building llama-server ({recipe.backend}, {jobs} jobs; log: {log})")
    tree, objects = folder / "src", folder / "build"
    configure = [str(tools.cmake), "-S", str(tree), "-B", str(objects), "-G", "Ninja", *recipe.options(source)]
    compile_run.run(configure, log, environment, compile_run.no_lines)
    ninja = [str(tools.ninja), "-C", str(objects), "-j", str(jobs), *recipe.targets]
    compile_run.run_ninja(ninja, log, environment, console)
    server = folder / SERVER
    for name in recipe.targets:
        part = folder / f"{name}.part"
        shutil.copy2(objects / "bin" / name, part)
        part.replace(folder / name)
    version = server_version(server)
    if version.patches != recipe.series.label:
        raise SetupError(
            f"the new server reports the patches {version.patches} instead of {recipe.series.label}: "
            f"remove {folder} and build again"
        )
    if (tree / "LICENSE").is_file():
        shutil.copy2(tree / "LICENSE", folder / "LICENSE")
    facts = BuildFacts(
        key=folder.name,
        build=version.build,
        commit=version.commit,
        patches=recipe.series.label,
        source=source.identity,
        backend=recipe.backend,
        options=recipe.options(source),
        compiler=recipe.compiler,
        cmake=tools.cmake_version,
        cpu=recipe.cpu,
        sha256=sha256_file(server),
        seconds=round(time.monotonic() - started, 1),
        created=time.time(),
        programs=recipe.targets,
    )
    write_atomic(folder / "build.json", msgspec.json.format(msgspec.json.encode(facts)))
    if not options.keep:
        shutil.rmtree(tree, ignore_errors=True)
        shutil.rmtree(objects, ignore_errors=True)
        log.unlink()


def _remove_abandoned(root: Path, keep: Path) -> None:
    """Remove half-finished builds that nobody went on with for a week: each takes hundreds of megabytes."""
    for tree in [*root.glob("*/src"), *root.glob("*/src.part")]:
        folder = tree.parent
        is_old = time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
        if folder == keep or not is_old or _finished(folder) is not None:
            continue
        with try_lock(folder.with_suffix(".lock")) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)
