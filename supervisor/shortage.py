"""Did a child not start for want of memory, and with which smaller context may it try once more?"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence

from supervisor.estimate import Flags
from supervisor.models.gguf import Header

LEAST_CONTEXT = 512
"""Context in tokens below which no second try is made."""

LINES = 100
"""Last lines of a log that are looked at: llama-server may write a backtrace after the words that matter."""

_WORDS = re.compile(
    r"failed to allocate|insufficient memory|unable to allocate|cannot allocate memory|out of memory|bad_alloc"
    r"|cudaMalloc failed|failed to (?:create|initialize) (?:the )?context",
    re.IGNORECASE,
)


def ran_out(code: int | None, lines: Iterable[str]) -> bool:
    """Tell whether a child that exited with `code` (negative: killed by that signal) while it loaded lacked memory."""
    if code is None:
        return False  # it runs, so it did not
    return code == -signal.SIGKILL or any(_WORDS.search(line) for line in lines)


def smaller_context(command: Sequence[str], header: Header | None) -> int | None:
    """Return half of the context that a child had, None when that is too little."""
    whole = Flags(command).number("-c", "--ctx-size") or (header.context_length if header else None) or 0
    half = whole // 2
    return half if half >= LEAST_CONTEXT else None
