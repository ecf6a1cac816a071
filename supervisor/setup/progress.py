"""How far is a long step? A bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from rich.filesize import decimal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


PLAIN_STEP = 5
"""Per cent between two plain lines, at least."""

PLAIN_SECONDS = 2.0
"""Seconds between two plain lines, at least: a short step prints its end only."""


class Meter:
    """Shows the progress of one step, as a context manager; `update` may be called as often as one likes."""

    def __init__(
        self,
        console: Console,
        title: str,
        unit: Literal["steps", "bytes"] = "steps",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._title = title
        self._unit = unit
        self._clock = clock
        self._started = self._last = clock()
        self._shown = 0
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - slow

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[count]}", markup=False),
                TimeElapsedColumn(),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, count="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps or bytes are behind us."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, count=self._count(done, total))
            return
        percent = 100 * done // total if total else 100
        now = self._clock()
        is_due = percent >= self._shown + PLAIN_STEP and now >= self._last + PLAIN_SECONDS
        if is_due or (percent == 100 and self._shown < 100):
            self._shown, self._last = percent - percent % PLAIN_STEP, now
            minutes, seconds = divmod(int(now - self._started), 60)
            count = f"{self._count(done, total)}, {minutes}:{seconds:02d}"
            say(self._console, f"{self._title}: {percent:3d} % ({count})")

    def _count(self, done: int, total: int) -> str:
        if self._unit == "bytes":
            return f"{decimal(done)} of {decimal(total)}"
        return f"{done}/{total}"


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours guessed from its content, no wrapping of paths."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
