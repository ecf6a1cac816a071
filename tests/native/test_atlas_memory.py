"""Memory that survives on the real server: sessions, their files, and what happens when those are bad."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard

from supervisor import atlas_file

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "tests" / "data" / "text.txt").read_text()


TYPES = {"f16": ["--atlas-type-k", "f16", "--atlas-type-v", "f16"], "q8_0": []}
"""Flags for the type of the archive."""

WAITS = 4 * 4 + 3 * 8
"""Bytes of the counters before those of waiting queries, beside 36 a layer."""

KINDS = ("tokens", "counters", "cells", "keys", "values", "scores")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "memory"
    made.mkdir()
    return made


def sections(folder: Path, *args: str, slots: int = 1, context: int = 512) -> dict[str, Any]:
    own = ["--parallel", str(slots), "--atlas-memory-dir", str(folder), *args]
    return {
        "atlas": {"enabled": "on", "archive_max_mb": 512},
        "performance": {"context_size": context * slots, "threads": 1},
        "models": {"overrides": {"small": {"args": own}}},
    }


async def complete(running, prompt: str, tokens: int = 8, **atlas: Any):
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    return await running.json("POST", "/completion", body | ({"atlas": atlas} if atlas else {}))


async def restart(running) -> None:
    """Stop the child; the next request starts it again."""
    status, _ = await running.json("POST", "/models/unload", {"model": "small"})
    assert status == 200
    while await running.state("small") not in ("unloaded", "absent"):
        pass


@pytest.mark.parametrize(
    "types", [[], ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"], ["-fa", "off"], [*TYPES["f16"], "-fa", "on"]]
)
async def test_a_session_goes_on_after_a_restart_as_without_one(start, smollm2, folder, types):
    running = await start({"small": smollm2}, **sections(folder, *types))
    text = TEXT[:4000]
    question = "\n\nIn short, the above says that"

    status, read = await complete(running, text, tokens=1, memory_file="book")
    assert status == 200
    assert read["atlas"]["memory_file"] == "book"
    assert read["atlas"]["tokens_archived"] > 512
    assert read["atlas"]["saved"]["bytes"] == (folder / "book.atlas").stat().st_size
    assert (folder / "book.atlas").stat().st_mode & 0o077 == 0  # also where others may enter the folder
    await complete(running, "", tokens=1)  # another request takes the slot
    status, first = await complete(running, question, tokens=64, memory_file="book", save_memory=False)
    assert status == 200
    assert first["timings"]["prompt_n"] < 32

    # the state as it was after the text, without what the question added
    await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"})
    await restart(running)
    status, second = await complete(running, question, tokens=64, memory_file="book")
    assert status == 200
    assert second["timings"]["prompt_n"] < 32
    assert second["tokens"] == first["tokens"]

    # and as without any file
    await running.json("DELETE", "/v1/atlas/memory?file=book")
    _, read = await complete(running, text, tokens=1, memory_file="fresh")
    _, third = await complete(running, question, tokens=64, memory_file="fresh")
    assert third["timings"]["prompt_n"] < 32
    assert third["tokens"] == first["tokens"]

    atlas_file.read(folder / "fresh.atlas").verify()


async def test_sessions_are_isolated_and_pushed_out_of_the_slot(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    prompts = {"a": "My name is Ada and I like", "b": "The capital of France is"}
    alone = {}
    for name, prompt in prompts.items():
        _, answer = await complete(running, prompt, memory_file=f"alone-{name}")
        _, more = await complete(running, " and then", memory_file=f"alone-{name}")
        alone[name] = answer["tokens"], more["tokens"]
    mixed: dict[str, list[Any]] = {"a": [], "b": []}
    for name, prompt in prompts.items():
        _, answer = await complete(running, prompt, memory_file=name)
        mixed[name].append(answer["tokens"])
    for name in prompts:
        _, answer = await complete(running, " and then", memory_file=name)
        mixed[name].append(answer["tokens"])
    assert {name: tuple(both) for name, both in mixed.items()} == alone

    # a request without a session starts from nothing, although its prompt begins as a session does
    _, plain = await complete(running, prompts["b"])
    assert plain["timings"]["cache_n"] == 0
    assert plain["atlas"]["memory_file"] is None


async def test_a_session_that_is_sent_again_is_not_appended(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    messages = [{"role": "user", "content": "Name three colours."}]
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, "atlas": {"memory_file": "chat.atlas"}}
    _, one = await running.json("POST", "/v1/chat/completions", body)
    tokens = one["atlas"]["tokens_seen"]
    messages += [one["choices"][0]["message"], {"role": "user", "content": "Name another."}]
    _, two = await running.json("POST", "/v1/chat/completions", body)
    assert two["usage"]["prompt_tokens"] < 2 * tokens
    assert two["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens - 1
    # the same prompt as the first: a beginning of the session; forced, it is appended
    body["messages"] = messages[:1]
    _, again = await running.json("POST", "/v1/chat/completions", body)
    assert again["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    body["atlas"] = {"memory_file": "chat", "append": True}
    _, more = await running.json("POST", "/v1/chat/completions", body)
    assert more["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"] + tokens - 4


async def test_routes(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, slots=2))
    status, answer = await running.json("GET", "/v1/atlas/memory?model=small")
    assert (status, answer) == (200, {"files": []})
    await complete(running, "Once upon a time", memory_file="tale", save_memory=False)
    status, answer = await running.json("GET", "/v1/atlas/status")
    assert status == 200
    assert [slot["memory_file"] for slot in answer["slots"] if slot["memory_file"]] == ["tale"]
    assert not (folder / "tale.atlas").exists()

    status, saved = await running.json("POST", "/v1/atlas/memory/save", {"filename": "tale"})
    assert status == 200
    status, info = await running.json("GET", "/v1/atlas/memory/info?file=tale")
    assert status == 200
    assert info["compatible"] and info["n_tokens"] == saved["n_tokens"] and info["bytes"] == saved["bytes"]
    status, loaded = await running.json("POST", "/v1/atlas/memory/load", {"filename": "tale", "slot": 1})
    assert (status, loaded["slot"], loaded["n_tokens"]) == (200, 1, saved["n_tokens"])
    status, _ = await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "soft", "slot": 1})
    assert status == 200
    status, answer = await running.json("DELETE", "/v1/atlas/memory?file=tale")
    assert (status, answer["deleted"]) == (200, 1)
    assert not (folder / "tale.atlas").exists()

    for method, path, body, expected in [
        ("GET", "/v1/atlas/memory/info?file=tale", None, 404),
        ("POST", "/v1/atlas/memory/load", {"filename": "tale"}, 404),
        ("POST", "/v1/atlas/memory/load", {"filename": "../tale"}, 400),
        ("POST", "/v1/atlas/memory/load", {"filename": "/etc/passwd"}, 400),
        ("POST", "/v1/atlas/memory/load", {}, 400),
        ("POST", "/v1/atlas/memory/save", {"filename": ".tale"}, 400),
        ("POST", "/v1/atlas/memory/save", {"filename": "a" * 129}, 400),
        ("POST", "/v1/atlas/memory/save", {"filename": 1}, 400),
        ("POST", "/v1/atlas/memory/save", {"filename": "x", "slot": "1"}, 400),
        ("POST", "/v1/atlas/memory/save", {"filename": "x", "slot": 9}, 404),
        ("DELETE", "/v1/atlas/memory", None, 400),
        ("DELETE", "/v1/atlas/memory/reset", {"reset_type": "none"}, 400),
    ]:
        status, answer = await running.json(method, path, body)
        assert status == expected, (path, body, answer)
        assert answer["error"]["code"] == expected


async def test_wrong_fields(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    for atlas, param in [
        ([], "atlas"),
        ({"enabled": 1}, "atlas.enabled"),
        ({"memory_file": "../x"}, "atlas.memory_file"),
        ({"memory_file": ""}, "atlas.memory_file"),
        ({"memory_file": "a/b"}, "atlas.memory_file"),
        ({"memory_file": 7}, "atlas.memory_file"),
        ({"memory_file": "x", "reset": "all"}, "atlas.reset"),
        ({"memory_file": "x", "save_memory": "yes"}, "atlas.save_memory"),
        ({"reset": "hard"}, "atlas.memory_file"),
        ({"memory": "x"}, "atlas.memory"),
    ]:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "atlas": atlas}
        status, answer = await running.json("POST", "/v1/chat/completions", body)
        assert status == 400
        error = answer["error"]
        assert (error["type"], error["param"], error["code"]) == ("atlas_parameter_error", param, 400)


async def test_without_memory_the_context_is_the_limit(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    status, answer = await complete(running, TEXT[:3000], enabled=False)
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"
    status, answer = await complete(running, TEXT[:1200], tokens=600, enabled=False)
    assert status == 200
    assert answer["stop_type"] == "limit" and answer["atlas"]["tokens_archived"] == 0
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] == 512


def with_header(data: bytes, change) -> bytes:
    """Return a memory file with another header, its checksum right."""
    size = struct.unpack_from("<I", data, 12)[0]
    header = change(data[16 : 16 + size])
    head = data[:12] + struct.pack("<I", len(header)) + header
    return head + xxhash.xxh64(head).intdigest().to_bytes(8, "little") + data[24 + size :]


async def test_bad_files(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, "--atlas-memory-backup-count", "1"))
    await complete(running, TEXT[:1800], memory_file="good")
    await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"})
    good = (folder / "good.atlas").read_bytes()
    rng = random.Random(1)

    bad = [b"", b"ATLASMEM", good[:-1], b"ATLASMEN" + good[8:], good[:8] + b"\2" + good[9:]]
    bad += [good[: len(good) * i // 40] for i in range(1, 40)]
    bad += [good[:12] + struct.pack("<I", size) + good[16:] for size in (0, 1 << 24, 0xFFFFFFFF)]
    for _ in range(60):
        at = rng.randrange(len(good))
        bad.append(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
    for old, new in [
        (b'"n_tokens":', b'"n_tokens":9'),
        (b'"n_tokens":', b'"n_tokens":-'),
        (b'"raw":', b'"raw":99999999999'),
        (b'"stored":', b'"stored":1'),
        (b'"frames":[', b'"frames":[[],'),
        (b'"session":', b'"sessions":'),
        (b"{", b"["),
    ]:
        bad.append(with_header(good, lambda header, old=old, new=new: header.replace(old, new)))
    for data in bad:
        (folder / "bad.atlas").write_bytes(data)
        with pytest.raises(atlas_file.CorruptMemory):
            atlas_file.read(folder / "bad.atlas").verify()
        status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "bad"})
        assert status == 400, answer
        assert "corruption" in answer["error"]["message"]
    status, answer = await complete(running, "Hello", memory_file="bad")
    assert status == 400 and "corruption" in answer["error"]["message"]

    other = with_header(good, lambda header: header.replace(b'"hash":"', b'"hash":"0'))
    (folder / "other.atlas").write_bytes(other)
    status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "other"})
    assert status == 409
    _, files = await running.json("GET", "/v1/atlas/memory")
    compatible = {one["file"]: one["compatible"] for one in files["files"]}
    assert compatible == {"bad.atlas": False, "good.atlas": True, "other.atlas": False}

    # the newest good backup takes the place of a file that is corrupt
    await complete(running, " and so", memory_file="good")
    (folder / "good.atlas").write_bytes(b"nothing")
    await running.json("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"})
    status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "good"})
    assert status == 200
    assert answer["backup"].startswith("good_")
    assert (folder / answer["backup"]).read_bytes() == good


def frames_of(data: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Return the frames of a memory file: what its table says, and the stored bytes."""
    size = struct.unpack_from("<I", data, 12)[0]
    found, at = [], 24 + size
    for frame in json.loads(data[16 : 16 + size])["frames"]:
        found.append((frame, data[at : at + frame["stored"]]))
        at += frame["stored"]
    return found


