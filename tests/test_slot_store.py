"""Which saved prompts count, and which go: on files that the tests write as a child would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor import slot_store
from supervisor.slot_store import SlotStore, key_of


@pytest.fixture
def store(tmp_path: Path):
    made = SlotStore(tmp_path / "slots", tmp_path / "models")
    made.open()
    yield made
    made.close()


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "server").write_text("x")
    return key_of([str(tmp_path / "server"), "--ctx-size", "1"], {}, [])


def put(store: SlotStore, key: str, model: str = "m", size: int = 10, mtime: int = 0) -> Path:
    part = store.part(model)
    part.write_bytes(b"x" * size)
    if mtime:
        os.utime(part, ns=(mtime, mtime))
    before = set(part.parent.iterdir())
    store.complete(part, key, 200, size)
    return (set(part.parent.iterdir()) - before).pop()


def test_a_complete_file_is_found_by_its_key_only(store, key):
    path = put(store, key)
    assert [(saved.path, saved.tokens, saved.bytes) for saved in store.find("m", key)] == [(path, 200, 10)]
    assert store.find("other", key) == []
    assert store.find("m", "0" * 24) == []
    assert not path.exists()  # nobody can use it any more


def test_files_and_folders_are_private(store, key):
    old = os.umask(0)
    try:
        path = put(store, key)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [folder.stat().st_mode & 0o777 for folder in (path.parent, store.folder)] == [0o700, 0o700]


def test_model_names_stay_within_the_folder(store, key):
    for name in ("../../etc", "/etc", "..", ".", "a/b", "x" * 300, "\udcff"):
        path = put(store, key, name)
        assert path.parent.parent == store.folder
        assert len(store.find(name, key)) == 1


@pytest.mark.parametrize("change", ["cut", "longer", "same size", "gone", "link"])
def test_a_file_that_was_changed_counts_for_nothing(store, key, change, tmp_path):
    path = put(store, key, mtime=1)
    match change:
        case "cut":
            os.truncate(path, 5)
        case "longer":
            path.write_bytes(b"x" * 11)
        case "same size":
            path.write_bytes(b"y" * 10)
        case "gone":
            path.unlink()
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
    assert store.find("m", key) == []
    assert not path.is_symlink()
    assert not path.exists()


def test_half_a_file_never_counts(store, key):
    part = store.part("m")
    part.write_bytes(b"x" * 5)
    with pytest.raises(OSError, match="5 bytes were written of 10"):
        store.complete(part, key, 200, 10)
    assert store.find("m", key) == []
    assert not part.exists()


def test_a_newer_one_takes_the_place_of_the_older(store, key):
    put(store, key, mtime=1)
    (older,) = store.find("m", key)
    part = store.part("m")
    part.write_bytes(b"x" * 20)
    store.complete(part, key, 300, 20, older)
    assert [saved.tokens for saved in store.find("m", key)] == [300]


def test_the_oldest_go(store, key):
    paths = [put(store, key, model, mtime=number) for number, model in enumerate("aabb", 1)]
    store.evict("b", 10, 1000)
    assert [path.exists() for path in paths] == [True, True, False, True]
    assert store.total() == 30
    store.evict("b", 1000, 20)
    assert [path.exists() for path in paths] == [False, True, False, True]
    store.evict("b", 0, 1000)
    assert [path.exists() for path in paths] == [False, True, False, False]


def test_the_newest_come_first(store, key):
    for number in (2, 3, 1):
        put(store, key, mtime=number)
    assert [saved.mtime for saved in store.find("m", key)] == [3, 2, 1]


def test_what_a_child_has_is_not_given_to_another_unless_it_is_put_back(store, key):
    put(store, key)
    taken = store.take(store.find("m", key)[0])
    back = store.put_back(taken)
    assert store.find("m", key) == [back]
    store.take(back)
    assert store.find("m", key) == []
    assert store.total() == 0


def test_a_start_clears_up(tmp_path, key, monkeypatch):
    store = SlotStore(tmp_path / "slots", tmp_path / "models")
    store.open()
    whole = put(store, key)
    put(store, key, "used").rename(store.folder / "used" / f"{whole.stem}.used")
    store.part("half")
    put(store, key, "cut").write_bytes(b"")
    (store.make("m") / "stranger").write_text("")
    store.close()
    store.open()
    assert list(store.folder.rglob("*")) == [whole.parent, whole]
    store.close()
    monkeypatch.setattr(slot_store, "_boot", lambda: "deadbeef")
    store.open()
    assert list(store.folder.iterdir()) == []
    store.close()


def test_one_supervisor_at_a_time(store, tmp_path):
    with pytest.raises(BlockingIOError):
        SlotStore(tmp_path / "slots", tmp_path / "models").open()
    other = SlotStore(tmp_path / "slots", tmp_path / "other models")
    other.open()
    other.close()


def test_the_key_is_that_of_what_the_cache_depends_on(tmp_path):
    server, model = tmp_path / "server", tmp_path / "m.gguf"
    for path in (server, model):
        path.write_text("1")

    def key(*flags: str, environ: dict[str, str] | None = None) -> str:
        return key_of([str(server), *flags], environ or {}, [model])

    first = key("--host", "1.sock", "--alias", "a", "--ctx-size", "4096")
    assert first == key("--host", "2.sock", "--alias", "b", "--ctx-size", "4096")
    others = {
        key("--host", "1.sock", "--alias", "a", "--ctx-size", "8192"),
        key("--host", "1.sock", "--alias", "a", "--ctx-size", "4096", "-ctk", "q8_0"),
        key("--host", "1.sock", "--alias", "a", "--ctx-size", "4096", environ={"A": "b"}),
    }
    for path in (server, model):
        path.write_text("2")
        os.utime(path, ns=(1, len(others)))
        others.add(key("--host", "1.sock", "--alias", "a", "--ctx-size", "4096"))
    assert len(others - {first}) == 5
    with pytest.raises(FileNotFoundError):
        key_of([str(server)], {}, [tmp_path / "gone"])
