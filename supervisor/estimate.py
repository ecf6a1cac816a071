"""How much memory will a child take? From the GGUF's header and its command line to bytes, part by part.

The formulas are llama.cpp's (b11434: `llama_kv_cache`, `llama_kv_cache_iswa`, `llama_memory_recurrent`), those of the
compute buffer and of the process itself are fitted to what it told and took (`scripts/bench/memory_estimate.py`).
What grows with use and has no size of its own (llama-server's prompt cache and checkpoints, a long-context memory's
archive beyond one context) is not in it: it is measured while the child runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from supervisor.models.gguf import Header

MIB = 1 << 20

PROCESS = 25 * MIB
"""Bytes of llama-server itself: its code, threads, buffers."""

TOKEN_BYTES = 128
"""Bytes of the process for each token of the vocabulary."""

CANDIDATE_BYTES = 16
"""Bytes that a slot needs to sample, for each token of the vocabulary."""

AUTO_SLOTS = 4
"""Slots of a child that nobody told how many; they share one KV cache."""

CACHE_BITS = {"f32": 256, "f16": 128, "bf16": 128, "q8_0": 68, "q5_1": 48, "q5_0": 44, "q4_1": 40, "iq4_nl": 36}
CACHE_BITS |= {"q4_0": 36}
"""Bits that eight values of the KV cache take, by type."""

PATTERNS = {
    "afmoe": 4,
    "cohere2": 4,
    "cohere2moe": -4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": -4,
    "llama4": 4,
    "mellum": 4,
    "muse-glimmer": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": -4,
}
"""Every how many layers one attends to everything, the last of them; negative: the first. The others slide."""

WINDOWS = {"gemma2": 4096, "llama4": 8192}
"""Tokens of a sliding window that the file need not name."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for. `slots` and `context` (tokens, of all slots) are those of the child."""

    weights: int = 0
    repacked: int = 0  # weights in another order beside those of the file
    kv: int = 0
    state: int = 0  # of recurrent layers
    compute: int = 0
    sampling: int = 0
    atlas: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """All of it: the most that the child takes once it has done some work."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def later(self) -> int:
        """What a child that has just loaded did not touch yet."""
        return self.compute + self.sampling + self.atlas


@dataclass(frozen=True)
class Shape:
    """What of a child's settings its memory depends on; sizes in tokens."""

    context: int
    slots: int = AUTO_SLOTS
    unified: bool = True  # one KV cache for all slots
    ubatch: int = 512
    k_bits: int = 128  # of eight values
    v_bits: int = 128
    archive_k_bits: int = 68
    archive_v_bits: int = 68
    full_windows: bool = False
    flash: bool = True
    repack: bool = True
    mapped: bool = True
    atlas_max: int | None = None  # bytes; None: no memory

    @property
    def streams(self) -> int:
        """How many KV caches there are."""
        return 1 if self.unified else self.slots