def counters_of(data: bytes) -> int:
    """Return which frame has the counters."""
    return next(n for n, (frame, _) in enumerate(frames_of(data)) if frame["purpose"] == "counters")


def with_raw(data: bytes, number: int, change) -> bytes:
    """Return a memory file with other content in one frame, all checksums right."""
    size = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[16 : 16 + size])
    frames = frames_of(data)
    raw = change(bytearray(zstandard.decompress(frames[number][1])))
    new = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(raw))
    header["frames"][number] |= {"raw": len(raw), "stored": len(new), "xxh64": xxhash.xxh64(new).hexdigest()}
    stored = [new if n == number else old for n, (_, old) in enumerate(frames)]
    return with_header(data[: 24 + size] + b"".join(stored), lambda _: json.dumps(header).encode())


async def test_hostile_states_with_right_checksums(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, TEXT[:2400], memory_file="good")
    good = (folder / "good.atlas").read_bytes()
    size = struct.unpack_from("<I", good, 12)[0]
    frames = json.loads(good[16 : 16 + size])["frames"]
    rng = random.Random(2)

    def hostile(raw: bytearray) -> bytearray:
        how = rng.randrange(6)
        if how == 0:
            return raw[: rng.randrange(len(raw))]
        if how == 1:
            return raw + raw[:64]
        at = rng.randrange(max(1, len(raw) - 8))
        word = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", rng.randbytes(4)][how - 2]
        raw[at : at + 4] = word
        return raw

    numbers = {kind: [n for n, frame in enumerate(frames) if frame["purpose"] == kind] for kind in KINDS}
    results = []
    for _ in range(150):
        number = rng.choice(numbers[rng.choice(KINDS)])
        (folder / "hostile.atlas").write_bytes(with_raw(good, number, hostile))
        status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "hostile"})
        assert status in (200, 400, 409), answer
        results.append(status)
        if status == 200:  # the change was harmless: the session goes on
            status, _ = await complete(running, " so", tokens=2, memory_file="hostile", save_memory=False)
            assert status == 200
    assert results.count(400) > 30
    _, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "good"})
    assert answer["n_tokens"] > 0


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("purpose", ["keys", "values"])
async def test_infinite_values_are_refused(start, smollm2, folder, purpose, type):
    """One of them would make every later answer NaN. An F16 frame has the high bytes behind the low ones."""
    running = await start({"small": smollm2}, **sections(folder, *TYPES[type]))
    await complete(running, TEXT[:2400], memory_file="good")
    good = (folder / "good.atlas").read_bytes()
    frames = json.loads(good[16 : 16 + struct.unpack_from("<I", good, 12)[0]])["frames"]
    number, frame = next((n, frame) for n, frame in enumerate(frames) if frame["purpose"] == purpose)
    assert frame["shuffle"] == (2 if type == "f16" else 1)

    def infinite(raw: bytearray) -> bytearray:
        low, high = (100, len(raw) // 2 + 100) if type == "f16" else (340, 341)  # the scale of the eleventh block
        raw[low], raw[high] = 0, 0x7C
        return raw

    (folder / "bad.atlas").write_bytes(with_raw(good, number, infinite))
    status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "bad"})
    assert status == 400 and "no model computes" in answer["error"]["message"], answer


