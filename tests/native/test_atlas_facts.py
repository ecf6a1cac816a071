"""Facts of a text are found in its session after a restart, which the questions do not change.

`scripts/bench/atlas_facts.py` measures it with long texts; here are a few facts of a short one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_facts
from atlas_recall import check_candidates, paragraphs
from atlas_server import MemoryServer, workplace

TEXT = Path(__file__).parents[1] / "data" / "text.txt"
WORDS = ["-c", "512", "-np", "1", "-t", "1"]


def test_facts_outlive_a_restart(native_server: Path, smollm2: Path) -> None:
    with workplace() as folder:
        with MemoryServer(native_server, smollm2, folder, *WORDS) as running:
            filler = paragraphs(running, f"{TEXT}:0", 1500)
            text = atlas_facts.text_with_facts("text", running, 1, filler, 1500, 512)
            check_candidates(running, text.questions)
        assert len(text.questions) == 20
        assert min(question.distance for question in text.questions) > 448
        few = [replace(text, questions=text.questions[::3])]
        right = {}
        for mode, cells in (("atlas", []), ("window", ["--atlas-cells", "0"])):
            # it raises when a question changes the session's file
            (answers,) = atlas_facts.with_sessions(native_server, smollm2, folder, [*WORDS, *cells], few, mode)
            assert len(answers) == 7
            right[mode] = sum(answer["likeliest"] for answer in answers)
        assert right["atlas"] > right["window"]
