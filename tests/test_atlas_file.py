"""Memory files as Python reads them: what is whole is read, everything else is an error with a reason."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from memory_files import PARTS, grown, memory_file

from supervisor import atlas_file

GOOD = memory_file()
GROWN = grown(GOOD)
TWICE = grown(GROWN, 7)


def check(folder: Path, data: bytes) -> None:
    path = folder / "x.atlas"
    path.write_bytes(data)
    atlas_file.read(path).verify()


def atlas(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "supervisor", "atlas", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_good_file(tmp_path: Path) -> None:
    check(tmp_path, GOOD)
    summary = atlas_file.read(tmp_path / "x.atlas").summary()
    assert summary["session"]["n_tokens"] == 5
    assert summary["parts"]["keys"]["raw"] == len(PARTS["keys"])
    assert summary["bytes"] == len(GOOD)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        with pytest.raises(atlas_file.CorruptMemory):
            check(tmp_path, GOOD[:size])


@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    with pytest.raises(atlas_file.CorruptMemory):
        check(tmp_path_factory.getbasetemp(), GOOD[:at] + bytes([GOOD[at] ^ 1 << bit]) + GOOD[at + 1 :])


def test_the_newest_generation_is_read(tmp_path: Path) -> None:
    for number, data in enumerate((GOOD, GROWN, TWICE)):
        check(tmp_path, data)
        summary = atlas_file.read(tmp_path / "x.atlas").summary()
        assert (summary["session"]["n_tokens"], summary["generations"]) == (5 + number, 1 + number)
    done = subprocess.run(
        [sys.executable, "-m", "supervisor", "atlas", "inspect", str(tmp_path / "x.atlas")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "x.atlas: 7 tokens" in done.stdout and "2 of its saves behind the first" in done.stdout


@pytest.mark.parametrize("more", [b"", GROWN[len(GOOD) + 40 :], bytes(1000)])
def test_a_generation_that_was_never_completed_does_not_count(tmp_path: Path, more: bytes) -> None:
    check(tmp_path, GOOD + bytes(40) + more)
    assert atlas_file.read(tmp_path / "x.atlas").generations == 1
    check(tmp_path, GROWN + bytes(40) + more)
    assert atlas_file.read(tmp_path / "x.atlas").generations == 2


def test_every_damage_behind_the_first_generation_is_found(tmp_path: Path) -> None:
    for size in range(len(GOOD) + 1, len(GROWN)):
        with pytest.raises(atlas_file.CorruptMemory):
            check(tmp_path, GROWN[:size])
    for at in range(len(GOOD), len(GROWN)):
        with pytest.raises(atlas_file.CorruptMemory):
            check(tmp_path, GROWN[:at] + bytes([GROWN[at] ^ 1 << at % 8]) + GROWN[at + 1 :])
    for more in (b"\0", b"ATLASGEN", b"x" * 40, GOOD):
        with pytest.raises(atlas_file.CorruptMemory):
            check(tmp_path, GROWN + more)


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": [{"purpose": "keys", "layers": [], "raw": 1 << 40, "stored": 9, "shuffle": 1, "xxh64": ""}]},
        {"frames": [{"purpose": "keys", "layers": [], "raw": 9, "stored": -1, "shuffle": 1, "xxh64": ""}]},
        {"frames": [7]},
        {"frames": None},
        {"session": {}},
        {"model": []},
    ],
)
def test_a_hostile_header_is_found(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(atlas_file.CorruptMemory):
        check(tmp_path, memory_file(changes))


def test_a_frame_without_checksum_or_of_another_size_is_found(tmp_path: Path) -> None:
    size = struct.unpack_from("<I", GOOD, 12)[0]
    for raw, checksum in ((b"counters", False), (b"counter", True)):
        stored = zstandard.ZstdCompressor(write_checksum=checksum).compress(raw)
        frame = {"purpose": "counters", "layers": [], "raw": 8, "stored": len(stored), "shuffle": 1}
        frame["xxh64"] = xxhash.xxh64(stored).hexdigest()
        first = json.loads(GOOD[16 : 16 + size])["frames"][0]
        data = memory_file({"frames": [first, frame]})
        length = struct.unpack_from("<I", data, 12)[0]
        with pytest.raises(atlas_file.CorruptMemory, match="counters"):
            check(tmp_path, data[: 24 + length] + GOOD[24 + size : 24 + size + first["stored"]] + stored)


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "book.atlas").write_bytes(GOOD)
    (tmp_path / "book_17.atlas.bak").write_bytes(GOOD)
    (tmp_path / "book_18.atlas.bak").write_bytes(GOOD)
    (tmp_path / "book_1_18.atlas.bak").write_bytes(GOOD)
    (tmp_path / "bad.atlas").write_bytes(GOOD[:-1])
    assert [path.name for path in atlas_file.backups(tmp_path / "book.atlas")] == [
        "book_18.atlas.bak",
        "book_17.atlas.bak",
    ]

    listed = atlas("list", str(tmp_path), "--json")
    rows = {row["file"]: row for row in json.loads(listed.stdout)}
    assert rows["book.atlas"]["tokens"] == 5 and rows["book.atlas"]["backups"] == 2
    assert "corruption" in rows["bad.atlas"]["error"]
    assert "book.atlas" in atlas("list", str(tmp_path)).stdout

    shown = atlas("inspect", str(tmp_path / "book.atlas"))
    assert "5 tokens" in shown.stdout and "tiny" in shown.stdout
    assert json.loads(atlas("inspect", str(tmp_path / "book.atlas"), "--json").stdout)[0]["model"]["hash"] == "00"
    failed = atlas("inspect", str(tmp_path / "bad.atlas"))
    assert failed.returncode == 1 and "corruption" in failed.stderr

    assert atlas("verify", str(tmp_path / "book.atlas")).returncode == 0
    both = atlas("verify", str(tmp_path / "book.atlas"), str(tmp_path / "bad.atlas"), "--json")
    assert both.returncode == 1
    assert [one["ok"] for one in json.loads(both.stdout)] == [True, False]