async def test_a_session_with_a_shorter_answer_is_what_is_loaded(start, smollm2, folder):
    """The last look at the archive was then later than the last token."""
    running = await start({"small": smollm2}, **sections(folder))
    for tokens in (32, 1):
        status, answer = await complete(running, TEXT[:4000], tokens=tokens, memory_file="again")
        assert status == 200, answer
    await restart(running)
    status, loaded = await running.json("POST", "/v1/atlas/memory/load", {"filename": "again"})
    assert status == 200, loaded
    assert loaded["n_tokens"] == answer["atlas"]["saved"]["n_tokens"]


async def test_a_session_that_takes_the_room_of_another_is_what_it_was(start, smollm2, folder):
    """The archive of the session that has to leave the slot is filled anew."""
    running = await start({"small": smollm2}, **sections(folder))
    for name, text in (("one", TEXT[:4000]), ("two", TEXT[3000:7000])):
        status, answer = await complete(running, text, tokens=1, memory_file=name)
        assert status == 200, answer
    file = folder / "one.atlas"
    before = file.read_bytes()

    async def ask() -> list[int]:
        status, answer = await complete(running, " and so", tokens=32, memory_file="one")
        assert status == 200 and answer["timings"]["prompt_n"] < 32, answer
        tokens: list[int] = answer["tokens"]
        return tokens

    in_the_others = await ask()
    await restart(running)
    file.write_bytes(before)
    assert await ask() == in_the_others


