"""Small memory files of the format that the children write."""

from __future__ import annotations

import json
import struct
from typing import Any

import xxhash
import zstandard

PARTS = {"tokens": b"\1\0\0\0" * 5, "counters": b"counters", "keys": bytes(range(256)) * 64}


def memory_file(changes: dict[str, Any] | None = None, name: str = "book", saved: int = 2) -> bytes:
    """Return a small file of the format, with changes to its header."""
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    frames, data = [], b""
    for purpose, raw in PARTS.items():
        stored = compressor.compress(raw)
        frame = {"purpose": purpose, "layers": [], "raw": len(raw), "stored": len(stored), "shuffle": 1}
        frames.append(frame | {"xxh64": xxhash.xxh64(stored).hexdigest()})
        data += stored
    session = {"name": name, "n_tokens": 5, "n_archived": 0, "last": -1, "created": 1, "saved": saved}
    header = {"format": "llama-atlas", "model": {"description": "tiny", "hash": "00"}, "params": {"cells": 256}}
    header |= {"session": session, "frames": frames} | (changes or {})
    text = json.dumps(header).encode() + b"   "
    head = struct.pack("<8sII", b"ATLASMEM", 1, len(text)) + text
    return head + xxhash.xxh64(head).intdigest().to_bytes(8, "little") + data


def grown(data: bytes, tokens: int = 6) -> bytes:
    """Return a file with one more generation: other tokens, the rest as the first generation has it."""
    size = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[16 : 16 + size])
    raw = b"\1\0\0\0" * tokens
    stored = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    at, frames = 24 + size, []
    for frame in header["frames"]:
        frames.append(frame | {"offset": at})
        at += frame["stored"]
    frames[0] |= {"raw": len(raw), "stored": len(stored), "xxh64": xxhash.xxh64(stored).hexdigest()}
    frames[0]["offset"] = len(data) + 40
    text = json.dumps(header | {"session": header["session"] | {"n_tokens": tokens}, "frames": frames}).encode()
    record = struct.pack("<8sQQQ", b"ATLASGEN", len(stored), len(text), xxhash.xxh64(text).intdigest())
    return data + record + xxhash.xxh64(record).intdigest().to_bytes(8, "little") + stored + text
