"""The catalog while files come, grow, move and go: real file events in real folders."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from gguf_files import gguf, llama, write
from watchdog import events

from supervisor.config import ModelsSection
from supervisor.models import catalog as catalog_module
from supervisor.models import folder_watch
from supervisor.models.catalog import Catalog, Change

pytestmark = pytest.mark.filterwarnings("ignore:Callback with id:RuntimeWarning")
"""See folder_watch: as an error this warning would end watchdog's thread."""

DEADLINE = 60.0
"""Seconds that a test of real file events waits before it fails."""


@asynccontextmanager
async def watched(folder: Path, **settings: object) -> AsyncIterator[Catalog]:
    """Run a catalog on the real clock that settles fast and rescans only by events, unless told otherwise."""
    changes: list[Change] = []
    options = {"settle_seconds": 0.2, "scan_interval_seconds": 0, **settings}
    catalog = Catalog(ModelsSection.model_validate({"directory": folder, **options}), changes.append)
    await catalog.start()
    try:
        yield catalog
    finally:
        await catalog.stop()


async def until(catalog: Catalog, condition: Callable[[dict[str, str | None]], bool]) -> None:
    """Wait until the ids and errors of the models fulfil `condition`."""
    async with asyncio.timeout(DEADLINE):
        while not condition({id: model.error for id, model in catalog.models.items()}):
            await asyncio.sleep(0.02)


