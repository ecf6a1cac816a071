"""Damaged and hostile memory files, made from a good one; the header's checksum is right where that lets them in."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import xxhash
import zstandard
from common import Json

CORRUPT, MISMATCH = 400, 409
WRONG = (CORRUPT, MISMATCH)
ANY = (200, CORRUPT, MISMATCH)

FRAME_MAX = 8 << 20

HOSTILE: list[Any] = [
    0, 1, -1, 7, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, -(1 << 63), 10**30, FRAME_MAX, FRAME_MAX + 1, 0.5, 1e308, -0.0, True, False, None, "", "0", "\0",
    "x" * 70000, "../../etc/passwd", "ffffffffffffffff", [], {}, [[]], [-1], [0, 1], [1 << 40, 0], {"a": {}},
]  # fmt: skip
"""What a number, a text or a list of the header may be replaced by."""

WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\0\0\0\0", b"\1\0\0\0")
"""What four bytes of a frame may be replaced by: integers, NaN, infinity."""


@dataclass(frozen=True)
class Mutant:
    """A file and how it has to be answered."""

    kind: str
    name: str
    data: bytes
    expected: tuple[int, ...] = (CORRUPT,)


def seal(text: bytes, rest: bytes, front: bytes = b"ATLASMEM\1\0\0\0") -> bytes:
    """Return a file with this header, its size and checksum right, and the frames `rest`."""
    head = front + struct.pack("<I", len(text)) + text
    return head + xxhash.xxh64(head).intdigest().to_bytes(8, "little") + rest


def split(data: bytes) -> tuple[Json, list[bytes]]:
    """Return header and stored frames of a good file."""
    size = struct.unpack_from("<I", data, 12)[0]
    header, at, frames = json.loads(data[16 : 16 + size]), 24 + size, []
    for frame in header["frames"]:
        frames.append(data[at : at + frame["stored"]])
        at += frame["stored"]
    return header, frames


def join(header: Json, frames: list[bytes]) -> bytes:
    """Return a file of a header and stored frames."""
    return seal(json.dumps(header).encode(), b"".join(frames))


def pack(about: Json, raw: bytes) -> tuple[Json, bytes]:
    """Return the table's entry and the stored bytes of a frame with this content."""
    stored = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    return about | {"raw": len(raw), "stored": len(stored), "xxh64": xxhash.xxh64(stored).hexdigest()}, stored


