"""A pytest plugin for llama-server's test suite, loaded by `llama_suite.py`: no hub, all assertions, results as JSON.

The runner puts `KEEP_GOING` before every assertion of the tests, so that one that fails does not hide those after
it. Such a test still fails, and each failed line is on record: with two runs, every assertion can be compared.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

Failure = tuple[str, str]
"""Where (`line 12`, with the kind of an exception that is not a failed assertion) and what was said."""

LOG_CHARACTERS = 6000
SETTLED = ("ready", "failed", "stopped", "absent")


class AssertionsFailed(AssertionError):
    """Some assertions of a test did not hold; names the first."""


class KeepGoing:
    """Notes failed assertions and goes on."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if kind is None or not issubclass(kind, AssertionError):
            return False
        self.failures.append((f"line {trace.tb_lineno}", first_line(error)))
        return True


KEEP_GOING = KeepGoing()
builtins.KEEP_GOING = KEEP_GOING  # type: ignore[attr-defined]


def first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Change what needs the hub, after the suite's conftest has put its `utils` on the path."""
    import utils

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    start = utils.ServerProcess.start

    def start_and_wait(server: Any, timeout_seconds: int = utils.DEFAULT_HTTP_TIMEOUT) -> None:
        start(server, timeout_seconds)
        wait_for_model(server, timeout_seconds)

    utils.ServerProcess.start = start_and_wait
    get = requests.get
    requests.get = lambda url, **options: picture(url) if "//huggingface.co/" in url else get(plain(url), **options)


def plain(url: str) -> str:
    """Return `url`; that of the metrics with a model, for without one a supervisor adds its own and labels."""
    return url + "?model=auto" if url.endswith("/metrics") else url


def wait_for_model(server: Any, timeout: float) -> None:
    """Wait for the model behind a supervisor, whose /health answers before: the suite takes that for loaded.

    A supervisor outlives a child that cannot start; llama-server would have exited, so this fails as that would.
    """
    url = server.make_url("/api/v1/status")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answer = requests.get(url, timeout=5)
        if answer.status_code != 200 or "uptime_seconds" not in answer.text:
            return  # llama-server itself
        models = answer.json()["models"]
        if server.model_hf_repo is None and server.model_file is None:
            return  # a router, which starts models on demand
        if models and models[0]["state"] in SETTLED:
            if models[0]["state"] == "ready":
                return
            raise RuntimeError(f"Server process died: {models[0]['error']}")
        time.sleep(0.02)
    raise TimeoutError("the supervisor's model did not get ready")


def picture(url: str) -> requests.Response:
    """Return an answer with a picture, another one for each URL (PNG, 64 x 64, grey noise)."""
    side, seed = 64, zlib.crc32(url.encode())
    rows = b""
    for _ in range(side):
        rows += b"\0"
        for _ in range(side):
            seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
            rows += bytes([seed >> 16 & 255])
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    answer = requests.Response()
    answer.status_code, answer._content, answer.url = 200, png, url
    return answer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    KEEP_GOING.failures = []
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Fail the test if any of its assertions did."""
    result = yield
    if KEEP_GOING.failures:
        raise AssertionsFailed(*KEEP_GOING.failures[0])
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Keep the exception's place for the record."""
    report = yield
    report.failures = KEEP_GOING.failures if call.when == "call" else []
    if call.excinfo is not None and report.failed and not call.excinfo.errisinstance(AssertionsFailed):
        error = call.excinfo.value
        where = f"{place(error, item.path)}{type(error).__name__}"
        report.failures = [*report.failures, (where, first_line(error))]
    return report


def place(error: BaseException, path: Path) -> str:
    """Return the line of the test file in which an exception passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {lines[-1]}, " if lines else ""


class Record:
    """Writes one line a test: name, outcome, seconds, failures and the log of a failed one."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.reports: list[Any] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)
        if report.when != "teardown":
            return
        reports, self.reports = self.reports, []
        failed = [one for one in reports if one.failed]
        outcome = "failed" if failed else "skipped" if any(one.skipped for one in reports) else "passed"
        log = "".join(text for one in failed for _, text in one.sections)
        record = {
            "test": report.nodeid,
            "outcome": outcome,
            "seconds": round(sum(one.duration for one in reports), 3),
            "failures": [failure for one in reports for failure in one.failures],
            "log": log[-LOG_CHARACTERS:],
        }
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Record(Path(os.environ["LLAMA_SUITE_RESULTS"])))
