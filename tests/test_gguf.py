"""The GGUF reader: what it tells of good files, and that no file at all can hurt it."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import ARRAY, F32, Q4_0, STRING, TENSORS, Raw, encode, gguf, header, llama, string
from hypothesis import example, given
from hypothesis import strategies as st

from supervisor.models import gguf as reader
from supervisor.models.gguf import GGUFError, Header, read_header

Read = Callable[[bytes], Header]
GOOD = gguf(llama(), [*TENSORS, ("output.weight", (32, 3), Q4_0)])


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Return a function that reads bytes as a file."""
    path = tmp_path_factory.mktemp("gguf") / "file.gguf"

    def read_bytes(content: bytes) -> Header:
        path.write_bytes(content)
        return read_header(path)

    return read_bytes


def test_tells_what_the_file_says(read: Read) -> None:
    found = read(GOOD)
    assert found.version == 3
    assert (found.architecture, found.name, found.general_type) == ("llama", "Tiny", "model")
    assert (found.context_length, found.block_count, found.embedding_length) == (2048, 1, 256)
    assert (found.head_count, found.head_count_kv) == (8, 2)
    assert (found.key_length, found.value_length) == (None, None)
    assert (found.file_type, found.quantization) == (15, "Q4_K_M")
    assert (found.vocab_size, found.chat_template) == (3, "{{ messages }}")
    assert (found.tensor_count, found.parameter_count) == (3, 256 * 6 + 96)
    assert (found.split_count, found.split_no) == (1, 0)
    assert found.metadata["tokenizer.ggml.tokens"] == ("<s>", "a", "b")
    assert hash(found) == hash(read(GOOD))


def test_reads_version_2(read: Read) -> None:
    assert read(GOOD.replace(struct.pack("<I", 3), struct.pack("<I", 2), 1)).version == 2


def test_per_layer_arrays_count_by_their_largest(read: Read) -> None:
    found = read(gguf(llama(llama__attention__head_count=[4, 16, 8], llama__attention__head_count_kv=[0, 2, 1])))
    assert (found.head_count, found.head_count_kv) == (16, 2)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "model"),
        ({"general.type": "imatrix"}, "imatrix"),
        ({"general.architecture": "clip"}, "mmproj"),
        ({"general.architecture": "llama", "adapter.lora.alpha": 16.0}, "adapter"),
        ({"imatrix.datasets": ["a.txt"]}, "imatrix"),
    ],
)
def test_general_type_is_told_or_inferred(read: Read, metadata: dict[str, object], expected: str) -> None:
    assert read(gguf(metadata)).general_type == expected


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [(1, "F16"), (3, "Q4_1"), (15, "Q4_K_M"), (15 | 1024, "Q4_K_M"), (9999, None), (None, "Q4_0")],
)
def test_quantization_is_readable(read: Read, file_type: int | None, expected: str | None) -> None:
    metadata = {"general.architecture": "llama"} | ({} if file_type is None else {"general.file_type": file_type})
    found = read(gguf(metadata, [("a", (32, 9), Q4_0), ("b", (9,), F32)]))
    assert (found.file_type, found.quantization) == (file_type, expected)


def test_every_type_of_value(read: Read) -> None:
    values = {f"k{kind}": Raw(kind, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12)}
    metadata = read(gguf({**values, "flag": True, "text": "é", "list": [1.5, 2.5], "none": []})).metadata
    assert {metadata[key] for key in values} == {1}
    assert (metadata["flag"], metadata["text"], metadata["list"], metadata["none"]) == (True, "é", (1.5, 2.5), ())


def test_values_that_cannot_be_shown_do_no_harm(read: Read) -> None:
    found = read(gguf({"general.name": Raw(STRING, b"a\xffb"), "nan": float("nan"), "inf": Raw(12, float("inf"))}))
    assert found.name == "a\ufffdb"
    assert set(found.metadata) == {"general.name"}


def test_values_of_the_wrong_type_count_as_unknown(read: Read) -> None:
    found = read(
        gguf({"general.architecture": "x", "x.context_length": "big", "x.block_count": -1.5, "general.name": 7})
    )
    assert (found.context_length, found.block_count, found.name) == (None, None, None)


def test_long_arrays_are_skipped_and_counted(read: Read) -> None:
    tokens = [f"token {i}" * (i % 5) for i in range(5000)]
    wide = ["x" * 1000] * 100
    found = read(gguf(llama(tokenizer__ggml__tokens=tokens, wide=wide, scores=[0.5] * 5000, last="here")))
    assert found.vocab_size == 5000
    assert not {"tokenizer.ggml.tokens", "wide", "scores"} & set(found.metadata)
    assert found.metadata["last"] == "here"


