"""What does a GGUF file say about itself? A fast reader of the header that trusts nothing in the file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Files are read through a small window, never mapped: a mapped file that shrinks would kill the process.
"""

from __future__ import annotations

import io
import math
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.models.gguf_types import FILE_TYPES, REPACKED, REPACKED_ROWS, TENSOR_TYPES

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...]

VERSIONS = (2, 3)
WINDOW = 1 << 20
"""Bytes read at a time."""
MAX_KEY = 65535
"""Longest name of a key, in bytes."""
MAX_TENSOR_NAME = 1024
"""Longest name of a tensor, in bytes; llama.cpp itself takes 63."""
MAX_KEPT = 64 << 20
"""Bytes of strings kept of one file: names beyond it are an error, values beyond it are skipped."""
MAX_SHORT_ARRAY = 512
"""Most elements of an array that is kept; longer ones are skipped."""
MAX_SHORT_ARRAY_BYTES = 64 << 10
"""Most bytes of an array that is kept; larger ones are skipped."""
MAX_NESTING = 4
"""Deepest nesting of arrays."""
MAX_KEYS, MIN_KEY_BYTES = 1 << 16, 14
MAX_TENSORS, MIN_TENSOR_BYTES = 1 << 18, 24
"""Most entries, and the least bytes that one takes in the file."""
MAX_WALKED = 1 << 24
"""Most strings and inner arrays that are stepped over one by one in a file; more would take many seconds."""
INNER_ARRAY_COST = 16
"""How many strings are stepped over in the time of one inner array."""
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
GUESSED = 1024
"""Bit that llama.cpp adds to a file type that it guessed."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_SMALLEST = {_STRING: 8, _ARRAY: 12} | {number: form.size for number, form in _SCALARS.items()}
"""Least bytes that an array element of each type takes."""
_KINDS = {"adapter.type": "adapter", "adapter.lora.alpha": "adapter", "imatrix.datasets": "imatrix"}
_NOT_GGUF = {
    b"lmgg": "an old GGML file",
    b"tjgg": "an old GGML file",
    b"algg": "an old GGML file",
    b"fmgg": "an old GGML file",
    b"vers": "perhaps a Git LFS pointer: fetch the file itself",
    b"<!DO": "a web page: the download went wrong",
    b"<!do": "a web page: the download went wrong",
    b"<htm": "a web page: the download went wrong",
    b"PK\x03\x04": "a ZIP archive",
}


class GGUFError(ValueError):
    """The file is not a GGUF file that can be used; the message says why in words for the user."""


@dataclass(frozen=True)
class Header:
    """What the header says. Lengths are in tokens or elements; None: the file does not say.

    `head_count` and `head_count_kv` are the largest of all layers. `layer_bytes` are those of the tensors of layers,
    `repackable_bytes` those of the matrices that llama.cpp copies into another order for the CPU. `metadata` holds
    scalars and short arrays by key; long arrays (the vocabulary) and values that JSON cannot carry (NaN, infinity) are
    left out.
    """

    version: int
    architecture: str | None
    name: str | None
    general_type: str
    context_length: int | None
    block_count: int | None
    embedding_length: int | None
    head_count: int | None
    head_count_kv: int | None
    key_length: int | None
    value_length: int | None
    vocab_size: int | None
    file_type: int | None
    quantization: str | None
    chat_template: str | None = field(repr=False)
    tensor_count: int
    parameter_count: int
    split_count: int
    split_no: int
    metadata: Mapping[str, Value] = field(repr=False, hash=False)
    layer_bytes: int = 0
    repackable_bytes: int = 0


def read_header(path: Path) -> Header:
    """Read and check the header of `path`, and that the file is long enough for every tensor.

    Raises GGUFError when the file is damaged or of another kind, and OSError when it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise GGUFError("not a regular file")
    with path.open("rb", buffering=0) as file:
        return _parse(_Reader(file, file.seek(0, io.SEEK_END)))


