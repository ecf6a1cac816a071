"""How does the extension get into KAREN, and what does KAREN see of it there?"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import supervisor
from supervisor.setup.fetch import SetupError

NAME = "llama_supervisor"
"""Name of the extension's folder, and its id."""

FILES = ("extension_manifest.json", "plugin_manifest.json", "handler.py", "prompt.txt")
OWN = ("config.json", "prompt.txt")
"""What belongs to the user once it is installed."""

EXTENSIONS = Path("src") / "extensions"
LOGGER = "extension.llama-supervisor"

Json = dict[str, Any]


@dataclass(frozen=True)
class Installed:
    """An installed extension: `kept` names the user's own files that were left as they are."""

    folder: Path
    linked: bool
    kept: list[str]


@dataclass
class Trial:
    """What KAREN would see: the results of both hooks, the answer if there was one, and what the extension logs."""

    folder: Path
    hooks: dict[str, Json] = field(default_factory=dict)
    answer: str | None = None
    warnings: list[str] = field(default_factory=list)


def shipped_folder() -> Path:
    """Return the folder of the extension: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(supervisor.__file__).parent
    for folder in (package / "karen_ext", package.parent / "karen_ext"):
        if (folder / "handler.py").is_file():
            return folder
    raise SetupError("KAREN's extension is missing from this installation: install llama-supervisor again")


def folder_in(path: Path) -> Path:
    """Return the extension's folder, there or not, for KAREN's, for its folder of extensions, or for itself."""
    if (path / "handler.py").is_file():
        return path
    if (path / EXTENSIONS).is_dir():
        return path / EXTENSIONS / NAME
    if path.name == "extensions" and path.is_dir():
        return path / NAME
    if (path / "src" / "ai_karen_engine").is_dir():
        return path / EXTENSIONS / NAME
    raise SetupError(f"{path} is neither KAREN's folder (it has no {EXTENSIONS}) nor its folder of extensions")


def install(path: Path, options: Json, *, link: bool = False) -> Installed:
    """Copy the extension into KAREN, or link it; a present one is replaced, but for what is the user's own.

    `options` go into its config.json, over what is there. Raises `SetupError` and `OSError`.
    """
    source, target = shipped_folder(), folder_in(path)
    if target.resolve() == source.resolve() and not target.is_symlink():
        raise SetupError(f"{path} is the extension itself; name KAREN's folder")
    if target.exists() and not _is_ours(target):
        raise SetupError(f"{target} is something else: remove or rename it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.parent / f"_{NAME}.{end}" for end in ("new", "old"))  # which KAREN does not look at
    for leftover in (fresh, old):
        _remove(leftover)
    kept: list[str] = []
    if link:
        fresh.symlink_to(source.resolve(), target_is_directory=True)
    else:
        fresh.mkdir()
        for name in FILES:
            shutil.copyfile(source / name, fresh / name)
        if not target.is_symlink():
            kept = _keep(target, fresh)
        _configure(fresh / "config.json", options)
    if target.is_symlink() or target.exists():
        target.rename(old)
    fresh.rename(target)
    _remove(old)
    return Installed(target, link, kept)


def _is_ours(target: Path) -> bool:
    try:
        found = json.loads((target / FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("id") == NAME


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _keep(old: Path, new: Path) -> list[str]:
    kept = []
    for name in OWN:
        shipped = (new / name).read_bytes() if (new / name).exists() else None
        if (old / name).is_file() and (old / name).read_bytes() != shipped:
            shutil.copyfile(old / name, new / name)
            kept.append(name)
    return kept


def _configure(path: Path, options: Json) -> None:
    stored: Any = {}
    with suppress(FileNotFoundError):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SetupError(f"the installed {path.name} is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise SetupError(f"the installed {path.name} must hold a JSON object")
    path.write_text(json.dumps(stored | options, indent=2) + "\n", encoding="utf-8")


async def try_out(folder: Path, options: Json, prompt: str) -> Trial:
    """Load the extension as KAREN does and run both hooks, with a remote model that fails. Raises `SetupError`."""
    trial = Trial(folder)
    with _overheard(trial.warnings):
        extension = _load(folder)(_manifest(folder), options)
        try:
            await extension.initialize()
            data: Json = {"prompt": prompt}
            for hook in ("pre_llm_prompt", "post_llm_result"):
                context = SimpleNamespace(data=data, user_context={})
                trial.hooks[hook] = await extension.execute_hook(SimpleNamespace(value=hook), context)
                data.setdefault("result", {"error": "this is a trial: the remote model failed", "content": None})
        finally:
            await extension.shutdown()
    if trial.hooks["post_llm_result"].get("local_inference_used"):
        trial.answer = str(data["result"]["content"])
    return trial


def _manifest(folder: Path) -> Any:
    """Return the manifest as an object; both have to be there. Raises `SetupError`."""
    try:
        found = [json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES[:2]]
    except (OSError, ValueError) as error:
        raise SetupError(f"the extension in {folder} is not whole: {error}") from None
    return SimpleNamespace(**found[0])


def _load(folder: Path) -> Any:
    """Execute handler.py from its file, as KAREN does, and return the class. Raises `SetupError`."""
    spec = importlib.util.spec_from_file_location(f"{NAME}_handler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.LlamaSupervisorExtension
    except Exception as error:
        raise SetupError(f"{folder / 'handler.py'} does not load: {type(error).__name__}: {error}") from error


@contextmanager
def _overheard(lines: list[str]) -> Iterator[None]:
    """Collect what the extension logs instead of showing it."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(LOGGER), Collect(logging.WARNING)
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def use_key(variable: str) -> None:
    """Let the extension in this process use the key that the command line has, unless it has one of its own."""
    if (key := os.environ.get(variable)) and not os.environ.get("LLAMACPP_KAREN_API_KEY"):
        os.environ["LLAMACPP_KAREN_API_KEY"] = key
