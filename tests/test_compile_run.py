"""Compiler runs: logged, shown as progress, stopped whole, explained; and the files around them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tiny_native import Transcript

from supervisor.setup import compile_run, progress
from supervisor.setup.files import file_lock, link_atomic, try_lock, write_atomic


@pytest.fixture
def out() -> Transcript:
    return Transcript()


class TestProgress:
    def test_ninja_lines(self) -> None:
        assert compile_run.parse_step("[12/208] Building CXX object a.cpp.o") == (12, 208)
        assert compile_run.parse_step("a.cpp:[1/2] error") is None
        assert compile_run.parse_step("ninja: no work to do.") is None

    def test_plain_lines_come_now_and_then_and_at_the_end(self, out: Transcript) -> None:
        now = 0.0
        with progress.Meter(out.console, "building", clock=lambda: now) as meter:
            for done in range(1, 201):
                now += 1.0
                meter.update(done, 200)
            meter.update(200, 200)
        lines = out.text.splitlines()
        assert len(lines) == 20
        assert lines[0] == "building:   5 % (10/200, 0:10)"
        assert lines[-1] == "building: 100 % (200/200, 3:20)"

    def test_a_short_step_prints_its_end_only(self, out: Transcript) -> None:
        with progress.Meter(out.console, "unpacking", "bytes", clock=lambda: 0.0) as meter:
            for done in range(0, 1001, 10):
                meter.update(done * 1000, 1000_000)
        assert out.text == "unpacking: 100 % (1.0 MB of 1.0 MB, 0:00)\n"

    def test_a_terminal_gets_a_bar(self) -> None:
        out = Transcript(terminal=True)
        with progress.Meter(out.console, "building") as meter:
            meter.update(3, 4)
        assert "75 %" in out.text
        assert "3/4" in out.text


class TestRun:
    def run(self, script: str, log: Path) -> list[str]:
        seen: list[str] = []
        compile_run.run(["sh", "-c", script], log, dict(os.environ), seen.append)
        return seen

    def test_output_is_logged_and_handed_on(self, tmp_path: Path) -> None:
        log = tmp_path / "build.log"
        assert self.run("echo one; echo two >&2", log) == ["one\n", "two\n"]
        assert log.read_text().splitlines()[1:] == ["one", "two"]

    def test_a_failure_shows_the_errors_and_names_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / "build.log"
        script = "echo '[1/2] Building error.cpp'; echo 'a.cpp:3: error: no such type'; seq 100; exit 3"
        with pytest.raises(compile_run.BuildFailed) as failure:
            self.run(script, log)
        message = failure.value.message
        assert "code 3" in message
        assert "a.cpp:3: error: no such type" in message
        assert "[1/2]" not in message
        assert str(log) in message

    @pytest.mark.parametrize(
        ("line", "advice"),
        [
            ("fatal error: error writing to a.o: No space left on device", "disk is full"),
            ("c++: fatal error: Killed signal terminated program cc1plus", "fewer --jobs"),
        ],
    )
    def test_advice_for_known_troubles(self, tmp_path: Path, line: str, advice: str) -> None:
        with pytest.raises(compile_run.BuildFailed, match=advice):
            self.run(f"echo '{line}'; exit 1", tmp_path / "build.log")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_stops_the_whole_group(self, tmp_path: Path, number: signal.Signals) -> None:
        pids: list[int] = []

        def interrupt(line: str) -> None:
            pids.append(int(line))
            os.kill(os.getpid(), number)

        handler = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt):
            # The inner shell stands for a compiler; a background job of sh ignores SIGINT, so end it by trap.
            script = "trap 'kill $pid; exit 1' INT; sleep 60 & pid=$!; echo $pid; wait"
            compile_run.run(["sh", "-c", script], tmp_path / "log", dict(os.environ), interrupt)
        assert signal.getsignal(number) is handler
        wait_gone(pids[0])

    def test_environment_keeps_the_users_ccache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CCACHE_BASEDIR", raising=False)
        assert compile_run.environment(tmp_path, Path("/bin/ninja"))["CCACHE_BASEDIR"] == str(tmp_path)
        monkeypatch.setenv("CCACHE_BASEDIR", "/elsewhere")
        assert compile_run.environment(tmp_path, Path("/bin/ninja"))["CCACHE_BASEDIR"] == "/elsewhere"


def wait_gone(pid: int) -> None:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


class TestFiles:
    def test_atomic_write_leaves_nothing_behind(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "deep/a.json", b"1")
        write_atomic(tmp_path / "deep/a.json", b"2")
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]
        assert (tmp_path / "deep/a.json").read_bytes() == b"2"

    def test_a_link_is_replaced(self, tmp_path: Path) -> None:
        link_atomic(tmp_path / "current", "a")
        link_atomic(tmp_path / "current", "b")
        assert (tmp_path / "current").readlink() == Path("b")
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_lock_keeps_others_out(self, tmp_path: Path) -> None:
        with file_lock(tmp_path / "a.lock"), try_lock(tmp_path / "a.lock") as held:
            assert not held
        with try_lock(tmp_path / "a.lock") as held:
            assert held
