"""Damaged and hostile memory files: always a clear error from the real server and from Python, and nothing else.

`scripts/bench/atlas_damage.py` does the same with thousands of files; here are some of each kind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_damage
from atlas_server import tiny_model, workplace

WORDS = ["-c", "256", "-np", "1", "-t", "1", "--atlas-memory-backup-count", "0"]
SEED = 7


@pytest.fixture(scope="module")
def target(native_server: Path) -> Iterator[atlas_damage.Target]:
    with workplace() as folder:
        made = atlas_damage.Target(native_server, tiny_model(folder), folder, WORDS, 400, True)
        yield made
        made.running.kill()


@pytest.mark.parametrize("kind", atlas_damage.COUNTS)
def test_a_bad_file_is_an_error_and_nothing_else(target: atlas_damage.Target, kind: str) -> None:
    count = max(1, atlas_damage.COUNTS[kind] // 20)
    tried = atlas_damage.attempt_all(target, atlas_damage.mutants_of(target.good, {kind: count}, SEED))
    assert len(tried) >= count
    failed = [f"{one.name}: {failure}" for one in tried for failure in one.failures]
    assert not failed, "\n".join(failed)


def test_the_mutants_that_must_fail_do_and_those_that_need_not_get_deep(target: atlas_damage.Target) -> None:
    tried = atlas_damage.attempt_all(target, atlas_damage.mutants_of(target.good, {"frame content": 60}, SEED))
    codes = {one.status for one in tried}
    assert codes == {200, 400, 409}
    assert sum(one.verified for one in tried) > 50  # the checksums are right: only the content is wrong
