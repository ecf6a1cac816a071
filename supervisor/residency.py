"""What fits into the memory, what is a loaded model worth, and who goes? Plain functions, for the scheduler.

Memory is counted in bytes by pool: `ram` is the machine's, `gpu0` and so on that of each GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from supervisor.errors import ModelTooLarge

Memory = Mapping[str, int]
"""Bytes by pool."""

RAM = "ram"

YOUNG = 1e-3
"""Seconds for which a model is idle at least, as far as its value goes."""


class Needy(Protocol):
    """Whatever takes memory."""

    @property
    def needs(self) -> Memory:
        """Bytes by pool."""


T = TypeVar("T")


def excess(entries: Iterable[Needy], budget: Memory) -> Memory:
    """Return by how many bytes the entries are over the budget, for the pools where they are; other pools are free."""
    needs = [entry.needs for entry in entries]
    over = {pool: sum(one.get(pool, 0) for one in needs) - most for pool, most in budget.items()}
    return {pool: number for pool, number in over.items() if number > 0}


def fits(entries: Iterable[Needy], budget: Memory) -> bool:
    """Tell whether the entries fit into the budget together."""
    return not budget or not excess(entries, budget)


def fewest(going: list[T], enough: Callable[[list[T]], bool]) -> list[T]:
    """Return `going`, the least valuable first, without those whose going is not needed."""
    left = list(going)
    for one in reversed(going):  # the most valuable is kept if that is possible
        rest = [other for other in left if other is not one]
        if enough(rest):
            left = rest
    return left


def value(cost: float, idle: float, idle_unload: float) -> float:
    """Return what it is worth to keep a model that takes `cost` seconds to load and was used `idle` seconds ago.

    One that was used so long ago is wanted again about every so many seconds, so this is the share of the time that is
    saved. As one with a limit nears it (`idle_unload` seconds; 0: none), its value goes to nothing: it will go anyway.
    """
    worth = cost / max(idle, YOUNG)
    return worth * max(0.0, 1 - idle / idle_unload) if idle_unload > 0 else worth


def excess_error(model: str, over: Memory, needs: Memory, budget: Memory) -> ModelTooLarge:
    """Return the error for a model that is `over` the budget all alone."""
    pool = max(over, key=lambda name: over[name])
    where = "memory" if pool == RAM else f"memory of {pool}"
    raise_it = "raise server.memory_budget" if pool == RAM else "keep fewer layers there (performance.gpu_layers)"
    return ModelTooLarge(
        f"model {model!r} needs {shown(needs[pool])} of {where}, {shown(over[pool])} more than the budget of "
        f"{shown(budget[pool])}: lower its context_size or {raise_it}",
        param="model",
    )


def shown(size: int) -> str:
    """Return a number of bytes for people."""
    mib = size / (1 << 20)
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"
