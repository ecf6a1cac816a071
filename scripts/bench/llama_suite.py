"""Run llama-server's own test suite directly and through the supervisor, and show where they differ.

    python scripts/bench/llama_suite.py [--server BIN] [--source DIR] [--only direct|proxy] [--files ...] [-k EXPR]

The tests are those of the pinned source (`tools/server/tests`), copied, with every assertion checked even after
one has failed. The hub's models are replaced by tiny ones with random weights (`tiny_models.py`), so tests that
expect a certain text fail in both runs; what counts is the difference. A test differs if an assertion holds
directly and fails through the proxy, or if it gets less far; it is repeated three times in both modes before it
counts. Exit code: 0 no difference, 1 differences, 2 the suite could not be run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from supervisor.setup import native, sources
from supervisor.setup.fetch import SetupError, pip_download
from supervisor.setup.files import cache_root

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TESTS = "tools/server/tests"
NEEDED = (
    TESTS,
    "models/templates",
    "models/ggml-vocab-bert-bge.gguf",
    "models/ggml-vocab-llama-spm.gguf",
    "tools/mtmd/test-1.jpeg",
)
"""What is used of the source tree; the tests name the template folder and the picture by relative paths."""

FILES = "basic tokenize completion chat_completion security embedding infill slot_save template stream".split()
NOT_NEEDED = ("aiohttp", "pytest-xdist")
ADDED = ("pytest-timeout~=2.3", "gguf~=0.17")
BY_DESIGN = {
    ("unit/test_basic.py::test_no_ui", "line 128"): "GET / is the supervisor's own page, with and without --no-ui",
}
"""Failed assertions that are no fault, with the reason; they are shown and do not count."""

TIMEOUT = 120
"""Seconds that one test may take."""

REPEATS = 3
MODES = ("direct", "proxy")

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """How one test ended. `failures` maps where an assertion or an exception was to what it said."""

    outcome: str
    seconds: float
    failures: dict[str, str]
    log: str


Results = dict[str, Result]


@dataclass
class Difference:
    """A test that does worse through the proxy: `failures` are those that a direct run does not have.

    `repeats` are the outcomes of running it again by mode; with an `excuse` it does not count.
    """

    test: str
    direct: str
    proxy: str
    failures: dict[str, str]
    log: str
    repeats: dict[str, list[str]] = field(default_factory=dict)
    excuse: str = ""


@dataclass(frozen=True)
class Suite:
    """Everything needed to run tests: the prepared copy in `root`, the interpreter, the server, the models."""

    root: Path
    python: Path
    server: Path
    models: Path
    router: str

    @property
    def tests(self) -> Path:
        return self.root / "tree" / TESTS

    def run(self, mode: str, selection: Sequence[str], *, verbose: bool = True) -> tuple[Results, float]:
        """Run tests in one mode; returns the results by test, and the seconds."""
        settings = self.root / f"{mode}.json"
        results = self.root / f"{mode}.jsonl"
        results.unlink(missing_ok=True)
        settings.write_text(
            json.dumps(
                {
                    "mode": mode,
                    "root": str(self.root),
                    "server": str(self.server),
                    "models": str(self.models),
                    "router": self.router,
                    "repository": str(REPOSITORY),
                }
            )
        )
        environment = os.environ | {
            "LLAMA_SERVER_BIN_PATH": str(self.root / "llama-server"),
            "LLAMA_ARG_THREADS": os.environ.get("LLAMA_ARG_THREADS", "1"),  # more would only wait for each other
            "LLAMA_SUITE": str(settings),
            "LLAMA_SUITE_RESULTS": str(results),
            "PORT": str(free_port()),
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            str(self.python),
            "-m",
            "pytest",
            "-p",
            "llama_suite_plugin",
            "-p",
            "no:cacheprovider",
            "-v",
            "--tb=no",
        ]
        command += ["-rN", "-W", "ignore", f"--timeout={TIMEOUT}", *selection]
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=self.tests, env=environment, stdout=None if verbose else subprocess.DEVNULL, check=False
        )
        if done.returncode not in (0, 1) or not results.exists():
            raise SetupError(f"pytest ended with code {done.returncode} in {mode} mode")
        return read_results(results), time.monotonic() - started


def read_results(path: Path) -> Results:
    """Read what the plugin wrote."""
    results: Results = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        failures = {where: what for where, what in reversed(record["failures"])}
        results[record["test"]] = Result(record["outcome"], record["seconds"], failures, record["log"])
    return results


# Preparing


def prepare(root: Path, source: Path | None, server: Path, models: Path | None, router: str) -> Suite:
    """Make the copy of the tests, their environment and the models; the latter two stay in the cache."""
    tree = root / "tree"
    if source is None:
        unpack(tree)
    else:
        copy(source, tree)
    for file in (tree / TESTS / "unit").glob("test_*.py"):
        file.write_text(keep_going(file.read_text()))
    python = make_environment(tree / TESTS / "requirements.txt")
    if models is None:
        models = make_models(python, tree / "models")
    fill_hub_cache(tree / TESTS / "tmp", models)
    shim = root / "llama-server"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "llama_suite_shim.py"}" "$@"\n')
    shim.chmod(0o755)
    return Suite(root, python, server, models, router)


def unpack(tree: Path) -> None:
    """Take what is needed out of the pinned source distribution, downloading that if the build has not."""
    archive = pip_download(sources.SDIST, cache_root() / "downloads", console)
    prefix = f"{sources.SDIST_TREE}/"
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.removeprefix(prefix)
            if member.name.startswith(NEEDED):
                tar.extract(member, tree, filter="data")


def copy(source: Path, tree: Path) -> None:
    """Take what is needed out of a llama.cpp tree."""
    for name in NEEDED:
        if (source / name).is_dir():
            shutil.copytree(source / name, tree / name, ignore=shutil.ignore_patterns("tmp", "__pycache__"))
        elif (source / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, tree / name)
        else:
            raise SetupError(f"{source} has no {name}: is it a llama.cpp tree?")


def keep_going(code: str) -> str:
    """Put the plugin's KEEP_GOING before every assertion, without moving a line."""
    lines = code.encode().splitlines(keepends=True)
    places = [(node.lineno, node.col_offset) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    for number, column in places:
        line = lines[number - 1]
        if not line[:column].strip():
            lines[number - 1] = line[:column] + b"with KEEP_GOING: " + line[column:]
    changed = b"".join(lines).decode()
    ast.parse(changed)
    return changed


def make_environment(requirements: Path) -> Path:
    """Return the Python of a virtual environment with the suite's requirements, made once for each set of them."""
    wanted = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    wanted = [line for line in wanted if line and not line.startswith(NOT_NEEDED)] + list(ADDED)
    key = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    folder = cache_root() / "llama-suite" / f"python-{key}"
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if not finished.exists():
        console.print(f"installing the suite's requirements into {folder}")
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*install, *wanted], check=False).returncode != 0:
            relaxed = [line.replace("~=", ">=") for line in wanted]
            console.print("those versions cannot be had; taking newer ones")
            if subprocess.run([*install, *relaxed], check=False).returncode != 0:
                raise SetupError("the suite's requirements cannot be installed")
        finished.touch()
    return python


