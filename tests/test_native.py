"""The native build: keys, resuming, checks, and a tiny cmake project from source to binary."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_native import MAIN, PATCH, Transcript, make_patches, make_tree

from supervisor.setup import compile_run, native, patching, sources, toolchain
from supervisor.setup.fetch import ChecksumMismatch, SetupError
from supervisor.setup.native import BuildOptions

OURS = """\
version: 0.6.0-dev (build 11434, commit b11434)
built with GNU 12.2.0 for Linux x86_64
patches: llama-supervisor-1-e323a2dd
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    return make_patches(tmp_path / "patches")


@pytest.fixture
def out() -> Transcript:
    return Transcript()


FACTS = {
    "source": "sdist:1",
    "patches": "2",
    "backend": "cpu",
    "options": ["-DA=1"],
    "compiler": "c++ 12",
    "cpu": "3",
}


class TestKey:
    def key(self, **changes: Any) -> str:
        facts = FACTS | changes
        return native.build_key(facts.pop("source"), facts.pop("patches"), **facts)

    @pytest.mark.parametrize("name", FACTS)
    def test_each_fact_changes_the_key(self, name: str) -> None:
        value = ["-DA=2"] if name == "options" else "another"
        assert self.key(**{name: value}) != self.key()

    def test_compiler_flags_change_the_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = self.key()
        monkeypatch.setenv("CXXFLAGS", "-O1")
        assert self.key() != before
        monkeypatch.delenv("CXXFLAGS")
        assert self.key() == before

    def test_a_tree_is_known_by_its_content(self, tree: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tree, tmp_path / "copy")
        (copy / ".git").mkdir()
        (copy / ".git/HEAD").write_text("not source")
        assert sources.TreeSource(copy).identity == sources.TreeSource(tree).identity
        (copy / "main.cpp").write_text(MAIN + "\n")
        assert sources.TreeSource(copy).identity != sources.TreeSource(tree).identity

    def test_a_folder_without_source_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SetupError, match="is not a llama"):
            _ = sources.TreeSource(tmp_path).identity


class TestVersion:
    def test_ours(self) -> None:
        expected = native.ServerVersion(11434, "b11434", "llama-supervisor-1-e323a2dd")
        assert native.parse_version(OURS) == expected

    @pytest.mark.parametrize(
        ("text", "build", "commit"),
        [
            ("ggml_cuda_init: found 1 device\nversion: 0.6.0 (build 9000, commit abc1234)\n", 9000, "abc1234"),
            (
                "version: 4242 (0abcdef)\nbuilt with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu\n",
                4242,
                "0abcdef",
            ),
        ],
    )
    def test_stock(self, text: str, build: int, commit: str) -> None:
        assert native.parse_version(text) == native.ServerVersion(build, commit, None)

    def test_something_else(self) -> None:
        with pytest.raises(SetupError, match="not a llama-server"):
            native.parse_version("GNU bash, version 5.2\n")

    def test_a_server_that_does_not_run(self, tmp_path: Path) -> None:
        with pytest.raises(SetupError, match="does not run"):
            native.server_version(tmp_path / "llama-server")
        script = tmp_path / "llama-server"
        script.write_text("#!/bin/sh\necho missing library >&2\nexit 127\n")
        script.chmod(0o755)
        with pytest.raises(SetupError, match=r"code 127 \(missing library\)"):
            native.server_version(script)


