"""The file of a long session grows by what is new, and any damage to it costs no more than the saves behind that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from atlas_server import MemoryServer, saved_tokens, tiny_model, workplace

from supervisor import atlas_file

WORDS = ["-c", "512", "-np", "2", "-t", "1", "--atlas-memory-backup-count", "2", "--atlas-auto-save-interval", "0"]
PROMPT = [40 + number * 7 % 61 for number in range(5000)]


@pytest.fixture
def running(native_server: Path) -> Iterator[MemoryServer]:
    with workplace() as folder, MemoryServer(native_server, tiny_model(folder), folder, *WORDS) as made:
        made.want(made.complete(PROMPT, 1, memory_file="book"))
        yield made


def turn(running: MemoryServer, tokens: int = 1, **atlas: Any) -> dict[str, Any]:
    prompt = [70 + number for number in range(16)]
    answer: dict[str, Any] = running.want(running.complete(prompt, tokens, memory_file="book", append=True, **atlas))
    return answer


def load(running: MemoryServer) -> tuple[int, dict[str, Any]]:
    return running.ask("POST", "/v1/atlas/memory/load", {"filename": "book"})


def test_a_save_writes_what_is_new_until_half_of_the_file_is_old(running: MemoryServer) -> None:
    book = running.memory / "book.atlas"
    first, file = book.stat().st_size, book.stat().st_ino
    expected, size = PROMPT, first
    for number in range(1, 40):
        last = saved_tokens(book)[1]
        saved = turn(running)["atlas"]["saved"]
        expected = [*expected, last, *range(70, 86)]
        assert saved_tokens(book)[0] == expected
        assert saved["bytes"] == book.stat().st_size
        if book.stat().st_ino != file:
            break
        assert saved["bytes"] == size + saved["written"]
        assert saved["written"] < first / 2
        assert atlas_file.read(book).generations == 1 + number
        assert not atlas_file.backups(book)
        size = saved["bytes"]
    assert saved["written"] == saved["bytes"] < 1.2 * first
    assert atlas_file.read(book).generations == 1
    assert number > 2 and size > 2 * first
    (backup,) = atlas_file.backups(book)
    assert saved_tokens(backup)[0] == expected[:-17]


def test_a_session_goes_on_from_a_grown_file_as_it_would_have(running: MemoryServer) -> None:
    for _ in range(3):
        turn(running)
    assert atlas_file.read(running.memory / "book.atlas").generations == 4
    goes_on = turn(running, 32, save_memory=False)["tokens"]
    status, _ = load(running)
    assert status == 200
    assert turn(running, 32, save_memory=False)["tokens"] == goes_on


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_damage_costs_the_saves_behind_it(running: MemoryServer) -> None:
    book = running.memory / "book.atlas"
    states = [book.read_bytes()]
    for _ in range(2):
        turn(running)
        states.append(book.read_bytes())
    assert states[2].startswith(states[1]) and states[1].startswith(states[0])
    counts = [5000, 5017, 5034]
    zero, one, two = states
    at = len(one)
    cases = {
        "cut": (two[:-1], 1),
        "a frame": (flip(two, at + 45), 1),
        "the header": (flip(two, len(two) - 100), 1),
        "the first bytes": (flip(two, at + 33), 1),
        "the one before": (flip(two, len(zero) + 3), 0),
        "more": (two + b"x", 2),
        "the same again": (two + zero, 2),
    }
    for what, (data, number) in cases.items():
        book.write_bytes(data)
        with pytest.raises(atlas_file.CorruptMemory):
            atlas_file.read(book).verify()
        status, answer = load(running)
        assert (status, answer.get("n_tokens"), answer.get("backup")) == (200, counts[number], "book.atlas"), what
        saved = turn(running)["atlas"]["saved"]  # behind damage nothing is written
        assert saved["written"] == saved["bytes"]
        assert len(saved_tokens(book)[0]) == counts[number] + 17

    for backup in atlas_file.backups(book):
        backup.unlink()
    header = atlas_file.read(book).header
    keys = next(frame for frame in header.frames if frame.purpose == "keys")
    book.write_bytes(flip(book.read_bytes(), keys.offset + 100))
    status, answer = load(running)
    assert status == 400 and "corruption" in answer["error"]["message"]


def test_what_a_killed_server_did_not_complete_is_written_over(running: MemoryServer) -> None:
    book = running.memory / "book.atlas"
    turn(running)
    good = book.read_bytes()
    for more in (bytes(40), bytes(40) + b"x" * 3_000_000):
        book.write_bytes(good + more)
        status, answer = load(running)
        assert (status, answer["n_tokens"], answer.get("backup")) == (200, 5017, None)
        saved = turn(running)["atlas"]["saved"]
        assert book.read_bytes().startswith(good)
        assert saved["bytes"] == len(good) + saved["written"] == book.stat().st_size
        assert len(saved_tokens(book)[0]) == 5034


def test_another_session_of_the_name_does_not_keep_what_the_first_one_said(running: MemoryServer) -> None:
    book = running.memory / "book.atlas"
    other = [100 - number * 3 % 59 for number in range(4500)]
    running.want(running.complete(other, 1, memory_file="book", reset="hard"))
    running.want(running.complete(other[:20], 1, memory_file="book", reset="hard"))
    assert saved_tokens(book)[0] == other[:20]
    assert atlas_file.read(book).generations == 1
