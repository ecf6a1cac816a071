"""llama-server is killed while it saves sessions: none is lost or torn, and the next server has them all.

`scripts/bench/atlas_kills.py` does the same at hundreds of random moments.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_kills
from atlas_server import workplace


@pytest.mark.parametrize("first", [0, 5000])
def test_a_session_is_as_it_was_saved_last_or_as_it_was_being_saved(native_server: Path, first: int) -> None:
    with workplace() as folder:
        rounds = atlas_kills.campaign(native_server, None, folder, count=22, seed=1, first=first)
    failures = [f"{one.operation}: {failure}" for one in rounds for failure in one.failures]
    assert not failures, "\n".join(failures)
    assert {one.operation for one in rounds} == set(atlas_kills.WEIGHTS)
    assert sum(one.old + one.new for one in rounds) > 0