def flipped(data: bytes, at: int, bit: int) -> bytes:
    """Return the file with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# Damage


def truncations(good: bytes, count: int) -> Iterator[Mutant]:
    """Cut the file at every 1/count."""
    for number in range(count):
        yield Mutant("truncation", f"{number}/{count}", good[: len(good) * number // count])


def flips(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """Flip one random bit, half of the time in the header."""
    size = struct.unpack_from("<I", good, 12)[0]
    for number in range(count):
        at, bit = rng.randrange(24 + size if number % 2 else len(good)), rng.randrange(8)
        yield Mutant("flip", f"byte {at}, bit {bit}", flipped(good, at, bit))


def fronts(good: bytes) -> Iterator[Mutant]:
    """Wrong magic, version, sizes, checksums and ends."""
    size = struct.unpack_from("<I", good, 12)[0]
    text, rest = good[16 : 16 + size], good[24 + size :]
    yield Mutant("front", "empty", b"")
    yield Mutant("front", "magic alone", good[:8])
    yield Mutant("front", "zeros", bytes(len(good)))
    yield Mutant("front", "one byte more", good + b"\0", (200,))  # damage behind what is whole
    yield Mutant("front", "twice", good + good, (200,))
    for magic in (b"ATLASMEN", b"atlasmem", b"GGUF\3\0\0\0", bytes(8)):
        yield Mutant("front", f"magic {magic!r}", seal(text, rest, magic + good[8:12]))
    for version in (0, 2, 3, 1 << 24, (1 << 32) - 1):
        yield Mutant("front", f"version {version}", seal(text, rest, good[:8] + struct.pack("<I", version)))
    for length in (0, 1, size - 1, size + 1, len(good) - 24, len(good), 16 << 20, (16 << 20) + 1, 1 << 31, 0xFFFFFFFF):
        yield Mutant("front", f"header of {length} bytes", good[:12] + struct.pack("<I", length) + good[16:])
    yield Mutant("front", "checksum 0", good[: 16 + size] + bytes(8) + rest)


def others(good: bytes) -> Iterator[Mutant]:
    """A file of another model, and files whose model does not say which it is."""
    for value in ("0" * 16, "f" * 16, "", "x" * 100):
        header, frames = split(good)
        header["model"]["hash"] = value
        yield Mutant("model", f"hash {value[:20]!r}", join(header, frames), (MISMATCH,))
    for wrong in (None, 7, [], {}, {"hash": 7}):
        header, frames = split(good)
        header["model"] = wrong
        yield Mutant("model", f"model {wrong}", join(header, frames))


# The header


def texts(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """Headers that are no JSON, or JSON of an unusual kind; the first ones are the same for every seed."""
    size = struct.unpack_from("<I", good, 12)[0]
    text, rest = good[16 : 16 + size].rstrip(), good[24 + size :]
    odd = {
        "empty": b"", "spaces": b" " * 1000, "null": b"null", "number": b"1", "text": b'"frames"', "list": b"[]",
        "object": b"{}", "two": text + text, "NUL behind": text + b"\0", "comma": text[:-1] + b",}",
        "key twice": text[:-1] + b',"frames":[]}', "infinite": text.replace(b'"raw":', b'"raw":1e999,"r":', 1),
        "NaN": text.replace(b'"raw":', b'"raw":NaN,"r":', 1), "no UTF-8": text.replace(b"llama", b"ll\xff\xfea", 1),
        "surrogate": text.replace(b"llama", b"\\ud800", 1), "UTF-16": text.decode().encode("utf-16"),
        "deep lists": text[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep objects": text[:-1] + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        "deepest lists": text[:-1] + b',"x":' + b"[" * 7_000_000 + b"]" * 7_000_000 + b"}",
        "open lists": b"[" * 1_000_000, "many lists": text[:-1] + b',"x":[' + b"[]," * 1_000_000 + b"0]}",
        "some lists": text[:-1] + b',"x":[' + b"[]," * 100_000 + b"0]}",
        "many numbers": text[:-1] + b',"x":[' + b"0," * 1_000_000 + b"0]}",
        "some numbers": text[:-1] + b',"x":[' + b"0," * 200_000 + b"0]}",
        "many frames": text[:-1] + b',"frames":[' + b"{}," * 100_000 + b"{}]}",
        "a long text": text[:-1] + b',"x":"' + b"a" * 4_000_000 + b'"}',
    }  # fmt: skip
    for name, changed in odd.items():
        yield Mutant("header text", name, seal(changed, rest), ANY)
    for _ in range(count):
        changed = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            how = rng.randrange(4)
            if how == 0:
                del changed[at : at + rng.randint(1, 40)]
            elif how == 1:
                changed[at] = rng.choice(b'{}[]",:0-9.e\\\0\xff')
            elif how == 2:
                changed[at:at] = changed[at : at + rng.randint(1, 200)]
            else:
                changed[at:at] = rng.choice([b"9", b"-", b"1e9", b"[[", b'"', b"\xc3", b"0" * 300])
        yield Mutant("header text", f"changed at {at}", seal(bytes(changed), rest), ANY)


def values(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """Headers of which one to three values are gone or hostile; before that, each value of the upper part is gone."""
    rest = b"".join(split(good)[1])
    for number, (_, _, path) in enumerate(_places(split(good)[0])):
        if path.count(".") <= 2 or path.startswith(".frames.0"):
            header, _ = split(good)
            holder, key, _ = list(_places(header))[number]
            del holder[key]
            yield Mutant("header values", f"{path} gone", seal(json.dumps(header).encode(), rest), ANY)
    for _ in range(count):
        header, _ = split(good)
        done = []
        for _ in range(rng.randint(1, 3)):
            holder, key, path = rng.choice(list(_places(header)))
            value = holder[key]
            if rng.randrange(4) == 0:
                del holder[key]
                done.append(f"{path} gone")
                continue
            if isinstance(value, int) and rng.randrange(3) == 0:
                holder[key] = value + rng.choice([-1, 1, 4, -value, value, 1 << 20])
            else:
                holder[key] = deepcopy(rng.choice(HOSTILE))
            done.append(f"{path} = {json.dumps(holder[key])[:40]}")
        yield Mutant("header values", ", ".join(done), seal(json.dumps(header).encode(), rest), ANY)


def _places(node: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield node, key, f"{path}.{key}"
        yield from _places(value, f"{path}.{key}")


# The frames


def tables(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """Frames dropped, repeated, exchanged, renamed, cut in two or put together, the table being right about them."""
    for _ in range(count):
        header, frames = split(good)
        table = header["frames"]
        a, b = rng.randrange(len(table)), rng.randrange(len(table))
        how = rng.choice(["drop", "repeat", "exchange", "rename", "cut", "merge", "last", "shuffle"])
        if how == "drop":
            del table[a], frames[a]
        elif how == "repeat":
            table.insert(b, dict(table[a]))
            frames.insert(b, frames[a])
        elif how == "exchange":
            table[a], table[b] = table[b], table[a]
            frames[a], frames[b] = frames[b], frames[a]
        elif how == "rename":
            table[a] |= {key: table[b][key] for key in rng.choice([("purpose",), ("layers",), ("purpose", "layers")])}
        elif how == "last":
            header["session"]["last"] = rng.choice(HOSTILE)
        elif how == "shuffle":
            table[a]["shuffle"] = rng.choice([0, 1, 2, 3, 4, 8, 65535, 65536, 65537])
        else:
            raw = zstandard.decompress(frames[a])
            parts = [raw + raw] if how == "merge" else [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
            packed = [pack(table[a], part) for part in parts]
            table[a : a + 1] = [entry for entry, _ in packed]
            frames[a : a + 1] = [stored for _, stored in packed]
        yield Mutant("frame table", f"{how} {a} {b}", join(header, frames), ANY)


def contents(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """Frames with another content, every checksum right; small frames as often as large ones."""
    for _ in range(count):
        header, frames = split(good)
        table = header["frames"]
        purpose = rng.choice(sorted({frame["purpose"] for frame in table}))
        number = rng.choice([n for n, frame in enumerate(table) if frame["purpose"] == purpose])
        raw = bytearray(zstandard.decompress(frames[number]))
        at = rng.randrange(max(1, len(raw) - 8))
        how = rng.randrange(8)
        if how == 0:
            raw = raw[:at]
        elif how == 1:
            raw += raw[: rng.randint(1, 64)]
        elif how == 2:
            raw[at : at + 4] = rng.randbytes(4)
        else:
            raw[at : at + 4] = rng.choice(WORDS)
        table[number], frames[number] = pack(table[number], bytes(raw))
        name = f"frame {number} ({purpose}) at {at} of {len(raw)}, {how}"
        yield Mutant("frame content", name, join(header, frames), ANY)


def bombs(good: bytes) -> Iterator[Mutant]:
    """Small files that claim, or decompress to, far more than they need."""
    header, frames = split(good)
    for size in (1 << 20, FRAME_MAX, 64 << 20):
        for number, about in enumerate(header["frames"]):
            table = [dict(frame) for frame in header["frames"]]
            table[number]["raw"] = size
            yield Mutant("bomb", f"frame {number} says {size} bytes", join(header | {"frames": table}, frames))
            if number < 8:
                table[number], stored = pack(about, bytes(size))
                changed = [*frames[:number], stored, *frames[number + 1 :]]
                yield Mutant(
                    "bomb", f"frame {number} has {size} bytes", join(header | {"frames": table}, changed), WRONG
                )
    entry, stored = pack(header["frames"][-1], bytes(FRAME_MAX))
    more = header | {"frames": [*header["frames"], *[entry] * 8]}
    yield Mutant("bomb", "8 large frames behind", join(more, [*frames, *[stored] * 8]))
    for tokens in (1 << 20, 4 << 20, 1 << 24):
        entry, stored = pack(header["frames"][0], bytes(min(4 * tokens, FRAME_MAX)))
        count = 4 * tokens // entry["raw"]
        session = header["session"] | {"n_tokens": tokens}
        many = header | {"session": session, "frames": [*[entry] * count, *header["frames"][1:]]}
        yield Mutant("bomb", f"{tokens} tokens", join(many, [*[stored] * count, *frames[1:]]))


# Later generations


def grown(good: bytes, header: Json | None = None, frames: bytes = b"", record: bytes = b"") -> bytes:
    """Return the file with one more generation: the same state, or what `header` says.

    `record`: instead of the right one. The checksums are right.
    """
    text = json.dumps(header or placed(good)).encode()
    made = struct.pack("<8sQQQ", b"ATLASGEN", len(frames), len(text), xxhash.xxh64(text).intdigest())
    made += xxhash.xxh64(made).intdigest().to_bytes(8, "little")
    return good + (record or made) + frames + text


def placed(good: bytes) -> Json:
    """Return the header with the place of each frame."""
    header, frames = split(good)
    at = len(good) - sum(map(len, frames))
    for about, frame in zip(header["frames"], frames, strict=True):
        about["offset"] = at
        at += len(frame)
    return header


def generations(good: bytes, count: int, rng: random.Random) -> Iterator[Mutant]:
    """A generation behind the good one: cut, flipped, with hostile sizes, places and values; the first is whole."""
    whole = grown(good)
    yield Mutant("generation", "whole", whole, (200,))
    yield Mutant("generation", "never completed", good + bytes(40) + whole[len(good) + 40 :], (200,))
    table = placed(good)["frames"]
    for times in (100, 20_000):
        many = placed(good) | {"frames": [*table, *[table[-1]] * times]}
        yield Mutant("generation", f"a frame {times} times", grown(good, many), (200, CORRUPT))
    for number in range(count):
        at = rng.randrange(len(good), len(whole))
        how = number % 5
        if how == 0:
            yield Mutant("generation", f"cut at {at}", whole[:at], (200,))
        elif how == 1:
            bit = rng.randrange(8)
            yield Mutant("generation", f"byte {at}, bit {bit}", flipped(whole, at, bit), (200,))
        elif how == 2:
            sizes = [
                rng.choice([0, 1, 39, 40, len(good), 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]) for _ in range(2)
            ]
            record = struct.pack("<8sQQQ", b"ATLASGEN", *sizes, rng.getrandbits(64))
            record += xxhash.xxh64(record).intdigest().to_bytes(8, "little")
            yield Mutant("generation", f"sizes {sizes}", grown(good, record=record), (200,))
        elif how == 3:
            header = placed(good)
            a, b = rng.randrange(len(table)), rng.randrange(len(table))
            header["frames"][a]["offset"] = rng.choice([table[b]["offset"], len(good), len(whole), *HOSTILE])
            name = f"frame {a} at {header['frames'][a]['offset']!r:.40}"
            yield Mutant("generation", name, grown(good, header), ANY)
        else:
            header = placed(good)
            holder, key, path = rng.choice(list(_places(header)))
            holder[key] = deepcopy(rng.choice(HOSTILE))
            yield Mutant("generation", f"{path} = {json.dumps(holder[key])[:40]}", grown(good, header), ANY)


KINDS: dict[str, Callable[[bytes, int, random.Random], Iterator[Mutant]]] = {
    "truncation": lambda good, count, _: truncations(good, count),
    "flip": flips,
    "front": lambda good, _, __: fronts(good),
    "model": lambda good, _, __: others(good),
    "header text": texts,
    "header values": values,
    "frame table": tables,
    "frame content": contents,
    "bomb": lambda good, _, __: bombs(good),
    "generation": generations,
}
"""What makes the mutants of a kind from a good file and a number of them."""