def make_models(python: Path, vocabularies: Path) -> Path:
    """Return the folder of the tiny models, made once for each version of their maker."""
    maker = HERE / "tiny_models.py"
    key = hashlib.sha256(maker.read_bytes()).hexdigest()[:12]
    folder = cache_root() / "llama-suite" / f"models-{key}"
    if not folder.exists():
        console.print(f"making the models in {folder}")
        part = Path(tempfile.mkdtemp(prefix="models-", dir=folder.parent))
        subprocess.run([python, maker, vocabularies, part], check=True)
        part.rename(folder)
    return folder


def fill_hub_cache(cache: Path, models: Path) -> None:
    """Put the model that llama-server's router is asked for where it keeps what it has from the hub."""
    repository = cache / "models--ggml-org--tinygemma3-GGUF"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "tinygemma3-Q8_0.gguf").symlink_to(models / "tiny-gemma3.gguf")
    (snapshot / "mmproj-tinygemma3-Q8_0.gguf").symlink_to(models / "mmproj-tiny-gemma3.gguf")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# Comparing


def compare(direct: Results, proxy: Results) -> list[Difference]:
    """Return the tests that do worse through the proxy."""
    differences = []
    for test, one in direct.items():
        other = proxy.get(test, Result("missing", 0, {}, ""))
        new = {where: what for where, what in other.failures.items() if where not in one.failures}
        if new or (one.outcome == "passed" and other.outcome != "passed"):
            differences.append(Difference(test, one.outcome, other.outcome, new, other.log))
    return differences


