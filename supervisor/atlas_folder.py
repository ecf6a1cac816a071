"""Where are the memory files of a model? Each has a folder of its own, so that its session names are its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

import platformdirs

LONGEST_NAME = 160
"""Characters of a folder's name; file systems take 255 bytes."""


def default_root() -> Path:
    """Return the folder of all memory files when `atlas.memory_directory` names none."""
    return Path(platformdirs.user_state_dir("llama-supervisor")) / "atlas"


def folder_name(model: str) -> str:
    """Return the name of a model's folder: its id, with all but letters, digits, `-_~` and inner dots as %XX."""
    name = quote(model, safe="", errors="surrogateescape")
    name = name.replace(".", "%2E", 1) if name.startswith(".") else name
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(model.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{name[: LONGEST_NAME - 18]}%-{digest}"  # no other name has a % before a -


def folder_of(root: Path | None, model: str) -> Path:
    """Return the folder of a model's memory files; `root` is `atlas.memory_directory`."""
    return (root or default_root()) / folder_name(model)


def make(folder: Path) -> None:
    """Make a model's folder, private as its files hold what was said. Raises OSError."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
