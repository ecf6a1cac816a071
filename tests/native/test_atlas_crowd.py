"""Clients with a session each, more than there are slots, at once: nothing is lost, and nothing gets to another.

`scripts/bench/atlas_clients.py` does the same with fifty clients for minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_clients
from atlas_server import tiny_model


def test_sessions_are_what_their_clients_sent_and_got(native_server: Path, tmp_path: Path) -> None:
    workspace = atlas_clients.make_workspace(tiny_model(tmp_path), native_server, 3, 256, threads=1)
    try:
        result = atlas_clients.campaign(workspace, 12, 2, 240, seed=3, replay=0, actions=10)
    finally:
        workspace.remove()
    assert not result["failures"], "\n".join(result["failures"])
    assert result["least_turns"] >= 3
    assert result["requests"] >= 14 * 8  # some find nothing to save or load yet
    assert {code.split()[0] for code in result["codes"]} >= set(atlas_clients.ACTIONS) - {"load"} | {"plain"}
