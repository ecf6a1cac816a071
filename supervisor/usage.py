"""How many tokens did a request take? Read from what llama-server says in its answer, as it passes."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from supervisor.upstream import Write

EDGE: Final = 4096
"""Bytes looked at from the beginning and the end of a stream; its last events tell what it took."""

LARGEST: Final = 16 << 20
"""Bytes up to which an answer that is no stream is looked at as a whole."""

SPAN: Final = 512
"""Bytes after `"usage":` in which its numbers are."""

BYTES_PER_TOKEN: Final = 4
"""What a token of text takes, about; for answers that do not tell, or were broken off before they did."""

_SILENT_TEXT: Final = frozenset(("/completion", "/completions", "/infill"))
"""Routes whose answer need not tell (`response_fields`) and is text."""

_SILENT: Final = frozenset(("/embedding", "/embeddings", "/rerank", "/reranking", "/v1/rerank", "/v1/reranking"))
"""Routes whose answer need not tell and is no text."""

_NUMBER = re.compile(rb'"(\w+)":\s?(\d{1,12})(?!\d)')

_TIMINGS = re.compile(
    rb'"timings":\s?\{"cache_n":\s?(\d{1,12}),\s?"prompt_n":\s?(\d{1,12}),[^{}]{1,300}"predicted_n":\s?(\d{1,12})'
)
"""What nearly every answer has. It is never part of a text that a model wrote, as in `_objects`."""

Numbers = dict[bytes, int]


class Tokens(NamedTuple):
    """What an answer took: tokens of the prompt that were computed, those taken from the cache, and generated ones."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


def told(head: bytes, tail: bytes) -> Tokens:
    """Return what an answer tells at its beginning or its end; nothing where it does not.

    For the metrics: it must cost next to nothing, so what stands in the middle of a long answer is not found.
    """
    if timings := _TIMINGS.search(tail):
        return Tokens(int(timings[2]), int(timings[1]), int(timings[3]))
    for text, name in ((tail, b'"timings":'), (head, b'"timings":'), (tail, b'"usage":'), (head, b'"usage":')):
        if name in text and (found := _objects(text, name)):
            numbers = found[-1]
            if b"output_tokens" in numbers and b"input_tokens" not in numbers:  # see `_of_stream`
                numbers = next(iter(_objects(head, name)), {}) | numbers
            return _parts(numbers)
    return Tokens()


def _parts(numbers: Numbers) -> Tokens:
    """Return the tokens in a `timings` or `usage` object; OpenAI counts cached ones in the prompt, others do not."""
    get = numbers.get
    if b"prompt_tokens" in numbers:
        cached = get(b"cached_tokens", 0)
        return Tokens(max(0, numbers[b"prompt_tokens"] - cached), cached, get(b"completion_tokens", 0))
    if b"output_tokens" in numbers:
        if b"total_tokens" in numbers:  # of /v1/responses
            cached = get(b"cached_tokens", 0)
            return Tokens(max(0, get(b"input_tokens", 0) - cached), cached, numbers[b"output_tokens"])
        return Tokens(get(b"input_tokens", 0), get(b"cache_read_input_tokens", 0), numbers[b"output_tokens"])
    return Tokens(get(b"prompt_n", 0), get(b"cache_n", 0), get(b"predicted_n", 0))


class Meter:
    """Counts the tokens of one exchange: the answer goes through `send` to `write`."""

    def __init__(self, write: Write, *, is_stream: bool) -> None:
        self._write = write
        self._is_stream = is_stream
        self._pieces: list[bytes] = []
        self._size = 0
        self._head = b""
        self._tail = b""
        self._events = 0
        self._complete = False

    def send(self, data: bytes, last: bool) -> bool:
        """Look at a piece of the answer and hand it on."""
        self._size += len(data)
        self._complete = last
        if self._is_stream:
            if len(self._head) < EDGE:
                self._head += data[: EDGE - len(self._head)]
            self._tail = data[-EDGE:] if len(data) >= EDGE else (self._tail + data)[-EDGE:]
            self._events += data.count(b"\ndata: ") + data.startswith(b"data: ")
        else:
            self._pieces.append(data)
            if self._size > LARGEST:
                del self._pieces[1:-1]
        return self._write(data, last)

    def tokens(self, path: str, request_bytes: int) -> int:
        """Return what the request took; an estimate if the answer does not tell, or was broken off.

        A stream that several prompts share tells of the last one only, so its events (a token each) count if they
        are more.
        """
        asked = request_bytes // BYTES_PER_TOKEN
        if self._is_stream:
            told = _of_stream(self._head, self._tail) if self._complete else None
            return self._events + asked if told is None else max(told, self._events)
        if not self._complete:
            return asked
        answer = b"".join(self._pieces)
        if found := _objects(answer, b'"usage":') or _objects(answer, b'"timings":'):
            return sum(map(_sum, found))  # several prompts have a list of answers
        if path in _SILENT_TEXT:
            return asked + self._size // BYTES_PER_TOKEN
        return asked if path in _SILENT else 0


def _of_stream(head: bytes, tail: bytes) -> int | None:
    """Return what a whole stream told, None if nothing."""
    found = _objects(tail, b'"usage":') or _objects(tail, b'"timings":')
    if not found:
        return None
    last = found[-1]
    if b"output_tokens" in last and b"input_tokens" not in last:  # Anthropic tells of the prompt at the beginning
        last = next(iter(_objects(head, b'"usage":')), {}) | last
    return _sum(last)


def _sum(numbers: Numbers) -> int:
    """Return the tokens in a `usage` object, OpenAI's or Anthropic's, or a `timings` object of llama-server."""
    if b"total_tokens" in numbers:
        return numbers[b"total_tokens"]
    if b"output_tokens" in numbers:
        names = [b"input_tokens", b"cache_read_input_tokens", b"output_tokens"]
    else:
        names = [b"prompt_n", b"cache_n", b"predicted_n"]
    return sum(numbers.get(name, 0) for name in names)


def _objects(text: bytes, name: bytes) -> list[Numbers]:
    """Return the numbers in each object that is called `name`.

    It is never part of a text that a model wrote: quotes in a JSON string have a backslash before them.
    """
    found = []
    at = text.find(name)
    while at >= 0:
        begin = at + len(name)
        at = text.find(name, begin)
        end = begin + SPAN if at < 0 else min(at, begin + SPAN)
        if numbers := {key: int(value) for key, value in _NUMBER.findall(text[begin:end])}:
            found.append(numbers)
    return found
