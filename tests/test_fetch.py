"""Sources and downloads: the right bytes or an error, and no foreign code run on the way."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny_native import CMAKE, Transcript, make_tree

from supervisor.setup import fetch, sources
from supervisor.setup.fetch import ChecksumMismatch, DownloadFailed, Package, SetupError
from supervisor.setup.files import sha256_file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def out() -> Transcript:
    return Transcript()


def archive_of(path: Path, members: list[tarfile.TarInfo], content: bytes = b"content") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if member.isfile():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info


class TestUnpack:
    def test_only_the_folder_comes_out(self, tmp_path: Path) -> None:
        folder = member("p-1/llama.cpp", tarfile.DIRTYPE)
        members = [folder, member("p-1/llama.cpp/src/a.cpp"), member("p-1/setup.py"), member("p-1/llama.cpp.txt")]
        sources.unpack(archive_of(tmp_path / "a.tar.gz", members), "p-1/llama.cpp", tmp_path / "out")
        assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out/src/a.cpp"]

    @pytest.mark.parametrize(
        "trick",
        [
            member("p/t/../../../evil"),
            member("p/t/link", tarfile.SYMTYPE, "/etc/passwd"),
            member("p/t/link", tarfile.LNKTYPE, "p/other"),
            member("p/t/pipe", tarfile.FIFOTYPE),
        ],
        ids=["parent", "symlink", "hard link", "pipe"],
    )
    def test_tricks_are_refused(self, tmp_path: Path, trick: tarfile.TarInfo) -> None:
        archive = archive_of(tmp_path / "a.tar.gz", [member("p/t/good"), trick])
        with pytest.raises(SetupError, match="not a plain file"):
            sources.unpack(archive, "p/t", tmp_path / "out/tree")
        assert not (tmp_path / "out").exists()

    def test_a_cut_archive(self, tmp_path: Path) -> None:
        archive = archive_of(tmp_path / "a.tar.gz", [member("p/t/a")], os.urandom(100_000))
        archive.write_bytes(archive.read_bytes()[:50_000])
        with pytest.raises(SetupError, match="cannot be unpacked"):
            sources.unpack(archive, "p/t", tmp_path / "out")

    def test_an_archive_without_the_folder(self, tmp_path: Path) -> None:
        archive = archive_of(tmp_path / "a.tar.gz", [member("p/other")])
        with pytest.raises(SetupError, match="has no folder p/t"):
            sources.unpack(archive, "p/t", tmp_path / "out")


BACKEND = """\
from pathlib import Path
Path({marker!r}).touch()
raise SystemExit("the package's code ran")
"""


class TestDownload:
    """The user's pip, offline: it finds its files in a folder."""

    @pytest.fixture
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "index"
        folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        return folder

    def sdist(self, index: Path, marker: Path) -> Package:
        """Make a source distribution whose build backend must not run."""
        files = {
            "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-bin\nVersion: 1.0.0\n",
            "pyproject.toml": '[build-system]\nrequires = ["setuptools>=77", "cmake"]\n'
            'build-backend = "setuptools.build_meta"\n',
            "setup.py": BACKEND.format(marker=str(marker)),
            "llama.cpp/CMakeLists.txt": CMAKE,
        }
        path = index / "tiny_bin-1.0.0.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in files.items():
                info = tarfile.TarInfo(f"tiny_bin-1.0.0/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        return Package("tiny-bin", "1.0.0", path.name, path.stat().st_size, sha256_file(path))

    def test_a_source_distribution_comes_without_running_it(self, index: Path, tmp_path: Path, out: Transcript) -> None:
        package = self.sdist(index, tmp_path / "ran")
        source = sources.SdistSource(tmp_path / "downloads", package, "tiny_bin-1.0.0/llama.cpp")
        source.put(tmp_path / "tree", out.console)
        assert (tmp_path / "tree/CMakeLists.txt").read_text() == CMAKE
        assert not (tmp_path / "ran").exists()
        # The archive stays, so that the next build needs no network.
        (index / package.file).unlink()
        source.put(tmp_path / "again", out.console)
        left = {path.name for path in (tmp_path / "downloads").iterdir()}
        assert left == {package.file, f".{package.file}.lock"}

    def test_pip_refuses_another_file(self, index: Path, tmp_path: Path, out: Transcript) -> None:
        package = self.sdist(index, tmp_path / "ran")
        wrong = Package(package.name, package.version, package.file, package.size, "0" * 64)
        with pytest.raises(ChecksumMismatch, match=f"expected sha256 {'0' * 64}, found {package.sha256}"):
            fetch.pip_download(wrong, tmp_path / "downloads", out.console)
        assert not (tmp_path / "downloads" / package.file).exists()

    def test_a_package_that_is_not_there(self, index: Path, tmp_path: Path, out: Transcript) -> None:
        package = Package("tiny-bin", "2.0.0", "tiny_bin-2.0.0.tar.gz", 1000, "0" * 64)
        with pytest.raises(DownloadFailed, match=r"could not get tiny-bin==2\.0\.0: ERROR"):
            fetch.pip_download(package, tmp_path / "downloads", out.console)

    def test_our_own_check_stands_when_pip_does_not_check(
        self, tmp_path: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def careless(arguments: list[str], package: Package, temporary: Path, advance: object) -> None:
            (temporary / "got").mkdir()
            (temporary / "got" / package.file).write_bytes(b"something else")

        monkeypatch.setattr(fetch, "_run_pip", careless)
        package = Package("tiny-bin", "1.0.0", "tiny_bin-1.0.0.tar.gz", 1000, "0" * 64)
        with pytest.raises(ChecksumMismatch, match=r"0{64}"):
            fetch.pip_download(package, tmp_path / "downloads", out.console)

    def test_a_damaged_copy_is_fetched_again(self, index: Path, tmp_path: Path, out: Transcript) -> None:
        package = self.sdist(index, tmp_path / "ran")
        (tmp_path / "downloads").mkdir()
        (tmp_path / "downloads" / package.file).write_bytes(b"cut")
        path = fetch.pip_download(package, tmp_path / "downloads", out.console)
        assert sha256_file(path) == package.sha256
        assert "damaged" in out.text

    def test_a_full_disk_is_found_before(
        self, tmp_path: Path, out: Transcript, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        package = Package("tiny-bin", "1.0.0", "tiny_bin-1.0.0.tar.gz", 1000, "0" * 64)
        with pytest.raises(SetupError, match="10 bytes free: make room"):
            fetch.pip_download(package, tmp_path / "downloads", out.console)

    def test_python_without_pip(self) -> None:
        error = fetch._pip_error("/usr/bin/python3: No module named pip\n", None)
        assert f"{sys.executable} -m ensurepip" in error.message


def test_git_clone_leaves_the_tree_only(tree: Path, tmp_path: Path, out: Transcript) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "start")
    git("tag", "b1")
    sources.GitSource(repository=tree.as_uri(), commit="b1").put(tmp_path / "clone", out.console)
    names = {path.name for path in (tmp_path / "clone").iterdir()}
    assert names == {"CMakeLists.txt", "main.cpp", "LICENSE"}
