"""How much memory may all children take together? What `server.memory_budget` says, of what the machine has."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

AUTO_SHARE = 0.8
"""Share of the machine's memory that children may take when nobody says how much."""

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(%|[kmgt]?i?b)?", re.IGNORECASE)


def parse(text: int | str) -> int | float:
    """Return a budget as bytes, or as a share of the machine's memory (a float, at most 1). Raises `ValueError`."""
    if text == "auto":
        return AUTO_SHARE
    match = _SIZE.fullmatch(str(text).strip())
    number = float(match[1]) if match else 0.0
    unit = (match[2] or "").lower() if match else ""
    if unit == "%" and 0 < number <= 100:
        return number / 100
    size = int(number * UNITS[unit]) if unit in UNITS else 0
    if size < 1:
        raise ValueError('is none of "auto", bytes, a size like "12 GiB" and a share like "75%"')
    return size


def budget_of(text: int | str, memory: int) -> int:
    """Return a budget in bytes on a machine with `memory` bytes. Raises `ValueError`."""
    found = parse(text)
    return int(memory * found) if isinstance(found, float) else found


def machine_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or less where its control groups say so."""
    total = int(psutil.virtual_memory().total)
    for folder in _groups(root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():
                total = min(total, int(text))
    return total


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of this process's control groups and those around them."""
    found = [root, root / "memory"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, name = (*line.split(":", 2), "", "", "")[:3]
        if controllers in ("", "memory"):
            base = root / controllers
            parts = [part for part in Path(name).parts if part not in ("/", "..")]
            found += [base.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return found
