"""Commands about sessions: those of a running supervisor, and files without one."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import Fake, as_json, listing, model, reply, run
from memory_files import memory_file

from supervisor.atlas_folder import Stored, expendable
from supervisor.cli_atlas_prune import bytes_of, seconds

DAY = 86400
CHILD_404 = {"error": {"code": 404, "message": "there is no memory file none.atlas", "type": "atlas_memory_error"}}
SUPPORT = {"enabled": True, "reason": None, "max_context": 1 << 22, "window": 252, "memory_cells": 256}


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    server.routes["GET /v1/models"] = listing(
        model("tiny", "loaded", aliases=["tiny", "t"], atlas_support=SUPPORT),
        model("a/b", atlas_support={"enabled": None, "reason": "loading it tells"}),
        model("old", "loaded", atlas_support={"enabled": False, "reason": "atlas.enabled is off"}),
        model("broken", "invalid"),
    )
    yield server
    server.close()


def file(name: str, days: float, size: int, **more: Any) -> dict[str, Any]:
    saved = int(time.time() - days * DAY)
    return {"file": f"{name}.atlas", "name": name, "n_tokens": 5, "saved": saved, "bytes": size, **more}


def with_files(fake: Fake) -> None:
    bad = {"file": "bad.atlas", "bytes": 7, "compatible": False, "reason": "corruption: \x1b[2J"}
    fake.routes["GET /v1/atlas/memory?model=tiny"] = reply(
        {"files": [file("book", 1, 3 << 20), file("old", 40, 1 << 20), file("new", 0, 1 << 20), bad]}
    )
    fake.routes["GET /v1/atlas/memory?model=a%2Fb"] = reply({"files": [file("book", 9, 1 << 20)]})
    without = {"error": {"code": 501, "message": "this server has no folder", "type": "atlas_memory_error"}}
    fake.routes["GET /v1/atlas/memory?model=old"] = reply(without, 501)


def test_status(fake: Fake) -> None:
    memory = {"tokens_seen": 1234, "tokens_archived": 800, "memory_bytes": 12 << 20}
    slots = [
        {"slot": 0, "is_processing": False, "memory_file": "book", "saved": True, **memory},
        {"slot": 1, "is_processing": True, "memory_file": "tale", "saved": False, **memory},
        {"slot": 2, "is_processing": False, "memory_file": "new", "saved": False, **memory},
        {"slot": 3, "is_processing": False, "memory_file": None, "saved": False},
    ]
    fake.routes["GET /v1/atlas/status?model=tiny"] = reply({"enabled": True, "slots": slots})
    result = run("atlas", "status", "--url", fake.url)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["tiny", "0", "book", "1234", "800", "12.0", "MiB", "saved"]
    assert [line.split()[-1] for line in lines[2:5]] == ["busy", "saved", "-"]
    assert "tiny (loaded) has a memory" in lines
    assert "a/b (unloaded) may have a memory: loading it tells" in lines
    assert "old (loaded) has no memory: atlas.enabled is off" in lines
    document = as_json(run("atlas", "status", "--model", "t", "--json", "--url", fake.url))
    told = {"id": "tiny", "atlas_support": SUPPORT, "state": "loaded", "status": {"enabled": True, "slots": slots}}
    assert document == {"models": [told]}
    assert run("atlas", "status", "--model", "none", "--url", fake.url).exit_code == 4


def test_status_of_a_model_that_goes_away_meanwhile(fake: Fake) -> None:
    gone = {"error": {"message": "not loaded", "type": "unavailable_error", "code": "model_not_loaded"}}
    fake.routes["GET /v1/atlas/status?model=tiny"] = reply(gone, 503)
    assert "tiny (unloaded) has a memory" in run("atlas", "status", "--url", fake.url).stdout


def test_list_of_the_supervisor(fake: Fake) -> None:
    with_files(fake)
    result = run("atlas", "list", "--url", fake.url)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["tiny", "book.atlas"],
        ["tiny", "old.atlas"],
        ["tiny", "new.atlas"],
        ["tiny", "bad.atlas"],
        ["a/b", "book.atlas"],
    ]
    assert lines[4].endswith("corruption: \\x1b[2J")
    rows = as_json(run("atlas", "list", "--model", "a/b", "--json", "--url", fake.url))
    assert [(row["model_id"], row["name"]) for row in rows] == [("a/b", "book")]


def test_save_load_reset(fake: Fake) -> None:
    answer = {"file": "book", "slot": 0, "n_tokens": 1234, "bytes": 3 << 20, "ms": 250.0}
    fake.routes["POST /v1/atlas/memory/save?autoload=false"] = reply(answer)
    fake.routes["POST /v1/atlas/memory/load?model=a%2Fb"] = reply(answer | {"backup": "book_17.atlas.bak"})
    fake.routes["DELETE /v1/atlas/memory/reset?autoload=false"] = reply({"slot": 2, "reset_type": "hard"})
    saved = run("atlas", "save", "--url", fake.url)
    assert (saved.exit_code, saved.stdout) == (0, "book: 1234 tokens, 3.0 MiB, saved in 0.25 s\n")
    loaded = run("atlas", "load", "book", "--slot", "1", "--model", "a/b", "--url", fake.url).stdout.splitlines()
    assert loaded[1] == "from the backup book_17.atlas.bak: the file is missing or corrupt"
    assert run("atlas", "reset", "--hard", "--slot", "2", "--url", fake.url).stdout == "slot 2: hard reset\n"
    assert as_json(run("atlas", "save", "book", "--json", "--url", fake.url)) == answer
    assert as_json(run("atlas", "reset", "--json", "--url", fake.url))["slot"] == 2
    assert [body for _, body in fake.seen] == [
        {},
        {"filename": "book", "slot": 1},
        {"reset_type": "hard", "slot": 2},
        {"filename": "book"},
        {"reset_type": "soft"},
    ]


def test_errors_of_a_child_pass(fake: Fake) -> None:
    fake.routes["POST /v1/atlas/memory/load"] = reply(CHILD_404, 404)
    result = run("atlas", "load", "none", "--url", fake.url)
    assert (result.exit_code, result.stderr) == (1, "Error: there is no memory file none.atlas\n")
    error = as_json(run("atlas", "load", "none", "--json", "--url", fake.url))["error"]
    assert (error["type"], error["status"]) == ("atlas_memory_error", 404)


def test_rm(fake: Fake) -> None:
    fake.routes["DELETE /v1/atlas/memory?model=tiny&file=book"] = reply({"deleted": 3})
    fake.routes["DELETE /v1/atlas/memory?model=tiny&file=none"] = reply(CHILD_404, 404)
    result = run("atlas", "rm", "book", "--model", "tiny", "--url", fake.url)
    assert (result.exit_code, result.stdout) == (0, "book: 3 files deleted\n")
    result = run("atlas", "rm", "none", "book", "--model", "tiny", "--json", "--url", fake.url)
    assert result.exit_code == 1
    assert as_json(result) == [
        {"name": "none", "error": "there is no memory file none.atlas"},
        {"name": "book", "deleted": 3},
    ]


def test_prune_of_the_supervisor(fake: Fake) -> None:
    with_files(fake)
    for path in ("model=tiny&file=old", "model=tiny&file=book", "model=a%2Fb&file=book"):
        fake.routes[f"DELETE /v1/atlas/memory?{path}"] = reply({"deleted": 1})

    def deleted() -> list[str]:
        return [path.partition("?")[2] for path, _ in fake.seen if path.startswith("DELETE")]

    dry = run("atlas", "prune", "--older-than", "30d", "--dry-run", "--url", fake.url)
    assert (dry.exit_code, deleted()) == (0, [])
    assert dry.stdout.splitlines()[1].split() == ["tiny", "old", "1.0", "MiB", "40", "d", "0", "h"]
    assert dry.stdout.splitlines()[-1] == "1 session would be deleted"
    document = as_json(run("atlas", "prune", "--keep-count", "1", "--json", "--url", fake.url))
    assert [(one["in"], one["name"]) for one in document["sessions"]] == [("tiny", "book"), ("tiny", "old")]
    assert deleted() == ["model=tiny&file=book", "model=tiny&file=old"]
    fake.seen.clear()
    assert run("atlas", "prune", "--older-than", "1w", "--model", "a/b", "--url", fake.url).exit_code == 0
    assert deleted() == ["model=a%2Fb&file=book"]
    busy = {"error": {"code": 409, "message": "the slot is busy", "type": "atlas_memory_error"}}
    fake.routes["DELETE /v1/atlas/memory?model=tiny&file=old"] = reply(busy, 409)
    failed = run("atlas", "prune", "--older-than", "30d", "--url", fake.url)
    assert failed.exit_code == 1
    assert failed.stdout.splitlines()[1].endswith("the slot is busy")
    assert failed.stdout.splitlines()[-1] == "0 sessions deleted"


def test_prune_of_a_folder(tmp_path: Path) -> None:
    now = int(time.time())
    for folder in ("tiny", "a%2Fb"):
        (tmp_path / folder).mkdir()
        for days, name in enumerate(["new", "week", "old"]):
            path = tmp_path / folder / f"{name}.atlas"
            path.write_bytes(memory_file(name=name, saved=now - 5 * days * DAY))
            path.with_name(f"{name}_17.atlas.bak").write_bytes(b"backup")
    (tmp_path / "tiny" / "bad.atlas").write_bytes(b"bad")
    size = (tmp_path / "tiny" / "new.atlas").stat().st_size

    def there() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.atlas*"))

    before = there()
    dry = as_json(run("atlas", "prune", "--max-bytes", str(2 * size + 9), "--dry-run", "--json", str(tmp_path)))
    assert [one["name"] for one in dry["sessions"]] == ["old", "old"]
    assert there() == before

    with (tmp_path / "tiny" / ".old.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        result = run("atlas", "prune", "--older-than", "9d", str(tmp_path))
        assert result.exit_code == 1
        assert "in use by another process" in result.stdout
    assert run("atlas", "prune", "--keep-count", "1", str(tmp_path)).exit_code == 0
    assert there() == sorted(
        [
            "tiny/bad.atlas",
            *(f"{folder}/new{end}" for folder in ("tiny", "a%2Fb") for end in (".atlas", "_17.atlas.bak")),
        ]
    )
    rows = as_json(run("atlas", "list", "--json", str(tmp_path)))
    assert [row["file"] for row in rows] == ["a%2Fb/new.atlas", "tiny/bad.atlas", "tiny/new.atlas"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--older-than", "soon"],
        ["--max-bytes", "-1"],
        ["--keep-count", "-1"],
        ["--keep-count", "1", "-m", "x", "."],
    ],
)
def test_prune_needs_limits(words: list[str]) -> None:
    assert run("atlas", "prune", *words).exit_code == 2


def test_amounts() -> None:
    assert [seconds(text) for text in ("90", "1.5m", "12 h", "30D", "1w")] == [90, 90, 43200, 30 * DAY, 7 * DAY]
    assert [bytes_of(text) for text in ("1000", "500M", "2 GiB", "1kb")] == [1000, 500 << 20, 2 << 30, 1024]


def test_what_is_expendable() -> None:
    files = [Stored("a", 100, 10), Stored("b", 300, 10), Stored("c", 200, 10)]

    def names(**limits: Any) -> list[str]:
        return [file.name for file in expendable(files, 310, **limits)]

    assert names() == []
    assert names(older_than=110) == ["a"]
    assert names(keep_count=1) == ["c", "a"]
    assert names(keep_count=0) == ["b", "c", "a"]
    assert names(max_bytes=20) == ["a"]
    assert names(max_bytes=9) == ["b", "c", "a"]
    assert names(older_than=1000, keep_count=2, max_bytes=15) == ["c", "a"]
