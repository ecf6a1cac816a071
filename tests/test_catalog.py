"""The catalog: what it offers, when, and under which names; on real files, with an injected clock."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest
from gguf_files import gguf, llama, write, write_mmproj, write_shards

from supervisor.config import ModelOverride, ModelsSection
from supervisor.errors import ModelInvalid, ModelNotFound
from supervisor.models import folder_scan
from supervisor.models.catalog import Catalog, Change

NOW = 1_000_000.0
OLD = NOW - 1000


class Clock:
    """Seconds that pass when told."""

    now = NOW

    def __call__(self) -> float:
        return self.now


class Bench:
    """A catalog over a folder, its clock, and the changes it told."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.clock = Clock()
        self.changes: list[Change] = []
        self.folder = folder
        self.catalog = Catalog(section(folder, **settings), self.changes.append, self.clock)

    async def scan(self, after: float = 0.0) -> list[str]:
        """Let `after` seconds pass, scan, and return the ids of the valid models."""
        self.clock.now += after
        await self.catalog.rescan()
        return [id for id, model in self.catalog.models.items() if model.error is None]

    def error(self, id: str) -> str:
        return str(self.catalog.models[id].error)


def section(folder: Path, **settings: object) -> ModelsSection:
    return ModelsSection.model_validate({"directory": folder, "settle_seconds": 5, **settings})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# What is found


