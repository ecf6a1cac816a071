"""What is worth saving, what is restored, and when: with a child that only answers for its slots."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_files
import pytest

from supervisor import slot_cache
from supervisor.config import Config
from supervisor.metrics import Metrics
from supervisor.models import gguf
from supervisor.models.catalog import Model
from supervisor.slot_cache import Kept, SlotCache, wants, worth_saving
from supervisor.upstream import UpstreamClosed

KEY = "0" * 24


@dataclass
class Child:
    """Has two slots; saves 20 bytes for each."""

    folder: Path
    kept: Kept | None
    used: list[int] = field(default_factory=lambda: [0])
    refuses: int = 0
    dies: bool = False
    model: str = "m"
    forced: bool = False
    stopping: bool = False
    atlas: Any = None
    asked: list[str] = field(default_factory=list)

    async def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        self.asked.append(path)
        if self.dies:
            raise UpstreamClosed("it died")
        if method == "GET":
            rest = {"n_prompt_tokens": 200, "is_processing": False, "speculative": False}
            slots = [{"id": n} | ({"id_task": n} | rest if n in self.used else {}) for n in (0, 1)]
            return 200, json.dumps(slots).encode()
        if self.refuses:
            return self.refuses, b'{"error": {"message": "no"}}'
        path_ = self.folder / json.loads(body)["filename"]
        if "save" in path:
            path_.write_bytes(b"x" * 20)
            return 200, b'{"n_saved": 200, "n_written": 20, "timings": {"save_ms": 1}}'
        assert path_.stat().st_size == 20
        return 200, b'{"n_restored": 200}'


@dataclass
class World:
    cache: SlotCache
    model: Model
    folder: Path
    metrics: Metrics

    def child(self, **more: Any) -> Child:
        return Child(self.folder, self.cache.expect(self.model, KEY), **more)

    async def saved(self, **more: Any) -> Child:
        """Return a child that was restored to, and has been saved."""
        child = self.child(**more)
        await self.cache.restore(child, 1.0, awaited=True)
        await self.cache.save(child, self.model, KEY)
        return child

    def files(self) -> list[str]:
        return sorted(path.suffix for path in self.folder.iterdir())

    def failures(self) -> float:
        return sum(one.value for one in self.metrics.slot_failures.collect()[0].samples)


def config(folder: Path, own: dict[str, Any] | None = None, **models: Any) -> Config:
    section = {"slot_cache_directory": folder / "slots", "directory": folder / "models", "overrides": {"m": own or {}}}
    return Config.model_validate({"models": section | models})


def a_model(folder: Path, **keys: Any) -> Model:
    path = folder / "m.gguf"
    path.write_bytes(gguf_files.gguf(gguf_files.llama()))
    header = gguf.read_header(path)
    header.metadata.update(keys)
    return Model("m", path, (path,), None, 1, 0, header, None)


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(slot_cache, "MIN_FREE", 0)
    metrics = Metrics()
    cache, model = SlotCache(config(tmp_path), metrics), a_model(tmp_path)
    await cache.open()
    folder = cache.folder(model)
    assert folder is not None
    yield World(cache, model, folder, metrics)
    cache.store.close()


async def test_what_was_saved_is_restored_into_the_next(world):
    await world.saved()
    assert world.files() == [".slot"]
    child = world.child()
    await world.cache.restore(child, 1.0, awaited=True)
    assert world.files() == [".used"]
    assert child.asked == ["/slots", "/slots/0?action=restore"]
    assert world.metrics.slot_bytes.collect()[0].samples[0].value == 20


async def test_a_prompt_that_nobody_used_stays_as_it_is(world):
    await world.saved()
    child = await world.saved(used=[1])
    assert child.asked[-1] == "/slots/1?action=save"
    assert world.files() == [".slot", ".slot"]
    await world.saved(used=[0, 1])
    assert world.files() == [".slot", ".slot"]


async def test_a_child_that_dies_of_it_takes_it_along(world):
    await world.saved()
    child = world.child()
    await world.cache.restore(child, 1.0, awaited=True)
    assert world.child().kept == Kept(KEY)
    assert world.files() == []


@pytest.mark.parametrize(("awaited", "load", "asked"), [(True, 1.0, 1), (True, 10.0, 2), (False, 1.0, 2)])
async def test_requests_wait_only_for_what_is_quick(world, monkeypatch, awaited, load, asked):
    await world.saved(used=[0, 1])
    monkeypatch.setattr(slot_cache, "BYTES_PER_SECOND", 300)  # 30 bytes in a tenth of a second
    child = world.child()
    await world.cache.restore(child, load, awaited=awaited)
    assert len([path for path in child.asked if "restore" in path]) == asked


@pytest.mark.parametrize(("more", "failures"), [({"refuses": 500}, 1), ({"dies": True}, 1), ({"refuses": 501}, 0)])
async def test_what_goes_wrong_is_counted_and_leaves_nothing(world, more, failures):
    await world.saved(**more)
    assert world.files() == []
    assert world.failures() == failures


async def test_a_full_disk_is_not_written_to(world, monkeypatch):
    monkeypatch.setattr(slot_cache, "MIN_FREE", 1 << 62)
    child = await world.saved()
    assert child.asked == ["/slots"]
    assert world.failures() == 1


@pytest.mark.parametrize("change", [{"forced": True}, {"kept": None}, {"kept": Kept(KEY)}, {"kept": Kept("1" * 24)}])
async def test_what_ends_at_once_or_before_it_was_ready_or_would_not_fit_is_not_saved(world, change):
    child = world.child()
    for name, value in change.items():
        setattr(child, name, value)
    if child.kept is not None:
        child.kept.ready = child.kept.key != KEY or child.forced
    await world.cache.save(child, world.model, KEY)
    assert child.asked == []


async def test_turned_off_the_files_go(world, tmp_path):
    await world.saved()
    world.cache.apply(config(tmp_path, {"slot_cache": False}), [world.model])
    assert world.files() == []
    assert world.cache.folder(world.model) is None


@pytest.mark.parametrize(
    ("own", "models", "keys", "wanted"),
    [
        ({}, {}, {}, True),
        ({}, {"slot_cache": False}, {}, False),
        ({"slot_cache": True}, {"slot_cache": False}, {}, True),
        ({"slot_cache": False}, {}, {}, False),
        ({"atlas": {"enabled": "on"}}, {}, {}, False),
        ({"atlas": {"enabled": "auto"}}, {}, {}, True),
        ({"args": ["--slot-save-path", "x"]}, {}, {}, False),
        ({"args": ["--embedding"]}, {}, {}, False),
        ({}, {}, {"llama.attention.sliding_window": 512}, False),
        ({"args": ["--swa-full"]}, {}, {"llama.attention.sliding_window": 512}, True),
    ],
)
def test_which_models_keep_their_prompts(tmp_path, own, models, keys, wanted):
    assert wants(config(tmp_path, own, **models), a_model(tmp_path, **keys)) is wanted


def test_what_is_worth_a_file_is_what_was_used_last_first():
    def slot(number: int, task: int, tokens: int = 128, **more: bool) -> dict[str, Any]:
        base = {"id": number, "id_task": task, "n_prompt_tokens": tokens, "is_processing": False, "speculative": False}
        return base | more

    slots = [
        slot(0, 5),
        slot(1, 9),
        slot(2, 8, tokens=127),
        slot(3, 7, is_processing=True),
        slot(4, 6, speculative=True),
        {"id": 5, "is_processing": False, "speculative": False},
    ]
    assert worth_saving(slots) == [(1, 128), (0, 128)]