class _Reader:
    """A cursor over the file: `position` is absolute, every step is checked against `size` (bytes)."""

    def __init__(self, file: io.FileIO, size: int) -> None:
        self.size = size
        self.position = 0
        self._file = file
        self._window = b""
        self._start = 0
        self._walked = 0
        self._kept = 0

    @property
    def remaining(self) -> int:
        return self.size - self.position

    def take(self, length: int, what: str) -> bytes:
        """Return the next `length` bytes and step over them."""
        offset = self._reach(length, what)
        self.position += length
        return self._window[offset : offset + length]

    def number(self, form: struct.Struct, what: str) -> int:
        """Return the next number."""
        offset = self._reach(form.size, what)
        self.position += form.size
        (value,) = form.unpack_from(self._window, offset)
        return int(value)

    def skip(self, length: int, what: str) -> None:
        """Step over `length` bytes."""
        self._check(length, what)
        self.position += length

    def name(self, limit: int, what: str) -> bytes:
        """Return the next string, at most `limit` bytes long."""
        length = self.number(_U64, what)
        if length > limit or not self.keep(length):
            raise GGUFError(f"damaged: {what} is {length} bytes long, at most {limit} are allowed")
        return self.take(length, what)

    def keep(self, length: int) -> bool:
        """Account for a string that stays in memory; return whether there is room for it."""
        if self._kept + length > MAX_KEPT:
            return False
        self._kept += length
        return True

    def walk(self, count: int) -> None:
        """Account for `count` items that are stepped over one by one."""
        self._walked += count
        if self._walked > MAX_WALKED:
            raise GGUFError(f"its arrays hold more than {MAX_WALKED} strings")

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. This is the hot loop: vocabularies have 100 000s of them."""
        self.walk(count)
        length_at = _U64.unpack_from
        while count:
            offset = self._reach(8, what)
            window = self._window
            try:
                for left in range(count, 0, -1):
                    count = left
                    offset += 8 + length_at(window, offset)[0]
                count = 0
            except (struct.error, OverflowError):
                pass  # the next length lies beyond the window: go on from there
            self.skip(self._start + offset - self.position, what)

    def _check(self, length: int, what: str) -> None:
        if length > self.remaining:
            end = self.position + length
            raise GGUFError(f"truncated: {what} ends at byte {end}, the file has {self.size}")

    def _reach(self, length: int, what: str) -> int:
        """Have the next `length` bytes in the window and return where in it they start."""
        offset = self.position - self._start
        if offset >= 0 and offset + length <= len(self._window):
            return offset
        self._check(length, what)
        self._file.seek(self.position)
        wanted = min(max(length, WINDOW), self.remaining)
        parts = []
        while wanted and (part := self._file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        if wanted:
            raise GGUFError("the file became shorter while it was read")
        self._window = b"".join(parts)
        self._start = self.position
        return 0


def _parse(reader: _Reader) -> Header:
    version = _version(reader)
    tensor_count = reader.number(_U64, "the tensor count")
    key_count = reader.number(_U64, "the key count")
    for what, count, most, smallest in (
        ("keys", key_count, MAX_KEYS, MIN_KEY_BYTES),
        ("tensors", tensor_count, MAX_TENSORS, MIN_TENSOR_BYTES),
    ):
        if count > min(most, reader.remaining // smallest):
            raise GGUFError(f"damaged or truncated: {count} {what} cannot be in {reader.size} bytes")
    metadata, lengths = _metadata(reader, key_count)
    tensors = _tensors(reader, tensor_count, _alignment(metadata))
    types = tensors.types
    architecture = _text(metadata, "general.architecture")

    def number(key: str) -> int | None:
        return _count(metadata.get(f"{architecture}.{key}"))

    file_type = _count(metadata.get("general.file_type"))
    return Header(
        version=version,
        architecture=architecture,
        name=_text(metadata, "general.name"),
        general_type=_general_type(metadata, lengths, architecture),
        context_length=number("context_length"),
        block_count=number("block_count"),
        embedding_length=number("embedding_length"),
        head_count=number("attention.head_count"),
        head_count_kv=number("attention.head_count_kv"),
        key_length=number("attention.key_length"),
        value_length=number("attention.value_length"),
        vocab_size=number("vocab_size") or lengths.get("tokenizer.ggml.tokens"),
        file_type=file_type,
        quantization=_quantization(file_type, types),
        chat_template=_text(metadata, "tokenizer.chat_template"),
        tensor_count=tensor_count,
        parameter_count=types.total(),
        split_count=_count(metadata.get("split.count")) or 1,
        split_no=_count(metadata.get("split.no")) or 0,
        metadata=metadata,
        layer_bytes=tensors.layer_bytes,
        repackable_bytes=tensors.repackable_bytes,
    )


def _version(reader: _Reader) -> int:
    if not reader.size:
        raise GGUFError("empty file")
    magic = reader.take(min(4, reader.size), "the magic")
    if magic != b"GGUF":
        hint = f": {_NOT_GGUF[magic]}" if magic in _NOT_GGUF else ""
        raise GGUFError(f"not a GGUF file (starts with {magic!r}){hint}")
    version = reader.number(_U32, "the version")
    if version and not version & 0xFFFF:
        raise GGUFError("a big-endian GGUF file: convert it with llama.cpp's gguf_convert_endian.py")
    if version == 1:
        raise GGUFError("GGUF version 1 is no longer supported: get or convert a newer file")
    if version not in VERSIONS:
        raise GGUFError(f"GGUF version {version} is not known, only 2 and 3 are")
    return version


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    """Return the kept values, and the length of every array, by key."""
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    seen: set[bytes] = set()
    for index in range(count):
        raw = reader.name(MAX_KEY, f"the name of key {index}")
        key = raw.decode(errors="replace")
        if not raw:
            raise GGUFError(f"damaged: key {index} has no name")
        if raw in seen:
            raise GGUFError(f"damaged: key {key!r} is there twice")
        seen.add(raw)
        what = f"the value of {key!r}"
        kind = reader.number(_U32, what)
        value: Value | None
        if kind == _ARRAY:
            value, lengths[key] = _array(reader, what)
        else:
            value = _scalar(reader, kind, what)
        if value is not None:
            metadata[key] = value
    return metadata, lengths


def _scalar(reader: _Reader, kind: int, what: str) -> Scalar | None:
    if kind == _STRING:
        length = reader.number(_U64, what)
        if not reader.keep(length):
            reader.skip(length, what)
            return None
        return reader.take(length, what).decode(errors="replace")
    if kind not in _SCALARS:
        raise GGUFError(f"damaged: {what} has the unknown type {kind}")
    form = _SCALARS[kind]
    value: int | float | bool = form.unpack(reader.take(form.size, what))[0]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _array(reader: _Reader, what: str, depth: int = 1) -> tuple[Value | None, int]:
    """Step over an array; return its elements if it is short and flat, and how many it has."""
    kind = reader.number(_U32, what)
    count = reader.number(_U64, what)
    if kind not in _SMALLEST:
        raise GGUFError(f"damaged: {what} is an array of the unknown type {kind}")
    if count > reader.remaining // _SMALLEST[kind]:
        raise GGUFError(f"truncated: {what} has {count} elements, the file has {reader.size} bytes")
    start = reader.position
    if kind == _ARRAY:
        if depth >= MAX_NESTING:
            raise GGUFError(f"damaged: {what} nests arrays more than {MAX_NESTING} deep")
        reader.walk(INNER_ARRAY_COST * count)
        for _ in range(count):
            _array(reader, what, depth + 1)
        return None, count
    if kind == _STRING:
        reader.skip_strings(count, what)
    else:
        reader.skip(count * _SMALLEST[kind], what)
    if depth > 1 or count > MAX_SHORT_ARRAY or reader.position - start > MAX_SHORT_ARRAY_BYTES:
        return None, count
    reader.position = start
    elements = [_scalar(reader, kind, what) for _ in range(count)]
    return tuple(element for element in elements if element is not None), count


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise GGUFError(f"damaged: the alignment is {value!r}, it must be a power of two up to {MAX_ALIGNMENT}")
    return value


@dataclass
class _Tensors:
    """What the tensors add up to: parameters by tensor type, and bytes."""

    types: Counter[int] = field(default_factory=Counter)
    layer_bytes: int = 0
    repackable_bytes: int = 0

    def add(self, raw: bytes, kind: int, sizes: list[int], elements: int, length: int) -> None:
        self.types[kind] += elements
        in_layer = raw.startswith(b"blk.")
        self.layer_bytes += length if in_layer else 0
        is_matrix = raw.endswith(b".weight") and 2 <= len(sizes) <= 3 and (in_layer or raw == b"output.weight")
        if is_matrix and kind in REPACKED and sizes[1] % REPACKED_ROWS == 0:
            self.repackable_bytes += length


def _tensors(reader: _Reader, count: int, alignment: int) -> _Tensors:
    """Check every tensor; return what they add up to."""
    ends: list[tuple[str, int]] = []
    found = _Tensors()
    seen: set[bytes] = set()
    for index in range(count):
        raw = reader.name(MAX_TENSOR_NAME, f"the name of tensor {index}")
        name = repr(raw.decode(errors="replace"))
        if raw in seen:
            raise GGUFError(f"damaged: tensor {name} is there twice")
        seen.add(raw)
        what = f"the entry of tensor {name}"
        elements, sizes = _shape(reader, what)
        row = sizes[0] if sizes else 1
        kind = reader.number(_U32, what)
        offset = reader.number(_U64, what)
        if offset % alignment:
            raise GGUFError(f"damaged: tensor {name} is not aligned to {alignment} bytes")
        length = 0
        if kind in TENSOR_TYPES:
            block, block_bytes = TENSOR_TYPES[kind][1:]
            if row % block:
                raise GGUFError(f"damaged: tensor {name} has rows of {row}, not a multiple of {block}")
            length = elements // block * block_bytes
        found.add(raw, kind, sizes, elements, length)
        ends.append((name, offset + length))
    data = -(-reader.position // alignment) * alignment
    for name, end in ends:
        if data + end > reader.size:
            raise GGUFError(f"truncated: tensor {name} ends at byte {data + end}, the file has {reader.size}")
    return found


def _shape(reader: _Reader, what: str) -> tuple[int, list[int]]:
    """Return the number of elements of a tensor, and along each dimension."""
    dimensions = reader.number(_U32, what)
    if dimensions > MAX_DIMENSIONS:
        raise GGUFError(f"damaged: {what} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are known")
    sizes = [reader.number(_U64, what) for _ in range(dimensions)]
    elements = math.prod(sizes)
    if max(elements, *sizes, 0) >= 1 << 63:
        raise GGUFError(f"damaged: {what} has the impossible shape {sizes}")
    return elements, sizes


def _general_type(metadata: Mapping[str, Value], lengths: Mapping[str, int], architecture: str | None) -> str:
    """Return `general.type`, or what the other keys tell for the many files without it."""
    said = _text(metadata, "general.type")
    if said:
        return said
    if architecture == "clip":
        return "mmproj"
    return next((kind for key, kind in _KINDS.items() if key in metadata or key in lengths), "model")


def _quantization(file_type: int | None, types: Counter[int]) -> str | None:
    """Return the name of the file type; for a file without one, the tensor type of most parameters."""
    if file_type is not None:
        return FILE_TYPES.get(file_type & ~GUESSED)
    for kind, _ in types.most_common(1):
        return TENSOR_TYPES[kind][0] if kind in TENSOR_TYPES else None
    return None


def _text(metadata: Mapping[str, Value], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None


def _count(value: Value | None) -> int | None:
    """Return a whole number that is not negative, the largest one of an array, or None."""
    if isinstance(value, tuple):
        return max((count for count in map(_count, value) if count is not None), default=None)
    return value if type(value) is int and value >= 0 else None