def judge(suite: Suite, difference: Difference) -> None:
    """Find out whether a difference counts."""
    reasons = {BY_DESIGN.get((difference.test, where), "") for where in difference.failures}
    if reasons and "" not in reasons and difference.direct == difference.proxy:
        difference.excuse = "; ".join(sorted(reasons))
    else:
        repeat(suite, difference)


def repeat(suite: Suite, difference: Difference) -> None:
    """Run a differing test again in both modes; it counts unless it is unstable in a way that explains it."""
    console.print(f"repeating {difference.test} {REPEATS} times in both modes")
    worse = 0
    bad_lines: dict[str, set[str]] = {mode: set() for mode in MODES}
    for _ in range(REPEATS):
        once: dict[str, Results] = {}
        for mode in MODES:
            once[mode], _ = suite.run(mode, [difference.test], verbose=False)
            difference.repeats.setdefault(mode, []).extend(result.outcome for result in once[mode].values())
            bad_lines[mode].update(where for result in once[mode].values() for where in result.failures)
        worse += bool(compare(once["direct"], once["proxy"]))
    if worse == 0:
        difference.excuse = f"unstable: none of {REPEATS} repetitions differed"
    elif bad_lines["proxy"] <= bad_lines["direct"]:
        difference.excuse = "unstable: the same assertions fail directly now and then"


# Showing


def file_of(test: str) -> str:
    return test.partition("::")[0].removeprefix("unit/test_").removesuffix(".py")


def counts(results: Results, file: str) -> Counter[str]:
    return Counter(result.outcome for test, result in results.items() if file in ("", file_of(test)))


def show(runs: dict[str, Results], differences: Sequence[Difference], seconds: dict[str, float]) -> None:
    """Print the table and the differences."""
    table = Table("file", *runs, "differences", "better by proxy")
    table.title = "passed / failed / skipped"
    files = list(dict.fromkeys(file_of(test) for results in runs.values() for test in results))
    for file in [*files, ""]:
        cells = []
        for results in runs.values():
            count = counts(results, file)
            cells.append(f"{count['passed']} / {count['failed']} / {count['skipped']}")
        worse = sum(not one.excuse and file in ("", file_of(one.test)) for one in differences)
        better = sum(file in ("", file_of(test)) for test in only_by_proxy(runs))
        table.add_row(file or "all", *cells, str(worse), str(better), end_section=bool(files) and file == files[-1])
    console.print(table)
    for mode, took in seconds.items():
        console.print(f"{mode}: {took:.0f} s")
    for one in differences:
        kind = f"does not count ({one.excuse})" if one.excuse else "DIFFERENCE"
        console.print(f"{kind}: {one.test}: directly {one.direct}, by proxy {one.proxy}", markup=False, highlight=False)
        for where, what in one.failures.items():
            console.print(f"    {where}: {what}", markup=False, highlight=False)
        for mode, outcomes in one.repeats.items():
            console.print(f"    repeated, {mode}: {', '.join(outcomes)}", markup=False, highlight=False)
    for test in only_by_proxy(runs):
        console.print(f"passes only by proxy: {test}", markup=False, highlight=False)


