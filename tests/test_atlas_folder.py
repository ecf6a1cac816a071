"""Where a model's memory files are."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from supervisor.atlas_folder import LONGEST_NAME, default_root, folder_name, folder_of, make

IDS = st.binary(min_size=1, max_size=80).map(os.fsdecode) | st.text("aA.%/~-_ ü", min_size=1, max_size=300)
"""Names of files, as the system gives them: bytes that are no UTF-8 are lone surrogates."""


def test_usual_ids_are_their_folder() -> None:
    assert folder_name("SmolLM2-135M-Instruct.Q4_K_M") == "SmolLM2-135M-Instruct.Q4_K_M"
    assert folder_name("work/tiny~2") == "work%2Ftiny~2"
    assert folder_name("..") == "%2E."
    assert folder_of(None, "m") == default_root() / "m"
    assert folder_of(Path("/x"), "m") == Path("/x/m")


@given(IDS, IDS)
def test_every_id_has_a_safe_folder_of_its_own(one: str, other: str) -> None:
    for model in (one, other):
        name = folder_name(model)
        assert re.fullmatch(r"[A-Za-z0-9%_~-][A-Za-z0-9%._~-]*", name) and len(name) <= LONGEST_NAME
        if "%-" not in name:
            assert unquote(name, errors="surrogateescape") == model
    assert (folder_name(one) == folder_name(other)) == (one == other)


def test_the_folder_is_private(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "deep" / "memory", "a/b")
    make(folder)
    make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
