"""A child that gets too little memory from the system: once more with half of the context, unless somebody chose it."""

from __future__ import annotations

from pathlib import Path

import pytest

ARGS = {"args": ["--fit", "off", "--no-warmup"]}


@pytest.fixture
def limited(short_tmp: Path, native_server: Path) -> tuple[Path, Path]:
    """A llama-server that may map so many KiB as a file says, and that file."""
    script, limit = short_tmp / "limited-server", short_tmp / "limit"
    script.write_text(f'#!/bin/sh\nexport MALLOC_ARENA_MAX=1\nulimit -v "$(cat {limit})"\nexec {native_server} "$@"\n')
    script.chmod(0o755)
    limit.write_text("unlimited")
    return script, limit


def mapped_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak:"))


async def run(start, limited, smollm2, context: int | None):
    """Run the model without a limit, then with 60 MiB less than it needs; half of its KV cache is 90 MiB."""
    script, limit = limited
    performance = {"context_size": context}
    running = await start(
        {"a": smollm2}, server={"llama_server": script}, performance=performance, models={"overrides": {"a": ARGS}}
    )
    assert (await running.chat("a"))[0] == 200
    child = running.supervisor.fleet.children["a"]
    limit.write_text(str(mapped_kib(child.pid) - 60 * 1024))
    await running.json("POST", "/models/unload", {"model": "a"})
    await child.gone.wait()
    return running


async def test_a_child_that_ran_out_of_memory_gets_half_of_the_context(start, limited, smollm2):
    running = await run(start, limited, smollm2, None)
    status, answer = await running.chat("a")
    assert status == 200, answer
    command = running.supervisor.fleet.children["a"].command
    assert command[command.index("--ctx-size") + 1] == "4096"
    assert running.supervisor.fleet.scheduler.entry("a").start_failures == 0


async def test_a_context_that_somebody_chose_stays_and_the_error_tells(start, limited, smollm2):
    running = await run(start, limited, smollm2, 8192)
    status, answer = await running.chat("a")
    assert status == 503
    assert answer["error"]["code"] == "model_start_failed"
    assert not running.supervisor.fleet.launch.smaller