async def test_finds_models_in_folders(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    write(bench.folder / "deep" / "er" / "b.GGUF", mtime=OLD)
    write_shards(bench.folder / "c", "c", 3, mtime=OLD)
    write_mmproj(bench.folder / "c" / "mmproj-F16.gguf", mtime=OLD)
    for ignored in (".hidden.gguf", ".cache/x.gguf", "x.gguf.part", "x.gguf.tmp", "x.gguf.aria2", "readme.md"):
        write(bench.folder / ignored, mtime=OLD)
    assert await bench.scan() == ["a", "b", "c"]
    assert bench.changes == [Change(added=frozenset("abc"))]
    a, c = bench.catalog.models["a"], bench.catalog.models["c"]
    assert a.path == bench.folder / "a.gguf"
    assert a.path.is_absolute()
    assert (a.size, a.mtime) == (a.path.stat().st_size, OLD)
    assert a.header is not None
    assert a.header.architecture == "llama"
    assert c.mmproj == bench.folder / "c" / "mmproj-F16.gguf"
    assert [path.name for path in c.files] == [f"c-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert bench.catalog.problems == []


async def test_broken_files_are_listed_with_the_reason(bench: Bench) -> None:
    write(bench.folder / "good.gguf", mtime=OLD)
    write(bench.folder / "empty.gguf", b"", mtime=OLD)
    write(bench.folder / "text.gguf", b"hello", mtime=OLD)
    write(bench.folder / "cut.gguf", gguf(llama())[:-1], mtime=OLD)
    write_shards(bench.folder, "s", 2, mtime=OLD)[1].unlink()
    assert await bench.scan() == ["good"]
    assert bench.error("empty") == "empty file"
    assert bench.error("text").startswith("not a GGUF file")
    assert bench.error("cut").startswith("truncated: tensor 'blk.0.attn_q.weight' ends")
    assert bench.error("s") == "shards are missing: s-00002-of-00002.gguf"


async def test_links_are_followed_without_going_in_circles(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "far.gguf", mtime=OLD)
    write(bench.folder / "sub" / "near.gguf", mtime=OLD)
    (bench.folder / "linked.gguf").symlink_to(elsewhere / "far.gguf")
    (bench.folder / "nowhere.gguf").symlink_to(elsewhere / "absent.gguf")
    (bench.folder / "self.gguf").symlink_to(bench.folder / "self.gguf")
    (bench.folder / "a-folder").symlink_to(elsewhere)
    (bench.folder / "b-same").symlink_to(bench.folder / "sub")
    (bench.folder / "sub" / "up").symlink_to(bench.folder)
    (bench.folder / "whole-disk").symlink_to("/")
    (elsewhere / "back").symlink_to(bench.folder)
    assert await bench.scan() == ["far", "linked", "near"]
    assert bench.catalog.models["near"].path == bench.folder / "sub" / "near.gguf"
    assert bench.catalog.models["far"].path == bench.folder / "a-folder" / "far.gguf"


async def test_special_files_are_ignored(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe.gguf")
    write(bench.folder / "folder.gguf" / "x.gguf", mtime=OLD)
    assert await bench.scan() == ["x"]


async def test_odd_names_break_nothing(bench: Bench) -> None:
    names = [
        b"line\nend.gguf",
        b"bad\xff.gguf",
        b"bad\xfe.gguf",
        "\u6f22 \U0001f600.gguf".encode(),
        b"a,b 'c' \"d\".gguf",
    ]
    for name in names:
        write(bench.folder / os.fsdecode(name), mtime=OLD)
    write(bench.folder / os.fsdecode(b"dir\xff") / "empty.gguf", b"", mtime=OLD)
    found = await bench.scan()
    assert found == ["a,b 'c' \"d\"", "bad%FE", "bad%FF", "line%0Aend", "\u6f22 \U0001f600"]
    assert json.dumps([*found, *bench.catalog.models, *bench.catalog.problems], ensure_ascii=False).encode()
    assert bench.catalog.resolve("line%0Aend").path.exists()


async def test_an_unreadable_file_is_invalid_until_it_can_be_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    write(bench.folder / "b.gguf", mtime=OLD)
    real = folder_scan.gguf.read_header

    def refuse(path: Path) -> object:
        if path.name == "a.gguf":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(folder_scan.gguf, "read_header", refuse)
    assert await bench.scan() == ["b"]
    assert bench.error("a") == "cannot be read: Permission denied"
    monkeypatch.undo()
    assert await bench.scan() == ["a", "b"]
    assert bench.changes[-1] == Change(replaced=frozenset("a"))


async def test_an_unreadable_folder_is_reported_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    write(bench.folder / "locked" / "b.gguf", mtime=OLD)
    real = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(folder_scan.os, "scandir", refuse)
    for _ in range(3):
        assert await bench.scan() == ["a"]
    assert bench.catalog.problems == [f"folder {bench.folder / 'locked'} cannot be read: Permission denied"]
    assert caplog.text.count("cannot be read") == 1
    monkeypatch.undo()
    assert await bench.scan() == ["a", "b"]
    assert bench.catalog.problems == []


async def test_a_missing_folder_is_a_problem_until_it_appears(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "models")
    assert await bench.scan() == []
    assert "does not exist" in bench.catalog.problems[0]
    write(bench.folder / "a.gguf", mtime=OLD)
    assert await bench.scan() == ["a"]
    assert bench.catalog.problems == []


async def test_a_file_in_place_of_the_folder_is_a_problem(tmp_path: Path) -> None:
    bench = Bench(write(tmp_path / "models"))
    assert await bench.scan() == []
    assert "cannot be read: Not a directory" in bench.catalog.problems[0]


async def test_a_file_is_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(bench.folder / "a.gguf", mtime=OLD)
    reads: list[Path] = []
    real = folder_scan.gguf.read_header
    monkeypatch.setattr(folder_scan.gguf, "read_header", lambda path: (reads.append(path), real(path))[1])
    for _ in range(3):
        await bench.scan()
    assert reads == [path]
    write(path, mtime=OLD + 1)
    assert await bench.scan(after=10) == ["a"]
    assert await bench.scan(after=10) == ["a"]
    assert reads == [path, path]


# When it is offered


async def test_an_old_file_is_offered_at_once(bench: Bench) -> None:
    write(bench.folder / "old.gguf", mtime=NOW - 5)
    write(bench.folder / "new.gguf", mtime=NOW - 4)
    assert await bench.scan() == ["old"]
    assert bench.catalog.copying == {str(bench.folder / "new.gguf")}
    assert await bench.scan(after=0.5) == ["old"]
    assert await bench.scan(after=0.5) == ["new", "old"]
    assert bench.catalog.copying == frozenset()


async def test_a_growing_file_is_not_listed(bench: Bench) -> None:
    content = gguf(llama())
    for size in (10, 100, 1000):
        write(bench.folder / "a.gguf", content[:size], mtime=bench.clock.now)
        assert await bench.scan(after=4) == []
        assert not bench.catalog.models
    write(bench.folder / "a.gguf", content, mtime=bench.clock.now)
    assert await bench.scan() == []
    assert await bench.scan(after=4.9) == []
    assert await bench.scan(after=0.1) == ["a"]
    assert bench.changes == [Change(added=frozenset("a"))]


async def test_a_copy_that_stopped_is_listed_as_truncated(bench: Bench) -> None:
    content = gguf(llama())
    write(bench.folder / "a.gguf", content[:1000], mtime=NOW)
    assert await bench.scan() == []
    assert await bench.scan(after=5) == []
    assert bench.error("a").startswith("truncated")
    write(bench.folder / "a.gguf", content[:2000], mtime=bench.clock.now)  # and goes on
    assert await bench.scan() == []
    assert not bench.catalog.models
    write(bench.folder / "a.gguf", content, mtime=bench.clock.now)
    assert await bench.scan() == []
    assert await bench.scan(after=5) == ["a"]


async def test_an_mtime_in_the_future_hides_nothing_for_ever(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=NOW + 1e6)
    assert await bench.scan() == []
    assert await bench.scan(after=5) == ["a"]


async def test_a_clock_that_goes_back_hides_nothing_for_ever(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=NOW)
    assert await bench.scan() == []
    assert await bench.scan(after=-500) == []
    assert await bench.scan(after=5) == ["a"]
    assert await bench.scan(after=-500) == ["a"]


async def test_an_old_mtime_does_not_hurry_a_file_that_changes(bench: Bench) -> None:
    write(bench.folder / "a.gguf", b"GGUF", mtime=NOW)
    assert await bench.scan() == []
    write(bench.folder / "a.gguf", mtime=OLD)  # as `cp -p` does at its end
    assert await bench.scan() == []
    assert await bench.scan(after=5) == ["a"]


async def test_a_rename_over_a_model_replaces_it_without_a_gap(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    await bench.scan()
    before = bench.catalog.models["a"]
    write(bench.folder / "a.part", gguf(llama(llama__context_length=77)), mtime=NOW).rename(bench.folder / "a.gguf")
    assert await bench.scan() == ["a"]
    assert bench.catalog.models["a"] == before
    assert await bench.scan(after=5) == ["a"]
    after = bench.catalog.models["a"]
    assert after.fingerprint != before.fingerprint
    assert after.header is not None
    assert after.header.context_length == 77
    assert bench.changes == [Change(added=frozenset("a")), Change(replaced=frozenset("a"))]


async def test_a_model_overwritten_in_place_is_withdrawn_until_it_is_whole(bench: Bench) -> None:
    path = write(bench.folder / "a.gguf", mtime=OLD)
    await bench.scan()
    write(path, gguf(llama())[:500], mtime=NOW)
    assert await bench.scan() == []
    assert bench.changes[-1] == Change(removed=frozenset("a"))
    write(path, mtime=NOW + 1)
    assert await bench.scan(after=1) == []
    assert await bench.scan(after=5) == ["a"]
    assert bench.changes[-1] == Change(added=frozenset("a"))


async def test_shards_wait_for_the_last_one(bench: Bench) -> None:
    paths = write_shards(bench.folder, "s", 3, mtime=OLD)
    os.utime(paths[2], (NOW, NOW))
    assert await bench.scan() == []
    assert not bench.catalog.models
    assert await bench.scan(after=5) == ["s"]


async def test_a_projector_that_comes_later_replaces_the_model(bench: Bench) -> None:
    write(bench.folder / "vl" / "a.gguf", mtime=OLD)
    projector = write_mmproj(bench.folder / "vl" / "mmproj.gguf", mtime=NOW)
    await bench.scan()
    assert bench.catalog.models["a"].mmproj is None
    await bench.scan(after=5)
    assert bench.catalog.models["a"].mmproj == projector
    projector.unlink()
    await bench.scan()
    assert bench.catalog.models["a"].mmproj is None
    assert bench.changes[1:] == [Change(replaced=frozenset("a"))] * 2


async def test_removal_and_rename_are_told(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    write(bench.folder / "b.gguf", mtime=OLD)
    await bench.scan()
    (bench.folder / "a.gguf").rename(bench.folder / "c.gguf")
    (bench.folder / "b.gguf").unlink()
    assert await bench.catalog.rescan() == Change(added=frozenset("c"), removed=frozenset("ab"))
    assert await bench.catalog.rescan() == Change()
    assert len(bench.changes) == 2


async def test_a_file_that_vanishes_while_it_is_scanned(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)

    def vanish(path: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(folder_scan.gguf, "read_header", vanish)
    assert await bench.scan() == []
    assert not bench.catalog.models


async def test_the_settings_may_change(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(bench.folder / "sub" / "a.gguf", mtime=OLD)
    write(bench.folder / "a.gguf", mtime=OLD)
    assert await bench.scan() == ["a", "sub/a"]
    bench.catalog.settings = section(bench.folder / "sub", overrides={"a": ModelOverride(aliases=["mine"])})
    assert await bench.scan() == ["a"]
    assert bench.catalog.resolve("mine").path == bench.folder / "sub" / "a.gguf"


async def test_scans_do_not_overlap_and_survive_cancelling(bench: Bench) -> None:
    write(bench.folder / "a.gguf", mtime=OLD)
    tasks = [asyncio.create_task(bench.catalog.rescan()) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[3].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 2
    assert [result for result in results if result].count(Change(added=frozenset("a"))) == 1


# Names


@pytest.fixture
async def named(tmp_path: Path) -> Bench:
    """A catalog of three valid models and a broken one, with aliases good and bad."""
    for name in ("Gemma-3-270m", "SmolLM2-135M.Q4_1", "smollm2-135m.q8_0"):
        write(tmp_path / f"{name}.gguf", mtime=OLD)
    write(tmp_path / "broken.gguf", b"", mtime=OLD)
    overrides = {
        "Gemma-3-270m": {"aliases": ["gemma", "chat", "BROKEN", "auto", ""]},
        "broken": {"aliases": ["chat", "bad"]},
        "absent": {"aliases": ["ghost"]},
    }
    bench = Bench(tmp_path, overrides=overrides)
    await bench.scan()
    return bench


async def test_aliases_do_not_hide_other_names(named: Bench) -> None:
    assert named.catalog.models["Gemma-3-270m"].aliases == ("gemma", "chat")
    assert named.catalog.models["broken"].aliases == ("bad",)
    assert len([problem for problem in named.catalog.problems if problem.startswith("alias")]) == 4
    assert named.catalog.get("ghost") is None


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("Gemma-3-270m", "Gemma-3-270m"),
        ("gemma-3-270M", "Gemma-3-270m"),
        ("gemma", "Gemma-3-270m"),
        ("CHAT", "Gemma-3-270m"),
        ("bad", "broken"),
        ("gemma-3", None),
        ("", None),
    ],
)
async def test_get_by_id_alias_or_unique_spelling(named: Bench, name: str, id: str | None) -> None:
    model = named.catalog.get(name)
    assert (model.id if model else None) == id


async def test_spelling_must_be_unique(bench: Bench) -> None:
    for name in ("Abc", "aBC"):
        write(bench.folder / f"{name}.gguf", mtime=OLD)
    await bench.scan()
    assert bench.catalog.get("abc") is None
    assert bench.catalog.resolve("aBC").id == "aBC"


async def test_an_unknown_name_is_answered_with_near_ones(named: Bench) -> None:
    with pytest.raises(ModelNotFound) as caught:
        named.catalog.resolve("smollm2")
    assert caught.value.near == ["SmolLM2-135M.Q4_1", "smollm2-135m.q8_0"]
    assert named.catalog.near("gema") == ["gemma"]
    assert named.catalog.near("nothing like it") == []
    assert len(named.catalog.near("m")) == 3
    with pytest.raises(ModelNotFound) as caught:
        named.catalog.resolve("x" * 10**6)
    assert len(str(caught.value)) < 1000


async def test_a_broken_model_says_why(named: Bench) -> None:
    with pytest.raises(ModelInvalid, match="empty file"):
        named.catalog.resolve("broken")


@pytest.mark.parametrize("name", [None, "", "auto"])
async def test_the_default_model(named: Bench, name: str | None) -> None:
    catalog = named.catalog
    assert catalog.resolve(name).id == "Gemma-3-270m"
    assert catalog.resolve(name, ["gone", "broken", "smollm2-135m.q8_0"]).id == "smollm2-135m.q8_0"
    catalog.settings = section(named.folder, default_model="SmolLM2-135M.Q4_1")
    assert catalog.resolve(name, ["smollm2-135m.q8_0"]).id == "SmolLM2-135M.Q4_1"
    catalog.settings = section(named.folder, default_model="absent")
    with pytest.raises(ModelNotFound, match="absent"):
        catalog.resolve(name)
    catalog.settings = section(named.folder, default_model="broken")
    with pytest.raises(ModelInvalid):
        catalog.resolve(name)


async def test_the_only_valid_model_is_the_default(bench: Bench) -> None:
    with pytest.raises(ModelNotFound, match="folder is empty"):
        bench.catalog.resolve(None)
    write(bench.folder / "broken.gguf", b"", mtime=OLD)
    await bench.scan()
    with pytest.raises(ModelNotFound):
        bench.catalog.resolve("auto", ["broken"])
    write(bench.folder / "only.gguf", mtime=OLD)
    await bench.scan()
    assert bench.catalog.resolve(None, ["broken"]).id == "only"


async def test_unknown_names_may_go_to_the_default_model(named: Bench) -> None:
    named.catalog.settings = section(named.folder, unknown_model="default")
    assert named.catalog.resolve("gpt-4", ["smollm2-135m.q8_0"]).id == "smollm2-135m.q8_0"
    assert named.catalog.resolve("gemma").id == "Gemma-3-270m"
    with pytest.raises(ModelInvalid):
        named.catalog.resolve("broken")