async def test_a_file_goes_to_a_server_with_an_archive_of_another_type(start, smollm2, folder):
    config = sections(folder)
    args = config["models"]["overrides"]["small"]["args"]
    config["models"]["overrides"] = {name: {"args": args + types} for name, types in TYPES.items()}
    running = await start(dict.fromkeys(TYPES, smollm2), **config)

    async def ask(model: str, prompt: str, tokens: int) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": 1}
        atlas = {"memory_file": "book", "save_memory": tokens == 1}
        status, answer = await running.json("POST", "/completion", body | {"atlas": atlas})
        assert status == 200, answer
        return answer

    for model, other in (("f16", "q8_0"), ("q8_0", "f16")):
        await ask(model, TEXT[:4000], 1)
        expected, answer = [await ask(name, "\n\nIn short, the above says that", 2) for name in (model, other)]
        assert answer["timings"]["prompt_n"] < 32
        for here, there in zip(*(x["completion_probabilities"] for x in (answer, expected)), strict=True):
            assert here["id"] == there["id"]
            assert here["logprob"] == pytest.approx(there["logprob"], abs=0.2)  # the types differ by 0.06
        assert (answer["atlas"]["memory_bytes"] < expected["atlas"]["memory_bytes"]) == (model == "f16")
        await running.json("DELETE", f"/v1/atlas/memory?file=book&model={model}")