def shape_of(command: Sequence[str], environ: Mapping[str, str], header: Header, memory: int) -> Shape:
    """Return what a command line means; of a flag that is there twice the last counts, as in llama-server.

    `memory` is the machine's in bytes, of which an archive without a limit takes a quarter.
    """
    flags = Flags(command, environ)
    slots = flags.number("-np", "--parallel", env="PARALLEL")
    auto = slots is None or slots < 1
    batch = flags.number("-b", "--batch-size", env="BATCH") or 2048
    context = flags.number("-c", "--ctx-size", env="CTX_SIZE") or header.context_length or 0
    atlas: int | None = None
    if flags.has("--atlas") or flags.has("--atlas-auto"):
        limit = flags.number("--atlas-archive-max")
        atlas = limit * MIB if limit else max(memory // 4, 256 * MIB)
    k_bits = CACHE_BITS.get(flags.text("-ctk", "--cache-type-k", env="CACHE_TYPE_K") or "f16", 128)
    v_bits = CACHE_BITS.get(flags.text("-ctv", "--cache-type-v", env="CACHE_TYPE_V") or "f16", 128)
    return Shape(
        context=_padded(context, 256),
        slots=AUTO_SLOTS if slots is None or auto else slots,
        unified=(auto or flags.has("-kvu", "--kv-unified")) and not flags.has("-no-kvu", "--no-kv-unified"),
        ubatch=max(1, min(batch, flags.number("-ub", "--ubatch-size", env="UBATCH") or 512, _padded(context, 256))),
        k_bits=k_bits,
        v_bits=v_bits,
        archive_k_bits=_archive_bits(flags.text("--atlas-type-k", env="ATLAS_TYPE_K"), k_bits),
        archive_v_bits=_archive_bits(flags.text("--atlas-type-v", env="ATLAS_TYPE_V"), v_bits),
        full_windows=flags.has("--swa-full"),
        flash=flags.text("-fa", "--flash-attn", env="FLASH_ATTN") not in ("off", "0", "false"),
        repack=not flags.has("-nr", "--no-repack"),
        mapped=not flags.has("--no-mmap"),
        atlas_max=atlas,
    )


def _archive_bits(type: str | None, cache: int) -> int:
    """Return the bits of eight values in the archive, which without a type has q8_0 where the cache has more."""
    return CACHE_BITS.get(type, 128) if type else min(cache, CACHE_BITS["q8_0"])


def estimate(header: Header, size: int, shape: Shape, *, projector: int = 0) -> Estimate:
    """Return what a child takes that computes on the CPU; `size` and `projector` are bytes of files."""
    vocabulary = header.vocab_size or 0
    repacked = header.repackable_bytes if shape.repack else 0
    logits = 4 * vocabulary * shape.slots
    return Estimate(
        weights=size + projector - (0 if shape.mapped else repacked),
        repacked=repacked,
        kv=_kv_bytes(header, shape),
        state=_state_bytes(header, shape),
        compute=_compute_bytes(header, shape),
        sampling=logits + CANDIDATE_BYTES * vocabulary * shape.slots,
        atlas=_archive_bytes(header, shape),
        process=PROCESS + TOKEN_BYTES * vocabulary,
    )


def layer_share(header: Header, layers: int | None) -> float:
    """Return which share of the layers a GPU gets when it gets `layers` of them; None: all."""
    there = (header.block_count or 0) + 1  # the output counts as one
    return 1.0 if layers is None else min(1.0, layers / there)


def _kv_bytes(header: Header, shape: Shape) -> int:
    cells = shape.context
    sliding = _window_cells(header, shape) * shape.streams
    windows = _slides(header)
    total = 0
    for layer, (k, v) in enumerate(_kv_widths(header)):
        held = sliding if windows[layer] else cells
        total += held * (k * shape.k_bits + v * shape.v_bits) // 64
    return total


def _archive_bytes(header: Header, shape: Shape) -> int:
    """One context of every token's keys and values; the archive may grow on to its limit."""
    if shape.atlas_max is None:
        return 0
    k_bits, v_bits = shape.archive_k_bits, shape.archive_v_bits
    per_token = sum(k * k_bits + v * v_bits for k, v in _kv_widths(header)) // 64
    return min(shape.atlas_max, shape.context * per_token)


def _kv_widths(header: Header) -> list[tuple[int, int]]:
    """Return for each layer how many values of K and of V a token has in the cache."""
    layers = header.block_count or 0
    if _of(header, "attention.causal") is False:
        return [(0, 0)] * layers
    per_layer = _of(header, "attention.head_count_kv")
    heads = (
        list(per_layer) if isinstance(per_layer, tuple) else [header.head_count_kv or header.head_count or 0] * layers
    )
    interval = _of(header, "full_attention_interval")
    recurrent = isinstance(interval, int) and interval > 0
    default = (header.embedding_length or 0) // max(1, header.head_count or 1)
    k, v = header.key_length or default, header.value_length or default
    if _of(header, "attention.key_length_mla"):
        v = 0  # a part of K
    sliding = _of(header, "attention.key_length_swa") or k, _of(header, "attention.value_length_swa") or v
    wide = {False: (k, v), True: sliding}
    windows, shared = _slides(header), _of(header, "attention.shared_kv_layers") or 0
    widths = []
    for layer in range(layers):
        number = heads[layer] if layer < len(heads) else 0
        if layer >= layers - shared or (recurrent and (layer + 1) % interval):
            number = 0
        own = wide[windows[layer]]
        widths.append((number * own[0], number * own[1]))
    return widths


def _slides(header: Header) -> list[bool]:
    """Return for each layer whether its attention slides."""
    layers = header.block_count or 0
    pattern = _of(header, "attention.sliding_window_pattern")
    architecture = header.architecture or ""
    if not _window(header) or (architecture not in PATTERNS and not isinstance(pattern, tuple)):
        return [False] * layers
    if isinstance(pattern, tuple):
        return [bool(pattern[layer]) if layer < len(pattern) else False for layer in range(layers)]
    every = PATTERNS[architecture]
    if isinstance(pattern, int) and pattern > 0:
        every = pattern if every > 0 else -pattern
    return [layer % every < every - 1 if every > 0 else layer % -every != 0 for layer in range(layers)]


def _window(header: Header) -> int:
    own = _of(header, "attention.sliding_window") or _of(header, "attention.chunk_size")
    return own if isinstance(own, int) and own > 0 else WINDOWS.get(header.architecture or "", 0)


def _window_cells(header: Header, shape: Shape) -> int:
    """Return the cells of a layer that slides, in one of the KV caches."""
    whole = shape.context // shape.streams
    if shape.full_windows:
        return whole
    return _padded(min(whole, _window(header) * (shape.slots if shape.unified else 1) + shape.ubatch), 256)


def _state_bytes(header: Header, shape: Shape) -> int:
    """The state of recurrent layers (Mamba and its kin), f32, for every slot."""
    inner, state = (_of(header, f"ssm.{name}") for name in ("inner_size", "state_size"))
    kernel, groups = _of(header, "ssm.conv_kernel") or 1, _of(header, "ssm.group_count") or 0
    if not (isinstance(inner, int) and isinstance(state, int)):
        return 0
    layers = sum(not k for k, _ in _kv_widths(header))
    return layers * shape.slots * 4 * ((kernel - 1) * (inner + 2 * groups * state) + state * inner)


def _compute_bytes(header: Header, shape: Shape) -> int:
    """The graph's buffer: per token of a batch five rows of the model, three of the feed-forward, the masks."""
    width, hidden = header.embedding_length or 0, _of(header, "feed_forward_length")
    hidden = max(hidden) if isinstance(hidden, tuple) and hidden else hidden
    experts = (_of(header, "expert_used_count") or 0) * (_of(header, "expert_feed_forward_length") or 0)
    hidden = max(hidden if isinstance(hidden, int) else 4 * width, experts)
    rows = 4 * shape.ubatch * (5 * width + 3 * hidden)
    if not any(k for k, _ in _kv_widths(header)):
        return rows
    cells = shape.context // shape.streams + (_window_cells(header, shape) if any(_slides(header)) else 0)
    masks = 2 * shape.ubatch * cells
    scores = 0 if shape.flash else 4 * shape.ubatch * (header.head_count or 0) * (shape.context // shape.streams)
    return rows + masks + scores


def _of(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def _padded(number: int, step: int) -> int:
    return -(-number // step) * step


class Flags:
    """A child's flags, and its environment where llama-server looks when a flag is not there."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})) -> None:
        self._command = command
        self._environ = environ

    def has(self, *names: str) -> bool:
        """Tell whether one of these flags is there."""
        return any(arg in names for arg in self._command)

    def text(self, *names: str, env: str = "") -> str | None:
        """Return the last value of these flags, else of the variable `LLAMA_ARG_<env>`; None when there is neither."""
        found = self._environ.get(f"LLAMA_ARG_{env}") if env else None
        for flag, value in zip(self._command, self._command[1:], strict=False):
            if flag in names:
                found = value
        return found

    def number(self, *names: str, env: str = "") -> int | None:
        """Return the same as a number, None when it is none."""
        try:
            return int(self.text(*names, env=env) or "")
        except ValueError:
            return None