@pytest.mark.parametrize("window", [8, 9, 13, 64, 1000])
def test_the_window_size_does_not_matter(read: Read, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    content = gguf(llama(tokenizer__ggml__tokens=[f"t{i}" * (i % 7) for i in range(700)], big="x" * 500))
    expected = read(content)
    monkeypatch.setattr(reader, "WINDOW", window)
    assert read(content) == expected


def test_nested_arrays_are_stepped_over(read: Read) -> None:
    inner = Raw(4, [1, 2], array=True)
    names = Raw(STRING, ["a", "b"], array=True)
    metadata = read(gguf({"nested": Raw(ARRAY, [inner, names], array=True), "after": 1})).metadata
    assert metadata == {"after": 1}


def test_unknown_tensor_types_are_let_through(read: Read) -> None:
    found = read(header(llama(), [("new", (100,), 250, 0)]) + bytes(64))
    assert (found.parameter_count, found.tensor_count) == (100, 1)


def refused(read: Read, content: bytes) -> str:
    with pytest.raises(GGUFError) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"GG", "not a GGUF file (starts with b'GG')"),
        (b"\x7fELF" + bytes(99), "not a GGUF file (starts with b'\\x7fELF')"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"tjgg" + bytes(99), "old GGML"),
        (b"GGUF", "truncated: the version ends at byte 8, the file has 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (header(version=0), "version 0"),
        (header(counts=(0, 1 << 62)), "4611686018427387904 keys"),
        (header(counts=(1 << 63, 0)), "9223372036854775808 tensors"),
        (header([("", 1)]), "no name"),
        (header([("a", 1), ("a", 2)]), "'a' is there twice"),
        (header([("k" * 65536, 1)]), "65536 bytes long, at most 65535"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<I", 99) + bytes(9), "unknown type 99"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<IIQ", ARRAY, 99, 1), "unknown type 99"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<IIQ", ARRAY, 4, 1 << 61), "2305843009213693952 elements"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 60), "elements"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, (1 << 64) - 1), "truncated"),
        (header(counts=(0, 1)) + string("k") + struct.pack("<IQ", STRING, (1 << 64) - 1), "truncated"),
        (header({"general.alignment": 48}), "alignment is 48"),
        (header({"general.alignment": 0}), "alignment is 0"),
        (header({"general.alignment": 1 << 30}), "alignment is 1073741824"),
        (header({"general.alignment": "x"}), "alignment is 'x'"),
        (header({}, [("a", (1,), F32, 0), ("a", (1,), F32, 32)]) + bytes(99), "'a' is there twice"),
        (header({}, [("a", (1, 1, 1, 1, 1), F32, 0)]), "5 dimensions"),
        (header({}, [("a", (1 << 33, 1 << 33), F32, 0)]), "impossible shape"),
        (header({}, [("a", (0, 1 << 63), F32, 0)]), "impossible shape"),
        (header({}, [("a", (33,), Q4_0, 0)]) + bytes(99), "rows of 33, not a multiple of 32"),
        (header({}, [("a", (1,), F32, 5)]) + bytes(99), "not aligned"),
        (header({}, [("a", (1 << 62,), F32, 0)]) + bytes(99), "truncated: tensor 'a' ends at byte"),
        (header({}, [("a", (1,), 250, 1 << 40)]) + bytes(99), "truncated: tensor 'a' ends at byte"),
        (header({}, [("a" * 1025, (1,), F32, 0)]) + bytes(99), "1025 bytes long"),
    ],
)
def test_says_why_a_file_is_refused(read: Read, content: bytes, reason: str) -> None:
    assert reason in refused(read, content)


def test_a_truncated_tensor_is_named(read: Read) -> None:
    size = len(GOOD)
    assert refused(read, GOOD[:-1]) == f"truncated: tensor 'output.weight' ends at byte {size}, the file has {size - 1}"


def test_deep_nesting_is_refused(read: Read) -> None:
    value = Raw(4, [1], array=True)
    for _ in range(reader.MAX_NESTING):
        value = Raw(ARRAY, [value], array=True)
    assert "deep" in refused(read, header(counts=(0, 1)) + string("k") + encode(value))


def test_too_many_strings_are_refused(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_WALKED", 10)
    assert "more than 10 strings" in refused(read, gguf({"a": ["x"] * 6, "b": ["x"] * 6}))


def test_huge_texts_are_skipped(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_KEPT", 1000)
    assert set(read(gguf({"a": "x" * 900, "b": "x" * 900, "c": 1}, [])).metadata) == {"a", "c"}


def test_lies_about_lengths_cost_no_memory(read: Read) -> None:
    lies = [
        header(counts=(1 << 40, 1 << 40)),
        header(counts=(0, 1)) + struct.pack("<Q", 1 << 40),
        header(counts=(0, 1)) + string("k") + struct.pack("<IQ", STRING, 1 << 40),
        header(counts=(0, 1)) + string("k") + struct.pack("<IIQ", ARRAY, 0, 1 << 40),
    ]
    tracemalloc.start()
    try:
        for content in lies:
            refused(read, content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(GGUFError, match="not a regular file"):
            read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent.gguf")


def test_a_file_that_shrinks_while_it_is_read(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader._Reader, "remaining", property(lambda self: self.size + 100 - self.position))
    assert "became shorter" in refused(read, GOOD[:100])


def test_truncation_anywhere_is_noticed(read: Read) -> None:
    for size in range(len(GOOD)):
        refused(read, GOOD[:size])


def survives(read: Read, content: bytes) -> None:
    """Read `content`: a GGUFError is fine, any other exception is a bug."""
    try:
        found = read(content)
    except GGUFError as error:
        assert str(error).isprintable()
    else:
        assert found.parameter_count >= 0


@given(st.binary(max_size=300))
@example(b"GGUF")
def test_fuzz_random_bytes(read: Read, content: bytes) -> None:
    survives(read, content)


@given(st.integers(2, 3), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=400))
def test_fuzz_random_body(read: Read, version: int, tensors: int, keys: int, body: bytes) -> None:
    survives(read, header(version=version, counts=(tensors, keys)) + body)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 7)), min_size=1, max_size=8))
def test_fuzz_bit_flips(read: Read, flips: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, bit in flips:
        content[place % 900] ^= 1 << bit
    survives(read, bytes(content))


@given(st.integers(0, len(header(llama())) + 150), st.binary(min_size=1, max_size=16), st.integers(0, len(GOOD)))
def test_fuzz_overwrite_and_cut(read: Read, place: int, junk: bytes, size: int) -> None:
    survives(read, (GOOD[:place] + junk + GOOD[place + len(junk) :])[:size])
