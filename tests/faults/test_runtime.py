"""What a dead supervisor leaves is cleaned up, and nothing else is touched."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from supervisor.runtime import Runtime, RuntimeFolderError

DEAD = "999999999"


def dead_supervisor(root: Path) -> Path:
    """Make the folder of a supervisor that was killed."""
    folder = root / DEAD
    folder.mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "1.sock"))
    return folder


@pytest.fixture
def sleeper():
    """A process that is killed at the end if it still lives."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_the_folder_of_a_dead_supervisor_goes_with_its_children(short_tmp, sleeper):
    runtime = Runtime(short_tmp / "run")
    folder = dead_supervisor(runtime.root)
    writer = Runtime(short_tmp / "run")
    writer.record(folder / "1.sock", sleeper.pid, 0)
    runtime.open()
    assert not psutil.pid_exists(sleeper.pid)
    assert [path.name for path in runtime.root.iterdir()] == [str(os.getpid())]
    runtime.close()
    assert not runtime.root.exists()


def test_a_child_that_saves_its_memory_exits_by_itself(short_tmp):
    runtime = Runtime(short_tmp / "run")
    folder = dead_supervisor(runtime.root)
    slow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    Runtime(short_tmp / "run").record(folder / "1.sock", slow.pid, 60)
    runtime.open()
    assert slow.wait() == 0
    runtime.close()


def test_a_record_of_another_process_with_the_same_pid_kills_nobody(short_tmp, sleeper):
    runtime = Runtime(short_tmp / "run")
    folder = dead_supervisor(runtime.root)
    (folder / "1.pid").write_text(f"{sleeper.pid} 1000.0 0\n")
    runtime.open()
    assert sleeper.poll() is None
    assert not folder.exists()
    runtime.close()


@pytest.mark.parametrize("record", ["", "x y z\n", "1\n", "1 1.0\n", f"{2**70} 1.0 0\n", "-1 1.0 0\n", "0 1.0 0\n"])
def test_a_broken_record_is_removed(short_tmp, record):
    runtime = Runtime(short_tmp / "run")
    folder = dead_supervisor(runtime.root)
    (folder / "1.pid").write_text(record)
    runtime.open()
    assert not folder.exists()
    runtime.close()


def test_a_folder_of_somebody_else_is_not_emptied(short_tmp):
    """`runtime_dir` may be set to a home folder by mistake."""
    runtime = Runtime(short_tmp / "home")
    for name in ("2023", "photos"):
        (runtime.root / name).mkdir(parents=True)
        (runtime.root / name / "cat.jpg").write_bytes(b"cat")
    runtime.root.chmod(0o755)
    with pytest.raises(RuntimeFolderError, match="holds other files"):
        runtime.open()
    assert runtime.root.stat().st_mode & 0o777 == 0o755
    runtime.root.chmod(0o700)
    runtime.open()
    runtime.close()
    assert len(list(runtime.root.rglob("cat.jpg"))) == 2


def test_an_empty_folder_is_made_private(short_tmp):
    runtime = Runtime(short_tmp / "run")
    runtime.root.mkdir(mode=0o755)
    runtime.open()
    assert runtime.root.stat().st_mode & 0o777 == 0o700
    runtime.close()


def open_and_close(root: Path, rounds: int) -> None:
    for _ in range(rounds):
        runtime = Runtime(root)
        runtime.open()
        assert runtime.folder.is_dir()
        runtime.close()


def test_supervisors_that_come_and_go_at_once_do_not_disturb_each_other(short_tmp):
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=open_and_close, args=(short_tmp / "run", 200)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [other.exitcode for other in others] == [0] * 4
    assert not (short_tmp / "run").exists()


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_root_that_is_no_folder_is_refused(short_tmp, kind):
    root = short_tmp / "run"
    if kind == "file":
        root.write_text("")
    else:
        root.symlink_to(short_tmp / "nowhere")
    with pytest.raises(RuntimeFolderError, match="run"):
        Runtime(root).open()