@pytest.mark.parametrize("version", [3, 4])
async def test_a_file_of_an_older_version(start, smollm2, folder, version):
    # every 16 tokens all layers fill their cells, and score what has waited
    running = await start({"small": smollm2}, **sections(folder, *TYPES["f16"], "--atlas-refresh", "16"))
    await complete(running, TEXT[:4000], tokens=1, memory_file="new")
    file = folder / "new.atlas"
    good = file.read_bytes()
    number = counters_of(good)

    def older(raw: bytearray) -> bytes:
        now, layers = struct.unpack_from("<2i", raw)
        assert now == 5
        waits = WAITS + 36 * layers
        assert raw[waits : waits + 8 * layers] == layers * raw[waits : waits + 8]
        types = raw[8 : 8 + 36 * layers]
        if version < 4:  # the archive had the cache's types
            types = b"".join(types[i * 36 : i * 36 + 28] for i in range(layers))
        return (
            struct.pack("<2i", version, layers) + types + raw[8 + 36 * layers : waits + 8] + raw[waits + 8 * layers :]
        )

    (folder / "old.atlas").write_bytes(with_raw(good, number, older))
    answers = [await complete(running, " and so", tokens=32, memory_file=name) for name in ("new", "old")]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["tokens"] == answers[1][1]["tokens"]
    assert answers[1][1]["timings"]["prompt_n"] < 32

    wrong = with_raw(good, number, lambda raw: raw[:36] + struct.pack("<i", 39) + raw[40:])
    (folder / "bad.atlas").write_bytes(wrong)
    status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "bad"})
    assert status == 400 and "unknown type" in answer["error"]["message"], answer


async def test_each_layer_scores_its_queries_in_its_turn(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, TEXT[:4000], tokens=24, memory_file="turns")
    data = (folder / "turns.atlas").read_bytes()
    raw = zstandard.decompress(frames_of(data)[counters_of(data)][1])
    layers = struct.unpack_from("<i", raw, 4)[0]
    waits = struct.unpack_from(f"<{layers}q", raw, WAITS + 36 * layers)
    # queries are scored 16 together; no token has to wait for more than two layers of the thirty
    assert sorted(set(waits)) == list(range(16)) and max(waits.count(n) for n in waits) == 2, waits


async def test_the_memory_of_the_last_request_persists(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder, "--atlas-memory-persist"))
    _, answer = await complete(running, TEXT[:4000])
    await restart(running)
    assert (folder / "small_memory.atlas").exists()
    _, again = await complete(running, TEXT[:4000] + answer["content"] + " and")
    assert again["timings"]["prompt_n"] < 32


async def test_a_hostile_number_of_tokens_is_refused_at_once(start, smollm2, folder):
    running = await start({"small": smollm2}, **sections(folder))
    await complete(running, "Once upon a time", memory_file="good")
    good = (folder / "good.atlas").read_bytes()
    size = struct.unpack_from("<I", good, 12)[0]
    header = json.loads(good[16 : 16 + size])
    number = counters_of(good)
    right = struct.pack("<q", header["session"]["n_tokens"])
    for wrong in (-(1 << 63), -1, 0, 1 << 23, 1 << 40, (1 << 63) - 1):
        bad = with_raw(good, number, lambda raw, wrong=wrong: raw.replace(right, struct.pack("<q", wrong), 1))
        (folder / "bad.atlas").write_bytes(bad)
        status, answer = await running.json("POST", "/v1/atlas/memory/load", {"filename": "bad"})
        assert status == 400 and "number of tokens" in answer["error"]["message"], answer
