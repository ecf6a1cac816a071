"""Facts of a text are found in its session after a restart, which the questions do not change.

`scripts/bench/atlas_facts.py` measures it with long texts; here are a few facts of a short one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import atlas_facts
from atlas_recall import check_candidates, paragraphs
from atlas_server import MemoryServer, workplace

TEXT = Path(__file__).parents[1] / "data" / "text.txt"
WORDS = ["-c", "256", "-np", "1", "-t", "1"]
KINDS = ("code", "code", "city", "city", "city", "item", "item", "item")


def test_facts_outlive_a_restart(native_server: Path, smollm2: Path) -> None:
    with workplace() as folder:
        with MemoryServer(native_server, smollm2, folder, *WORDS) as running:
            filler = paragraphs(running, f"{TEXT}:0", 1500)
            text = atlas_facts.text_with_facts(running, "text", 1, filler, 640, 256, KINDS)
            check_candidates(running, text.questions)
        assert sorted(question.kind for question in text.questions) == sorted(KINDS)
        assert min(question.distance for question in text.questions) > 192
        likeliest = {}
        for mode, cells in (("atlas", []), ("window", ["--atlas-cells", "0"])):
            # it raises when a question changes the session's file
            words = [*WORDS, *cells]
            (answers,) = atlas_facts.with_sessions(native_server, smollm2, folder, words, [text], mode)
            assert len(answers) == len(KINDS)
            likeliest[mode] = sum(answer["likeliest"] for answer in answers)
        assert likeliest["atlas"] > likeliest["window"]