class TestBuild:
    """A project of one file, through all of `build`."""

    @pytest.fixture(autouse=True)
    def quiet_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "ensure_compiler", lambda console: toolchain.find_compiler())
        monkeypatch.setenv("CCACHE_DISABLE", "1")

    @pytest.fixture
    def options(self, tree: Path, patches: Path, tmp_path: Path) -> BuildOptions:
        return BuildOptions(backend="cpu", source=tree, jobs=1, cache=tmp_path / "cache", patches=patches)

    def test_from_source_to_binary_and_again(
        self, options: BuildOptions, tree: Path, patches: Path, out: Transcript
    ) -> None:
        assert native.build_needed(options)
        assert native.find_server(options.cache, patches) is None
        result = native.build(options, out.console)
        assert result.built
        version = native.server_version(result.server)
        assert version == native.ServerVersion(sources.BUILD_NUMBER, "local", patching.patch_series(patches))
        assert native.find_facts(result.server) == result.facts
        assert native.is_cpu_build(result.server)
        names = {path.name for path in result.server.parent.iterdir()}
        assert names == {"llama-server", "build.json", "LICENSE"}
        assert (tree / "main.cpp").read_text() == MAIN

        assert not native.build_needed(options)
        again = native.build(options, out.console)
        assert (again.server, again.built) == (result.server, False)
        assert again.seconds < 1
        assert native.find_server(options.cache, patches) == result.server

    def test_a_tool_from_the_patches_is_built_beside_the_server(
        self, options: BuildOptions, tree: Path, patches: Path, out: Transcript
    ) -> None:
        cmake = (tree / "CMakeLists.txt").read_text()
        (tree / "CMakeLists.txt").write_text(cmake + "add_subdirectory(tools/atlas-eval)\n")
        folder = patches / "files" / "tools" / "atlas-eval"
        folder.mkdir(parents=True)
        (folder / "CMakeLists.txt").write_text("add_executable(llama-atlas-eval eval.cpp)\n")
        (folder / "eval.cpp").write_text("int main() { return 0; }\n")
        result = native.build(options, out.console)
        tool = native.find_tool(native.EVAL, options.cache, patches)
        assert tool == result.server.with_name("llama-atlas-eval")
        assert result.facts.programs == ["llama-server", "llama-atlas-eval"]
        tool.unlink()
        assert native.build_needed(options)

    def test_without_that_patch_there_is_no_tool(self, options: BuildOptions, out: Transcript) -> None:
        assert native.build(options, out.console).facts.programs == ["llama-server"]
        assert native.find_tool(native.EVAL, options.cache, options.patches) is None

    def test_keep_leaves_source_objects_and_log(self, options: BuildOptions, out: Transcript) -> None:
        kept = BuildOptions(**{**vars(options), "keep": True})
        folder = native.build(kept, out.console).server.parent
        names = {path.name for path in folder.iterdir()}
        assert names == {"llama-server", "build.json", "LICENSE", "src", "build", "build.log"}

    def test_an_interrupted_build_goes_on(
        self, options: BuildOptions, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(compile_run, "run_ninja", interrupt)
            with pytest.raises(KeyboardInterrupt):
                native.build(options, out.console)
        assert native.build_needed(options)
        with monkeypatch.context() as patch:
            patch.setattr(sources.TreeSource, "put", interrupt)  # the source must not be fetched again
            assert native.build(options, out.console).built
        assert "going on with the interrupted build" in out.text

    def test_a_half_prepared_tree_is_made_anew(
        self, options: BuildOptions, patches: Path, tree: Path, out: Transcript
    ) -> None:
        good = (tree / "main.cpp").read_text()
        (patches / "0002-broken.patch").write_text(PATCH.replace("return 0;", "return 7;"))
        (patches / "series").write_text("0001-series.patch\n0002-broken.patch\n")
        with pytest.raises(SetupError, match=r"0002-broken\.patch"):
            native.build(options, out.console)
        folder = next(path for path in (tree.parent / "cache/native").iterdir() if path.is_dir())
        assert not (folder / "src").exists()
        assert (tree / "main.cpp").read_text() == good
        with pytest.raises(SetupError, match=r"0002-broken\.patch"):  # and not: src.part is in the way
            native.build(options, out.console)

    def test_a_compile_error_is_shown(self, options: BuildOptions, tree: Path, out: Transcript) -> None:
        (tree / "main.cpp").write_text(MAIN + "not C++;\n")
        with pytest.raises(compile_run.BuildFailed, match=r"main.cpp:8:.*error:"):
            native.build(options, out.console)
        assert native.build_needed(options)

    def test_new_patches_need_a_new_build_and_win(self, options: BuildOptions, patches: Path, out: Transcript) -> None:
        first = native.build(options, out.console)
        before = (patches / "0001-series.patch").read_text()
        (patches / "0001-series.patch").write_text(before.replace("patches: %s", "patches:  %s"))
        assert native.build_needed(options)
        # Until it is built the older one serves.
        assert native.find_server(options.cache, patches) == first.server
        second = native.build(options, out.console)
        assert native.find_server(options.cache, patches) == second.server
        # Back at the old patches, the old build is the right one although the newer is the current one.
        (patches / "0001-series.patch").write_text(before)
        assert native.find_server(options.cache, patches) == first.server

    def test_a_server_for_another_cpu_is_not_used(
        self, options: BuildOptions, patches: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        native.build(options, out.console)
        monkeypatch.setattr(toolchain, "cpu_identity", lambda: "another")
        assert native.find_server(options.cache, patches) is None
        assert native.build_needed(options)

    def test_the_next_source_is_tried(
        self, options: BuildOptions, tree: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nowhere = sources.GitSource(repository=str(tree.parent / "no-repository"))
        monkeypatch.setattr(sources, "sources", lambda *_: [nowhere, sources.TreeSource(tree)])
        assert native.build(options, out.console).facts.source.startswith("tree:")
        assert "trying the next source" in out.text

    def test_no_source_at_all(
        self, options: BuildOptions, tree: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nowhere = sources.GitSource(repository=str(tree.parent / "no-repository"))
        monkeypatch.setattr(sources, "sources", lambda *_: [nowhere])
        with pytest.raises(SetupError, match="llama-supervisor build --source DIR"):
            native.build(options, out.console)

    def test_a_wrong_checksum_ends_it(
        self, options: BuildOptions, tree: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Changed(sources.TreeSource):
            def put(self, tree: Path, console: Console) -> None:
                raise ChecksumMismatch(Path("a.tar.gz"), "1" * 64, "2" * 64)

        monkeypatch.setattr(sources, "sources", lambda *_: [Changed(tree), sources.TreeSource(tree)])
        with pytest.raises(ChecksumMismatch, match=r"expected sha256 1{64}, found 2{64}"):
            native.build(options, out.console)

    def test_a_server_without_the_patches_is_refused(
        self, options: BuildOptions, patches: Path, out: Transcript
    ) -> None:
        (patches / "0001-series.patch").write_text(PATCH.replace("patches:", "something:"))
        with pytest.raises(SetupError, match="reports the patches None"):
            native.build(options, out.console)
        assert native.find_server(options.cache, patches) is None

    def test_without_a_compiler_the_built_server_serves(
        self, options: BuildOptions, patches: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built = native.build(options, out.console)
        monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
        anywhere = BuildOptions(cache=options.cache, patches=patches)
        assert native.build(anywhere, out.console).server == built.server

    def test_old_half_finished_builds_go(self, options: BuildOptions, out: Transcript) -> None:
        root = native.native_folder(options.cache)
        for name, age in (("old", 8 * 86400), ("new", 3600)):
            (root / name / "src").mkdir(parents=True)
            stamp = time.time() - age
            os.utime(root / name, (stamp, stamp))
        native.build(options, out.console)
        assert not (root / "old").exists()
        assert (root / "new").exists()
