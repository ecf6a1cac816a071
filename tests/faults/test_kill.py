"""The supervisor is stopped or killed while it loads, streams or idles: nothing is left, and the next start works.

`scripts/bench/kill_points.py` does the same at hundreds of random moments; here are a few chosen ones.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import kill_points

PHASES = {"load": 0.3, "stream": 0.1, "idle": 0.0}
"""Seconds from the beginning of the phase to the signal."""


@pytest.fixture(scope="module")
def workspace(native_server, smollm2):
    """One runtime folder and one port for all cases: each start also cleans up after the case before."""
    made = kill_points.make_workspace(smollm2, smollm2, native_server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kill_points, "EXIT_SECONDS", 60.0)  # the machine may be busy
        patch.setattr(kill_points, "ORPHAN_SECONDS", 20.0)
        yield made
    made.remove()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_supervisor_leaves_nothing_that_hinders_the_next(workspace, phase, number):
    played = kill_points.play(workspace, phase, number, PHASES[phase])
    assert not played.failures, "\n".join(played.failures)


def test_after_all_of_them_a_new_start_serves(workspace):
    assert kill_points.check_service(workspace) == []
