"""The memory budget, and what was measured: kept, put in the place of the estimate, forgotten with the settings."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from test_model_files import HEADER

from supervisor import shortage
from supervisor.budget import budget_of, machine_memory
from supervisor.config import Config
from supervisor.models.model_files import Model
from supervisor.residency import excess_error, value
from supervisor.sizing import MIB, Size, Sizing, cache_bound, key_of, peak_memory

GIB = 1 << 30
MODEL = Model("m", Path("/m.gguf"), (), None, 100 * MIB, 0.0, HEADER, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", 8 * GIB * 10 // 10 * 0.8),
        (5, 5),
        ("5", 5),
        ("12 GiB", 12 * GIB),
        ("1.5gb", 1_500_000_000),
        ("75%", 6 * GIB),
    ],
)
def test_a_budget_is_bytes_or_a_share(text, size):
    assert budget_of(text, 8 * GIB) == int(size)


@pytest.mark.parametrize("text", ["", "many", "0", "-1", 0, -5, "0%", "101%", "5 GiBs", "1e9", "nan"])
def test_a_bad_budget_is_refused_and_told_what_is_allowed(text):
    with pytest.raises(ValidationError, match="75%"):
        Config.model_validate({"server": {"memory_budget": text}})


def test_a_control_group_may_leave_less_than_the_machine_has(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    whole = machine_memory(tmp_path, own)
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    assert machine_memory(tmp_path, own) == 1_000_000 < whole


def sizing(store: Path | None) -> Sizing:
    return Sizing(store, memory=lambda: 8 * GIB)


def test_what_a_child_took_counts_from_then_on_and_beyond_the_supervisor(tmp_path: Path):
    store = tmp_path / "memory.json"
    child = SimpleNamespace(model="m", pid=os.getpid(), exit_code=None, stopping=False, gone=asyncio.Event())
    first = sizing(store)
    size = first.sizes["m"] = first.size(MODEL, ["-c", "2048"], {}, cpu_only=True)
    assert size.needs == {"ram": size.estimate.total}
    told: list[dict[str, int]] = []

    def changed(size: Size) -> None:
        told.append(size.needs)
        child.gone.set()
        child.stopping = True

    asyncio.run(first.follow(child, changed))
    mine = peak_memory(os.getpid())
    assert told and mine is not None
    assert size.needs["ram"] == pytest.approx(mine + size.estimate.later, rel=0.1)
    again = sizing(store).size(MODEL, ["-c", "2048"], {}, cpu_only=True)
    assert again.needs == size.needs and again.peak == size.peak
    other = sizing(store).size(MODEL, ["-c", "4096"], {}, cpu_only=True)
    assert not other.loaded


def test_what_a_running_child_grew_by_does_not_count_for_the_next():
    size = Size("k", sizing(None).size(MODEL, [], {}, cpu_only=True).estimate, {"ram": 10}, {"ram": 5}, {"ram": GIB})
    assert size.needs["ram"] < GIB
    size.running = {"ram": GIB}
    assert size.needs == {"ram": GIB}


@pytest.mark.parametrize("text", ["{", "[]", '{"k": 1}', '{"k": {"loaded": {"ram": "x"}, "peak": {}}}'])
def test_a_state_file_that_is_not_ours_is_not_used(tmp_path: Path, text: str):
    store = tmp_path / "memory.json"
    store.write_text(text)
    found = sizing(store).size(MODEL, [], {}, cpu_only=True)
    assert not found.loaded


def test_the_socket_makes_no_other_settings():
    assert key_of(MODEL, ["x", "--host", "1.sock"], {}) == key_of(MODEL, ["x", "--host", "2.sock"], {})
    assert key_of(MODEL, ["x", "-c", "1"], {}) != key_of(MODEL, ["x", "-c", "2"], {})


def test_a_prompt_cache_stays_within_the_budget_unless_somebody_chose_its_limit():
    size = Size("k", sizing(None).size(MODEL, [], {}, cpu_only=True).estimate, {"ram": GIB})
    assert cache_bound(size, {"ram": 3 * GIB}, [], {}) == ["--cache-ram", "2048"]
    assert cache_bound(size, {"ram": 9 * GIB}, [], {}) == []
    assert cache_bound(size, {"ram": 3 * GIB}, ["-cram", "1"], {}) == []
    assert cache_bound(size, {"ram": 3 * GIB}, [], {"LLAMA_ARG_CACHE_RAM": "1"}) == []


def test_value_grows_with_the_cost_and_fades_with_time():
    assert value(10, 60, 0) > value(1, 10, 0) > value(1, 20, 0)
    assert value(10, 60, 61) < value(1, 10, 0)
    assert value(10, 60, 60) == 0


def test_the_refusal_says_by_how_much_and_what_to_do():
    error = excess_error("m", {"ram": GIB}, {"ram": 3 * GIB}, {"ram": 2 * GIB})
    assert error.status == 507 and error.retry_after is None
    assert "needs 3.00 GiB of memory, 1.00 GiB more than the budget of 2.00 GiB" in error.message
    assert json.loads(json.dumps(error.body()))["error"]["code"] == "model_too_large"


def test_want_of_memory_is_known_by_the_signal_or_the_words():
    assert shortage.ran_out(-9, [])
    assert shortage.ran_out(1, ["x", "E ggml_aligned_malloc: insufficient memory (attempted to allocate 5 MB)"])
    assert not shortage.ran_out(1, ["unknown architecture"])
    assert not shortage.ran_out(None, ["failed to allocate"])


def test_the_second_try_has_half_of_the_context():
    assert shortage.smaller_context(["--ctx-size", "8192"], HEADER) == 4096
    assert shortage.smaller_context([], HEADER) == 1024
    assert shortage.smaller_context(["--ctx-size", "1000"], HEADER) is None
