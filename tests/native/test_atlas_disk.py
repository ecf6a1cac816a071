"""A session that cannot be written: clear errors, the old file whole, serving goes on.

`scripts/bench/atlas_disk.py` plays these scenes and one more on a full disk of its own, for which it has to be root.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_disk
from atlas_server import workplace


@pytest.mark.parametrize("scene", sorted(atlas_disk.SCENES.keys() - {"full"}))
def test_scene(native_server: Path, scene: str) -> None:
    with workplace() as folder:
        wrong = atlas_disk.SCENES[scene](native_server, folder)
    assert not wrong, "\n".join(wrong)
