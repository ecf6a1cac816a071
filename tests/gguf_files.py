"""Writes small GGUF files: valid ones, and with `Raw` and `header` also those that no writer should make."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor.models.gguf_types import TENSOR_TYPES

CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
F32, Q4_0, Q4_K = 0, 2, 12

Tensor = tuple[str, Sequence[int], int]
TENSORS: tuple[Tensor, ...] = (("token_embd.weight", (256, 4), F32), ("blk.0.attn_q.weight", (256, 2), Q4_K))


@dataclass(frozen=True)
class Raw:
    """A value with its GGUF type given: a scalar, or with `array` the elements of an array of that type."""

    kind: int
    value: object
    array: bool = False


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def typed(value: object) -> Raw:
    match value:
        case Raw():
            return value
        case bool():
            return Raw(7, value)
        case int():
            return Raw(4, value)
        case float():
            return Raw(6, value)
        case str():
            return Raw(STRING, value)
        case list():
            return Raw(typed(value[0]).kind if value else 4, value, array=True)
        case _:
            raise TypeError(value)


def encode(raw: Raw, *, with_type: bool = True) -> bytes:
    if raw.array:
        assert isinstance(raw.value, Sequence)
        items = [item if isinstance(item, Raw) else Raw(raw.kind, item) for item in raw.value]
        head = struct.pack("<I", ARRAY) if with_type else b""
        body = b"".join(encode(item, with_type=False) for item in items)
        return head + struct.pack("<IQ", raw.kind, len(items)) + body
    head = struct.pack("<I", raw.kind) if with_type else b""
    if raw.kind == STRING:
        return head + string(raw.value)  # type: ignore[arg-type]
    return head + struct.pack("<" + CODES[raw.kind], raw.value)


def tensor_bytes(dimensions: Sequence[int], kind: int) -> int:
    elements = 1
    for size in dimensions:
        elements *= size
    _, block, block_bytes = TENSOR_TYPES.get(kind, ("", 1, 0))
    return elements // block * block_bytes


def header(
    metadata: Mapping[str, object] | Sequence[tuple[str | bytes, object]] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a header with tensors of given name, dimensions, type and offset; `counts` may lie about both."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    n_tensors, n_keys = counts or (len(tensors), len(pairs))
    parts = [b"GGUF", struct.pack("<IQQ", version, n_tensors, n_keys)]
    parts += [string(key) + encode(typed(value)) for key, value in pairs]
    for name, dimensions, kind, offset in tensors:
        shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        parts.append(string(name) + shape + struct.pack("<IQ", kind, offset))
    return b"".join(parts)


def gguf(metadata: Mapping[str, object], tensors: Sequence[Tensor] = TENSORS, *, alignment: int = 32) -> bytes:
    """Return a whole file, its tensors filled with zeros and its end not padded."""
    placed, offset, end = [], 0, 0
    for name, dimensions, kind in tensors:
        placed.append((name, dimensions, kind, offset))
        end = offset + tensor_bytes(dimensions, kind)
        offset = -(-end // alignment) * alignment
    head = header(metadata, placed)
    return head + bytes(-len(head) % alignment + end) if tensors else head


def llama(**more: object) -> dict[str, object]:
    """Return the metadata of a tiny language model; keywords add keys, with `__` for a dot."""
    return {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.file_type": 15,
        "llama.context_length": 2048,
        "llama.block_count": 1,
        "llama.embedding_length": 256,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["<s>", "a", "b"],
        "tokenizer.chat_template": "{{ messages }}",
    } | {key.replace("__", "."): value for key, value in more.items()}


def write(path: Path, content: bytes | None = None, *, mtime: float | None = None) -> Path:
    """Write a model (a tiny llama by default), its mtime set to `mtime` in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf(llama()) if content is None else content)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def write_shards(folder: Path, stem: str, count: int, *, mtime: float | None = None) -> list[Path]:
    """Write a model in `count` shards as llama.cpp splits it: only the first one says what the model is."""
    paths = []
    for number in range(count):
        metadata = (llama() if number == 0 else {}) | {"split.no": Raw(2, number), "split.count": Raw(2, count)}
        tensors = [(f"blk.{number}.weight", (256, 2), F32)]
        path = folder / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(write(path, gguf(metadata, tensors), mtime=mtime))
    return paths


def write_mmproj(path: Path, *, mtime: float | None = None, file_type: int = 1) -> Path:
    """Write a multimodal projector."""
    metadata = {"general.architecture": "clip", "general.type": "mmproj", "general.file_type": file_type}
    return write(path, gguf(metadata), mtime=mtime)