def only_by_proxy(runs: dict[str, Results]) -> list[str]:
    direct, proxy = runs.get("direct", {}), runs.get("proxy", {})
    passed = [test for test, result in proxy.items() if result.outcome == "passed"]
    return [test for test in passed if test in direct and direct[test].outcome == "failed"]


def router_tests(root: Path) -> list[str]:
    """Return the tests that started llama-server's own router, which the proxy does not stand in for."""
    path = root / "router.txt"
    return sorted(set(path.read_text().splitlines())) if path.exists() else []


def write_json(
    path: Path,
    suite: Suite,
    runs: dict[str, Results],
    differences: Iterable[Difference],
    seconds: dict[str, float],
) -> None:
    """Write everything that was found."""
    report = {
        "server": native.server_version(suite.server).__dict__,
        "seconds": {mode: round(took, 1) for mode, took in seconds.items()},
        "totals": {mode: dict(counts(results, "")) for mode, results in runs.items()},
        "differences": [one.__dict__ for one in differences if not one.excuse],
        "excused": [one.__dict__ for one in differences if one.excuse],
        "only_by_proxy": only_by_proxy(runs),
        "router_tests": router_tests(suite.root),
        "tests": {
            mode: {test: {k: v for k, v in result.__dict__.items() if k != "log"} for test, result in results.items()}
            for mode, results in runs.items()
        },
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"results: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source", type=Path, help="llama.cpp tree; default: the pinned source distribution")
    parser.add_argument("--server", type=Path, help="llama-server; default: the one that was built")
    parser.add_argument("--models", type=Path, help="folder with the models that tiny_models.py makes; default: made")
    parser.add_argument("--only", choices=["both", *MODES], default="both")
    parser.add_argument("--files", nargs="+", default=FILES, help=f"default: {' '.join(FILES)}")
    parser.add_argument("-k", metavar="EXPR", help="only tests whose names match, as for pytest")
    parser.add_argument(
        "--router",
        choices=["server", "supervisor"],
        default="server",
        help="what stands behind tests of llama-server's own router in proxy mode; default: llama-server",
    )
    parser.add_argument("--json", type=Path, default=Path("llama-suite.json"), help="where the results go")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, with the children's logs")
    return parser.parse_args()


def run(options: argparse.Namespace, root: Path) -> int:
    server = options.server or native.find_server()
    if server is None:
        raise SetupError("there is no llama-server: run `llama-supervisor build`, or name one with --server")
    server = server.absolute()
    native.server_version(server)
    models = options.models.absolute() if options.models else None
    suite = prepare(root, options.source, server, models, options.router)
    names = (name.removeprefix("test_").removesuffix(".py") for name in options.files)
    selection = [f"unit/test_{name}.py" for name in names] + (["-k", options.k] if options.k else [])
    runs: dict[str, Results] = {}
    seconds: dict[str, float] = {}
    for mode in MODES if options.only == "both" else [options.only]:
        console.rule(mode)
        runs[mode], seconds[mode] = suite.run(mode, selection)
    if not any(result.outcome == "passed" for result in runs.get("direct", runs[mode]).values()):
        raise SetupError("no test passes, so nothing can be said; the logs are in the folder that --keep keeps")
    differences = compare(runs["direct"], runs["proxy"]) if len(runs) == 2 else []
    routed = router_tests(root)
    for one in differences:
        judge(suite, one)
    show(runs, differences, seconds)
    if routed:
        how = "direct in both modes" if options.router == "server" else "the supervisor stands in for it"
        console.print(f"{len(routed)} tests start llama-server's own router, without a model: {how}")
    write_json(options.json, suite, runs, differences, seconds)
    return int(any(not one.excuse for one in differences))


def main() -> int:
    options = parse_arguments()
    root = Path(tempfile.mkdtemp(prefix="llama-suite-"))
    try:
        return run(options, root)
    except (SetupError, OSError, subprocess.SubprocessError) as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    finally:
        if options.keep:
            console.print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
