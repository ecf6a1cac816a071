"""How much memory a child will take, by the parts: against what llama.cpp b11434 told of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_model_files import HEADER

from supervisor.estimate import MIB, Shape, estimate, shape_of
from supervisor.gpu import CONTEXT, DRIVER, Gpus, split
from supervisor.models.gguf import Header


def header(architecture: str, layers: int, width: int, heads: int, kv: int, hidden: int, **more: object) -> Header:
    own = {"feed_forward_length": hidden, "attention.head_count_kv": kv} | {
        k.replace("__", "."): v for k, v in more.items()
    }
    return replace(
        HEADER,
        architecture=architecture,
        block_count=layers,
        embedding_length=width,
        head_count=heads,
        head_count_kv=kv,
        context_length=32768,
        key_length=own.get("attention.key_length"),
        value_length=own.get("attention.value_length"),
        vocab_size=49152,
        metadata={f"{architecture}.{key}": value for key, value in own.items()},
    )


SMOLLM2 = header("llama", 30, 576, 9, 3, 1536)
WIDE = {"attention__key_length": 256, "attention__value_length": 256, "attention__sliding_window": 512}
GEMMA = header("gemma3", 18, 640, 4, 1, 2048, **WIDE)


def parts(header: Header, flags: str, **environ: str) -> tuple[float, float]:
    """Return MiB of the KV cache and of the compute buffer."""
    found = estimate(header, 0, shape_of(flags.split(), environ, header, 8 << 30))
    return found.kv / MIB, found.compute / MIB


@pytest.mark.parametrize(
    ("model", "flags", "kv", "compute"),
    [
        (SMOLLM2, "-c 2048", 45.0, 16.64),
        (SMOLLM2, "-c 8192 -np 2", 180.0, 18.64),
        (SMOLLM2, "-c 4096 -b 256 -ub 128 -ctk q8_0 -ctv q8_0", 47.81, 4.69),
        (GEMMA, "-c 2048", 36.0, 22.28),
        (GEMMA, "-c 8192", 61.5, 28.78),
        (GEMMA, "--ctx-size 32768", 133.5, 52.78),
        (GEMMA, "-c 8192 -np 1", 39.0, 27.28),
    ],
)
def test_kv_cache_and_compute_buffer_are_those_that_llama_cpp_tells(model, flags, kv, compute):
    found = parts(model, flags)
    assert found[0] == pytest.approx(kv, abs=0.01)
    assert found[1] == pytest.approx(compute, abs=0.05)


def test_the_last_flag_wins_and_the_environment_counts_where_there_is_none():
    assert parts(SMOLLM2, "-c 8192 -c 2048")[0] == 45
    assert parts(SMOLLM2, "", LLAMA_ARG_CTX_SIZE="2048")[0] == 45
    assert parts(SMOLLM2, "-c 4096", LLAMA_ARG_CTX_SIZE="2048")[0] == 90
    assert parts(SMOLLM2, "-c x")[0] == parts(SMOLLM2, "")[0] == 720


def test_windows_may_be_full_and_layers_may_be_told_one_by_one():
    assert parts(GEMMA, "-c 8192 --swa-full")[0] == 18 * 8
    pattern = {"attention__sliding_window_pattern": (True, False) * 9}
    assert parts(header("new", 18, 640, 4, 1, 2048, **WIDE, **pattern), "-c 8192")[0] == 9 * 8 + 9 * 2.5


def test_layers_without_attention_have_a_state_and_no_cells():
    ssm = {"ssm__inner_size": 128, "ssm__state_size": 8, "ssm__conv_kernel": 4}
    found = estimate(header("jamba", 2, 64, 2, (0, 1), 128, **ssm), 0, Shape(2048))
    assert found.state == 4 * 4 * (3 * 128 + 8 * 128)
    assert found.kv == 2048 * 2 * 32 * 2


def test_an_encoder_keeps_nothing():
    assert estimate(header("bert", 2, 64, 2, 2, 128, attention__causal=False), 0, Shape(2048)).kv == 0


def test_weights_are_there_twice_where_they_are_reordered_and_mapped():
    model = replace(SMOLLM2, repackable_bytes=30)

    def both(shape: Shape) -> tuple[int, int]:
        found = estimate(model, 100, shape)
        return found.weights, found.repacked

    assert both(Shape(2048, repack=False)) == (100, 0)
    assert both(Shape(2048)) == (100, 30)
    assert both(Shape(2048, mapped=False)) == (70, 30)


def test_a_memory_takes_one_context_at_first_and_no_more_than_its_limit():
    def atlas(flags: str) -> int:
        return estimate(SMOLLM2, 0, shape_of(flags.split(), {}, SMOLLM2, 8 << 30)).atlas

    assert atlas("-c 2048") == 0
    assert atlas("-c 2048 --atlas --atlas-type-k f16 --atlas-type-v f16") == 45 * MIB
    assert atlas("-c 2048 --atlas") == 45 * MIB * 68 // 128
    assert atlas("-c 2048 --atlas -ctk q4_0 -ctv q4_0") == 45 * MIB * 36 // 128
    assert atlas("-c 2048 --atlas-auto --atlas-archive-max 20") == 20 * MIB


class FakeNvml:
    """NVML with two GPUs of 8 and 4 GB and one process."""

    NVMLError = RuntimeError

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return type("Memory", (), {"total": (8 - 4 * handle) * 10**9})

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[object]:
        return [type("Process", (), {"pid": 7, "usedGpuMemory": 100})] if handle else []


def test_gpus_tell_their_budget_and_who_uses_them():
    gpus = Gpus(FakeNvml())
    assert gpus.budget() == {"gpu0": 7_600_000_000, "gpu1": 3_800_000_000}
    assert gpus.used_by(7) == {"gpu1": 100}
    assert gpus.used_by(8) == {}


def test_without_a_driver_there_are_no_gpus():
    class Broken(FakeNvml):
        def nvmlInit(self) -> None:
            raise RuntimeError("no driver")

    assert Gpus(Broken()).budget() == {}


def test_layers_are_dealt_out_to_the_gpus_by_their_size():
    model = replace(SMOLLM2, layer_bytes=300 * MIB)
    whole = estimate(model, 400 * MIB, Shape(2048))
    assert split(whole, model, {"gpu0": 2, "gpu1": 1}, 0) == {"ram": whole.total}
    assert split(whole, model, {}, None) == {"ram": whole.total}
    needs = split(whole, model, {"gpu0": 2, "gpu1": 1}, None)
    assert needs["gpu0"] == pytest.approx((350 + 45) * MIB * 2 / 3 + whole.compute + CONTEXT, rel=0.01)
    assert needs["gpu1"] < needs["gpu0"]
    assert needs["ram"] == whole.total - (350 + 45) * MIB + DRIVER
    half = split(whole, model, {"gpu0": 2}, 15)
    assert whole.total + DRIVER > half["ram"] > needs["ram"]
