"""The patches: applied exactly or not at all, and known by their content."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_native import MAIN, NEW_FILE, PATCH, make_patches, make_tree

from supervisor.setup import native, patching
from supervisor.setup.fetch import SetupError
from supervisor.setup.patching import PatchSeries


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    return make_patches(tmp_path / "patches")


def test_apply_changes_adds_and_copies(tree: Path, patches: Path) -> None:
    (patches / "0002-new.patch").write_text(NEW_FILE)
    (patches / "series").write_text("0001-series.patch\n0002-new.patch\n")
    (patches / "files/src").mkdir(parents=True)
    (patches / "files/src/memory.cpp").write_text("int memory() { return 1; }\n")
    PatchSeries(patches).apply(tree)
    assert "patches: %s" in (tree / "main.cpp").read_text()
    assert (tree / "src/memory.h").read_text() == "#pragma once\nint memory();\n"
    assert (tree / "src/memory.cpp").read_text() == "int memory() { return 1; }\n"
    assert not list(tree.rglob("*.orig"))


def test_a_mail_formatted_patch_applies(tree: Path, patches: Path) -> None:
    head = "From 1111 Mon Sep 17 00:00:00 2001\nSubject: [PATCH] say which\n\nWhy.\n---\n main.cpp | 1 +\n\n"
    (patches / "0001-series.patch").write_text(head + PATCH + "-- \n2.39.5\n\n")
    PatchSeries(patches).apply(tree)
    assert "patches: %s" in (tree / "main.cpp").read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [("return 0;", "return 1;"), ("#include", "// another first line\n#include"), (MAIN, "")],
    ids=["other text", "other line", "empty file"],
)
def test_a_hunk_that_does_not_apply_exactly_is_an_error(tree: Path, patches: Path, old: str, new: str) -> None:
    (tree / "main.cpp").write_text(MAIN.replace(old, new))
    with pytest.raises(SetupError, match=r"0001-series\.patch does not apply"):
        PatchSeries(patches).apply(tree)


def test_a_file_that_is_missing_is_an_error(tree: Path, patches: Path) -> None:
    (tree / "main.cpp").unlink()
    with pytest.raises(SetupError, match="does not exist"):
        PatchSeries(patches).apply(tree)


def test_a_tree_that_is_patched_already_is_an_error(tree: Path, patches: Path) -> None:
    PatchSeries(patches).apply(tree)
    with pytest.raises(SetupError, match="untouched tree"):
        PatchSeries(patches).apply(tree)


def test_a_patch_cannot_leave_the_tree(tree: Path, patches: Path) -> None:
    evil = NEW_FILE.replace("b/src/memory.h", "b/../../evil.h")
    (patches / "0001-series.patch").write_text(evil)
    with pytest.raises(SetupError):
        PatchSeries(patches).apply(tree)
    assert not list(tree.parent.rglob("evil.h"))


@pytest.mark.parametrize("content", ["", "no patch at all\n"])
def test_a_file_that_is_no_patch_is_an_error(tree: Path, patches: Path, content: str) -> None:
    (patches / "0001-series.patch").write_text(content)
    with pytest.raises(SetupError, match=r"no patch data|not a unified diff"):
        PatchSeries(patches).apply(tree)


def test_the_working_folder_is_the_same_afterwards(tree: Path, patches: Path) -> None:
    before = Path.cwd()
    (tree / "main.cpp").write_text("")
    with pytest.raises(SetupError):
        PatchSeries(patches).apply(tree)
    assert Path.cwd() == before


def test_a_missing_patch_is_named(patches: Path) -> None:
    (patches / "0001-series.patch").unlink()
    with pytest.raises(SetupError, match=r"0001-series\.patch"):
        patching.patch_series(patches)


def test_label_counts_patches_and_changes_with_any_content(patches: Path) -> None:
    labels = [patching.patch_series(patches)]
    assert re.fullmatch(r"llama-supervisor-1-[0-9a-f]{8}", labels[0])
    (patches / "0001-series.patch").write_text(PATCH + "\n")
    labels.append(patching.patch_series(patches))
    (patches / "files").mkdir()
    (patches / "files/a.h").write_text("1")
    labels.append(patching.patch_series(patches))
    (patches / "files/a.h").rename(patches / "files/b.h")
    labels.append(patching.patch_series(patches))
    (patches / "0002.patch").write_text(NEW_FILE)
    (patches / "series").write_text("0001-series.patch\n0002.patch\n")
    labels.append(patching.patch_series(patches))
    (patches / "series").write_text("0002.patch\n0001-series.patch\n")
    labels.append(patching.patch_series(patches))
    assert len(set(labels)) == len(labels)
    assert labels[-1].startswith("llama-supervisor-2-")


def test_a_comment_in_the_series_changes_nothing(patches: Path) -> None:
    before = patching.patch_series(patches)
    (patches / "series").write_text("# another remark\n0001-series.patch\n")
    assert patching.patch_series(patches) == before


def test_the_shipped_patches_are_found_and_whole() -> None:
    series = PatchSeries(patching.patches_folder())
    assert series.patches
    assert series.label == native.patch_series()
