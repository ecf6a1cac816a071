"""What an answer took, from answers as llama-server b11434 writes them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.usage import EDGE, Meter

TIMINGS = {"cache_n": 7, "prompt_n": 20, "prompt_ms": 12.5, "predicted_n": 8, "predicted_ms": 30.25}
OPENAI = {
    "completion_tokens": 8,
    "prompt_tokens": 30,
    "total_tokens": 38,
    "prompt_tokens_details": {"cached_tokens": 5},
}


def metered(pieces: list[str], path: str = "/v1/x", asked: int = 400, *, stream: bool = False, end: bool = True) -> int:
    got: list[bytes] = []

    def write(data: bytes, last: bool) -> bool:
        got.append(data)
        return not last

    meter = Meter(write, is_stream=stream)
    for number, piece in enumerate(pieces, 1):
        last = end and number == len(pieces)
        assert meter.send(piece.encode(), last) is not last
    assert b"".join(got) == "".join(pieces).encode()
    return meter.tokens(path, asked)


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def events(*values: object) -> list[str]:
    return [f"data: {value if isinstance(value, str) else compact(value)}\n\n" for value in values]


TOKEN = {"choices": [{"index": 0, "delta": {"content": 'a "usage":{"total_tokens":0} data: '}}]}
ANTHROPIC_START = {
    "type": "message_start",
    "message": {"usage": {"cache_read_input_tokens": 4, "input_tokens": 26, "output_tokens": 0}},
}
ANTHROPIC_END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 8}}


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"choices": [], "usage": OPENAI, "id": "x", "timings": TIMINGS}, 38),
        ({"content": "x" * 9000, "prompt": "p" * 9000, "timings": TIMINGS, "completion_probabilities": [0] * 9000}, 35),
        ({"usage": {"prompt_tokens": 12, "total_tokens": 12}, "data": [0.123456] * 20_000}, 12),
        ({"usage": {"cache_read_input_tokens": 4, "input_tokens": 26, "output_tokens": 8}}, 38),
        ({"usage": {"input_tokens": 12, "output_tokens": 0}}, 12),
        ({"content": [{"text": json.dumps({"usage": {"total_tokens": 999}})}], "usage": OPENAI}, 38),
        ([{"content": "a", "timings": TIMINGS}, {"content": "b", "timings": TIMINGS}], 70),
        ({"tokens": [1, 2, 3]}, 0),
    ],
    ids=["chat", "native", "embeddings", "anthropic", "decision", "text like usage", "several prompts", "tokenize"],
)
@pytest.mark.parametrize("piece", [7, 1000, 1 << 20])
def test_a_whole_answer(answer, tokens, piece):
    for text in (compact(answer), json.dumps(answer)):
        assert metered([text[at : at + piece] for at in range(0, len(text), piece)]) == tokens


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        (events(*[TOKEN] * 8, {"choices": [], "usage": OPENAI, "timings": TIMINGS}, "[DONE]"), 38),
        (events(*[TOKEN] * 8, {"choices": [{"finish_reason": "stop"}], "timings": TIMINGS}, "[DONE]"), 35),
        (events(*[{**TOKEN, "timings": {**TIMINGS, "predicted_n": n}} for n in range(1, 9)], "[DONE]"), 35),
        (events(ANTHROPIC_START, *[TOKEN] * 8, ANTHROPIC_END, {"type": "message_stop"}), 38),
        (events(ANTHROPIC_START, *[TOKEN] * 300, ANTHROPIC_END, {"type": "message_stop"}), 303),
        (events(*[TOKEN] * 8, {"type": "response.completed", "response": {"output": [], "usage": OPENAI}}), 38),
        (events(*[TOKEN] * 200, {"timings": TIMINGS}), 201),
    ],
    ids=["usage", "timings", "timings per token", "anthropic", "anthropic, long", "responses", "several prompts"],
)
def test_a_stream(pieces, tokens):
    assert metered(pieces, stream=True) == tokens
    assert metered(["".join(pieces)], stream=True) == tokens
    assert metered([*pieces, ""], stream=True) == tokens


def test_what_does_not_tell_is_estimated():
    text = compact({"content": "x" * 4000})
    assert metered([text], "/completion") == 100 + len(text) // 4
    assert metered([text], "/embedding") == 100
    assert metered([text], "/tokenize") == 0
    assert metered(events(*[TOKEN] * 8), stream=True) == 108


def test_what_breaks_off_is_estimated():
    assert metered(["{"], end=False) == 100
    assert metered([], end=False) == 100
    assert metered(events(*[TOKEN] * 8), stream=True, end=False) == 108
    assert metered(events({"timings": TIMINGS}), stream=True, end=False) == 101


def test_a_huge_answer_is_not_kept():
    usage = compact({"data": [0], "usage": OPENAI})
    assert metered(["x" * (1 << 20)] * 20 + [usage]) == 38


@given(st.lists(st.binary(max_size=200)), st.booleans(), st.booleans(), st.binary(max_size=EDGE))
def test_no_answer_is_too_strange(pieces, stream, end, more):
    meter = Meter(lambda data, last: True, is_stream=stream)
    for piece in [*pieces, b'"usage":' + more, b'data: {"timings":{"prompt_n":' + more]:
        meter.send(piece, False)
    meter.send(b"", end)
    assert meter.tokens("/completion", 0) >= 0
