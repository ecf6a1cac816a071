"""Memory files (`.atlas`): what is in one, and is it whole? Neither the model nor a running server is needed."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash

from supervisor.errors import SupervisorError

MAGIC = b"ATLASMEM"
VERSION = 1
FIXED = struct.Struct("<8sII")
"""Magic, version, size of the header. An XXH64 follows the header."""

MORE = b"ATLASGEN"
RECORD = struct.Struct("<8sQQQQ")
"""What begins a later generation: magic, size of its frames, size of its header, XXH64 of that, XXH64 of all before."""

HEADER_MAX = 4 << 20
FRAME_MAX = 8 << 20
"""Largest frame when decompressed."""


class CorruptMemory(SupervisorError):
    """A memory file that cannot be trusted."""

    code = "memory_corrupt"


class Frame(msgspec.Struct, frozen=True):
    """A piece of the file: what it holds, of which layers, and its sizes."""

    purpose: str
    layers: list[int]
    raw: int
    stored: int
    shuffle: int
    xxh64: str
    offset: int = -1
    """Where it is in the file, which only later generations say."""


class Session(msgspec.Struct, frozen=True):
    """Whose memory it is."""

    name: str
    n_tokens: int
    n_archived: int
    created: int
    saved: int
    last: int = -1


class Header(msgspec.Struct, frozen=True):
    """What a memory file says about itself."""

    format: str
    model: dict[str, Any]
    params: dict[str, Any]
    session: Session
    frames: list[Frame]
    build: str = ""


@dataclass(frozen=True)
class MemoryFile:
    """A memory file whose header is right; `verify` reads the rest."""

    path: Path
    header: Header
    """That of the newest generation, each frame with its offset."""
    generations: int = 1
    end: int = 0
    """Where that generation ends; what is behind was never completed."""

    def summary(self) -> dict[str, Any]:
        """Return the header as JSON has it, the frames summed up by purpose."""
        parts: dict[str, dict[str, int]] = {}
        for frame in self.header.frames:
            part = parts.setdefault(frame.purpose, {"frames": 0, "raw": 0, "stored": 0})
            part["frames"] += 1
            part["raw"] += frame.raw
            part["stored"] += frame.stored
        about: dict[str, Any] = msgspec.to_builtins(self.header)
        del about["frames"]
        known = {"file": self.path.name, "bytes": self.path.stat().st_size, "generations": self.generations}
        return known | about | {"parts": parts}

    def verify(self) -> None:
        """Read and decompress every frame. Raises `CorruptMemory`."""
        with self.path.open("rb") as file:
            for number, frame in enumerate(self.header.frames):
                file.seek(frame.offset)
                self._verify_frame(file, number, frame)

    def _verify_frame(self, file: BinaryIO, number: int, frame: Frame) -> None:
        import zstandard  # noqa: PLC0415 (slow to import, and the supervisor itself only reads headers)

        stored = file.read(frame.stored)
        if len(stored) != frame.stored:
            raise self._corrupt("the file ends too early")
        if xxhash.xxh64(stored).hexdigest() != frame.xxh64:
            raise self._corrupt(f"the checksum of frame {number} ({frame.purpose}) is wrong")
        try:
            known = zstandard.get_frame_parameters(stored)
            if known.content_size != frame.raw or not known.has_checksum:
                raise self._corrupt(f"frame {number} ({frame.purpose}) has another size than the header says")
            raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=frame.raw)
        except zstandard.ZstdError as error:
            raise self._corrupt(f"frame {number} ({frame.purpose}) cannot be decompressed: {error}") from error
        if len(raw) != frame.raw:
            raise self._corrupt(f"frame {number} ({frame.purpose}) is too short")

    def _corrupt(self, what: str) -> CorruptMemory:
        return CorruptMemory(f"{self.path.name}: corruption: {what}")


def read(path: Path) -> MemoryFile:
    """Read the newest header of a memory file and check it.

    Raises `CorruptMemory`, and OSError when it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header, end = _read_front(file, size)
            generations = 1
            while found := _read_generation(file, size, end):
                header, end = found
                generations += 1
        except CorruptMemory as error:
            raise CorruptMemory(f"{path.name}: corruption: {error}") from error
    return MemoryFile(path, header, generations, end)