@pytest.fixture
def events_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing but file events and settling lead to a scan."""
    monkeypatch.setattr(catalog_module, "POLL_SECONDS", 10_000)


@pytest.mark.usefixtures("events_only")
async def test_watch_follows_the_life_of_a_file(tmp_path: Path) -> None:
    async with watched(tmp_path) as catalog:
        assert catalog.models == {}
        write(tmp_path / "a.gguf")
        await until(catalog, lambda models: models == {"a": None})
        before = catalog.models["a"]
        write(tmp_path / "a.part", gguf(llama(llama__context_length=77))).rename(tmp_path / "a.gguf")
        await until(catalog, lambda _: catalog.models["a"].fingerprint != before.fingerprint)
        assert catalog.models["a"].header is not None
        assert catalog.models["a"].header.context_length == 77
        (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
        await until(catalog, lambda models: models == {"b": None})
        (tmp_path / "b.gguf").unlink()
        await until(catalog, lambda models: models == {})


@pytest.mark.usefixtures("events_only")
async def test_watch_waits_for_a_growing_file(tmp_path: Path) -> None:
    content = gguf(llama())
    async with watched(tmp_path) as catalog:
        with (tmp_path / "a.gguf").open("wb") as file:
            for start in range(0, len(content), 1000):
                file.write(content[start : start + 1000])
                file.flush()
                await asyncio.sleep(0.1)
                assert all(model.error for model in catalog.models.values())
        await until(catalog, lambda models: models == {"a": None})


@pytest.mark.usefixtures("events_only")
async def test_watch_lists_a_copy_that_stopped(tmp_path: Path) -> None:
    async with watched(tmp_path) as catalog:
        with (tmp_path / "a.gguf").open("wb") as file:  # stays open: no event will come any more
            file.write(gguf(llama())[:600])
            file.flush()
            await until(catalog, lambda models: "truncated" in str(models.get("a")))


@pytest.mark.usefixtures("events_only")
async def test_watch_sees_into_new_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    async with watched(tmp_path) as catalog:
        (tmp_path / "sub" / "deep").mkdir(parents=True)
        await asyncio.sleep(0.05)
        write(elsewhere / "a.gguf").rename(tmp_path / "sub" / "deep" / "a.gguf")
        await until(catalog, lambda models: models == {"a": None})
        write(elsewhere / "tree" / "b.gguf")
        (elsewhere / "tree").rename(tmp_path / "tree")
        await until(catalog, lambda models: set(models) == {"a", "b"})
        write(tmp_path / "tree" / "c.gguf")
        await until(catalog, lambda models: set(models) == {"a", "b", "c"})
        (tmp_path / "tree").rename(elsewhere / "tree")
        await until(catalog, lambda models: set(models) == {"a"})
        shutil.rmtree(tmp_path / "sub")
        await until(catalog, lambda models: models == {})


@pytest.mark.usefixtures("events_only")
async def test_watch_sees_into_linked_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    root = tmp_path / "models"
    root.symlink_to(tmp_path_factory.mktemp("real"))
    async with watched(root) as catalog:
        write(root / "a.gguf")
        await until(catalog, lambda models: set(models) == {"a"})
        (root / "more").symlink_to(elsewhere)
        write(elsewhere / "b.gguf")
        await until(catalog, lambda models: set(models) == {"a", "b"})
        write(elsewhere / "c.gguf")
        await until(catalog, lambda models: set(models) == {"a", "b", "c"})
        (root / "more").unlink()
        await until(catalog, lambda models: set(models) == {"a"})


async def test_watch_picks_up_a_folder_that_appears_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "POLL_SECONDS", 0.05)
    root = tmp_path / "models"
    async with watched(root) as catalog:
        assert "does not exist" in catalog.problems[0]
        for name in ("a", "b"):
            write(root / f"{name}.gguf")
            await until(catalog, lambda models, name=name: models == {name: None})
            monkeypatch.setattr(catalog_module, "POLL_SECONDS", 0.05)
            shutil.rmtree(root)
            await until(catalog, lambda models: models == {} and bool(catalog.problems))
        root.mkdir()
        await until(catalog, lambda _: not catalog.problems)
        monkeypatch.setattr(catalog_module, "POLL_SECONDS", 10_000)
        write(root / "c.gguf")
        await until(catalog, lambda models: models == {"c": None})


async def test_without_file_events_the_folder_is_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(folder_watch, "Observer", refuse)
    monkeypatch.setattr(catalog_module, "POLL_SECONDS", 0.05)
    async with watched(tmp_path) as catalog:
        write(tmp_path / "a.gguf")
        await until(catalog, lambda models: models == {"a": None})
        (tmp_path / "a.gguf").unlink()
        await until(catalog, lambda models: models == {})
    assert caplog.text.count("inotify watch limit reached") == 1


@pytest.mark.usefixtures("events_only")
async def test_the_folder_is_rescanned_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_watch.FolderWatch, "on_any_event", lambda self, event: None)
    async with watched(tmp_path, scan_interval_seconds=0.1) as catalog:
        write(tmp_path / "a.gguf")
        await until(catalog, lambda models: models == {"a": None})


async def test_one_failed_scan_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(tmp_path, scan_interval_seconds=0.1) as catalog:
        with monkeypatch.context() as broken:
            broken.setattr(catalog_module, "walk", lambda root: 1 / 0)
            async with asyncio.timeout(DEADLINE):
                while "could not be scanned" not in caplog.text:
                    await asyncio.sleep(0.02)
        write(tmp_path / "a.gguf")
        await until(catalog, lambda models: models == {"a": None})


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        (events.FileCreatedEvent("m/a.gguf"), True),
        (events.FileModifiedEvent("m/a.GGUF"), True),
        (events.FileClosedEvent(b"m/a\xff.gguf"), True),
        (events.FileMovedEvent("m/a.part", "m/a.gguf"), True),
        (events.FileDeletedEvent("m/link-to-a-folder"), True),
        (events.DirCreatedEvent("m/sub"), True),
        (events.FileOpenedEvent("m/a.gguf"), False),
        (events.FileClosedNoWriteEvent("m/a.gguf"), False),
        (events.FileModifiedEvent("m/a.gguf.part"), False),
        (events.DirModifiedEvent("m"), False),
    ],
)
def test_only_events_that_matter_count(event: events.FileSystemEvent, counts: bool) -> None:
    seen: list[bool] = []
    folder_watch.FolderWatch(lambda: seen.append(True)).dispatch(event)
    assert seen == [True] * counts


async def test_a_watch_is_made_once(tmp_path: Path) -> None:
    watch = folder_watch.FolderWatch(lambda: None)
    assert [await asyncio.to_thread(watch.follow, [tmp_path]) for _ in range(3)] == [True, False, False]
    assert watch.working
    assert not await asyncio.to_thread(watch.follow, [tmp_path / "absent"])
    assert not watch.working
    await asyncio.to_thread(watch.stop)


async def test_stop_may_be_called_at_any_time(tmp_path: Path) -> None:
    catalog = Catalog(ModelsSection(directory=tmp_path), lambda change: None)
    await catalog.stop()
    await catalog.start()
    await catalog.stop()
    await catalog.stop()
    write(tmp_path / "a.gguf", mtime=1.0)
    assert await catalog.rescan() == Change(added=frozenset("a"))
