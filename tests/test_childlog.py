"""The children's logs: kept, rotated, masked, followed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from supervisor.childlog import TAIL_LINES, ChildLog, file_name, mask


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("--api-key sk-12345678", "--api-key ****"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ****"),
        ("HF_TOKEN=hf_abcdefgh", "HF_TOKEN=****"),
        ('"password": "hunter22"', '"password": "****"'),
        ("prompt eval time = 101.48 ms / 33 tokens ( 3.08 ms per token, 325.19 tokens per second)", None),
        ("n_tokens = 123456, truncated = 0", None),
    ],
)
def test_secrets_are_masked_and_nothing_else(line: str, masked: str | None):
    assert mask(line) == (line if masked is None else masked)


def test_file_names_stay_in_their_folder():
    for model in ("../../etc/passwd", "a/b", ".hidden", "x\n", "ü" * 500, ""):
        name = file_name(model)
        assert "/" not in name
        assert not name.startswith(".") or name == ".log"
        assert len(name.encode()) <= 255


def test_rotation_keeps_the_last_part(tmp_path: Path):
    log = ChildLog(tmp_path / "a.log", max_bytes=1000)
    for number in range(100):
        log.write(b"line %03d ................\n" % number)
    assert (tmp_path / "a.log.1").exists()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2200
    assert len(log.lines) == 100


def test_memory_is_bounded(tmp_path: Path):
    log = ChildLog(None, 1)
    log.write(b"x\n" * (TAIL_LINES + 5))
    assert len(log.tail(10**6)) == TAIL_LINES
    assert log.tail(0) == []


def test_a_disk_that_refuses_loses_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    log = ChildLog(tmp_path / "missing" / "a.log", 1000)
    log.write(b"one\n")
    log.write(b"two\n")
    assert log.tail(5) == ["one", "two"]
    assert len(caplog.records) == 1


async def test_followers_get_lines_until_the_end():
    log = ChildLog(None, 1)
    seen = []

    async def read():
        async for line in log.follow():
            seen.append(line)

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    log.write(b"one\ntwo\n")
    log.close()
    await asyncio.wait_for(reader, 5)
    assert seen == ["one", "two"]


async def test_followers_lose_no_line_between_the_tail_and_what_comes():
    log = ChildLog(None, 1)
    log.write(b"zero\none\ntwo\n")
    seen = []
    async for line in log.follow(2):
        seen.append(line)
        if line == "one":
            log.write(b"three\n")  # while the tail is being sent
        if line == "three":
            log.close()
    assert seen == ["one", "two", "three"]