def _read_front(file: BinaryIO, size: int) -> tuple[Header, int]:
    """Return the first header and where its generation ends; the frames are one behind the other."""
    fixed = file.read(FIXED.size)
    if len(fixed) < FIXED.size or not fixed.startswith(MAGIC):
        raise CorruptMemory("this is no memory file")
    _, version, length = FIXED.unpack(fixed)
    if version != VERSION:
        raise CorruptMemory(f"version {version} of the format is unknown")
    if length > HEADER_MAX or FIXED.size + length + 8 > size:
        raise CorruptMemory("the header is longer than the file")
    text = file.read(length)
    checksum = file.read(8)
    if xxhash.xxh64(fixed + text).intdigest().to_bytes(8, "little") != checksum:
        raise CorruptMemory("the checksum of the header is wrong")
    header = _parse(text, size)
    end = FIXED.size + length + 8
    frames = []
    for frame in header.frames:
        frames.append(msgspec.structs.replace(frame, offset=end))
        end += frame.stored
    if end > size:
        raise CorruptMemory(f"the file has {size} bytes instead of {end}")
    return msgspec.structs.replace(header, frames=frames), end


def _read_generation(file: BinaryIO, size: int, start: int) -> tuple[Header, int] | None:
    """Return the header of the generation that begins at `start`, and where that ends; None when there is none."""
    if start == size:
        return None
    file.seek(start)
    record = file.read(RECORD.size)
    if record == bytes(RECORD.size):
        return None  # it was never completed
    wrong = CorruptMemory(f"behind the first {start} bytes, the file is damaged")
    if len(record) < RECORD.size or not record.startswith(MORE):
        raise wrong
    _, frames, length, text_hash, own_hash = RECORD.unpack(record)
    begin, end = start + RECORD.size + frames, start + RECORD.size + frames + length
    if xxhash.xxh64(record[:-8]).intdigest() != own_hash or end > size or length > HEADER_MAX:
        raise wrong
    file.seek(begin)
    text = file.read(length)
    if xxhash.xxh64(text).intdigest() != text_hash:
        raise CorruptMemory("the checksum of the header is wrong")
    header = _parse(text, size)
    if any(frame.offset < 0 or frame.offset + frame.stored > begin for frame in header.frames):
        raise CorruptMemory("a frame is not in the file")
    return header, end


def _parse(text: bytes, size: int) -> Header:
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptMemory(f"the header cannot be understood: {error}") from error
    for frame in header.frames:
        if not (0 <= frame.raw <= FRAME_MAX and 0 <= frame.stored <= size):
            raise CorruptMemory("a frame is larger than allowed")
    if 4 * header.session.n_tokens != sum(frame.raw for frame in header.frames if frame.purpose == "tokens"):
        raise CorruptMemory("the number of tokens is wrong")
    return header


def find(folder: Path) -> list[Path]:
    """Return the memory files of a folder, without backups."""
    return sorted(path for path in folder.glob("*.atlas") if path.is_file())


def find_below(folder: Path) -> list[Path]:
    """Return the memory files of a folder and the folders in it, without backups."""
    return sorted(path for path in folder.rglob("*.atlas") if path.is_file())


def backups(path: Path) -> list[Path]:
    """Return the backups of a memory file, newest first."""
    pattern = re.compile(re.escape(path.stem) + r"_(\d{1,15})\.atlas\.bak")
    found = [(int(match[1]), one) for one in path.parent.glob("*.atlas.bak") if (match := pattern.fullmatch(one.name))]
    return [one for _, one in sorted(found, reverse=True)]
