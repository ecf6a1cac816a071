"""The memory in plain NumPy, as docs/atlas.md describes it, for comparison with the engine in llama-server.

A decoder of the Llama family reads a text layer by layer, all tokens of it at once: what a layer's memory holds depends
on the keys, values and queries of that layer alone. No tiles, no threads, no quantized cache, no archive that forgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SINKS = 4
BLOCK = 16
CHUNK = 16
TOGETHER = 16
"""Queries that are counted together, for the survivors, where they choose nothing."""
POOL = 4
"""Queries of a chunk whose mean is compared with a block."""
CANDIDATES = 2
"""Of stage 1, in units of the memory cells."""
CREDITS = (0.5, 0.25)
RECALLED = 0.5


def write_f32(source: Path, target: Path) -> None:
    """Copy a GGUF file with all weights in F32, so that the engine does not quantize what is multiplied with them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A GGUF file of architecture `llama`, its weights in F32."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def field(name: str) -> Any:
            return reader.fields[name].contents()

        self.layers: int = field("llama.block_count")
        self.heads: int = field("llama.attention.head_count")
        self.kv_heads: int = field("llama.attention.head_count_kv")
        self.epsilon: float = field("llama.attention.layer_norm_rms_epsilon")
        self.size: int = field("llama.embedding_length") // self.heads
        self.weights = {
            one.name: gguf.dequantize(one.data, one.tensor_type).astype(np.float32) for one in reader.tensors
        }
        self.frequencies = field("llama.rope.freq_base") ** -(np.arange(0, self.size, 2) / self.size)

    def rotate(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """Rotate pairs of neighbours; x: [..., n, size], positions: [n]."""
        angle = positions[:, None] * self.frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def norm(self, x: Array, name: str) -> Array:
        """RMS norm; x: [n, embedding]."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[f"{name}.weight"]

    def losses(self, tokens: list[int], context: int, cells: int, first: int, refresh: int = 1) -> Array:
        """Return the negative log-likelihood of each token behind `first`, from where on tokens are read one by one.

        Of these every `refresh`-th chooses what is in the cells.
        """
        x = self.weights["token_embd.weight"][tokens]
        for number in range(self.layers):
            reading = list(steps(len(tokens), first, context, cells, refresh, number * TOGETHER // self.layers))

            def times(y: Array, name: str, number: int = number) -> Array:
                return y @ self.weights[f"blk.{number}.{name}.weight"].T

            y = self.norm(x, f"blk.{number}.attn_norm")
            # [heads, n, size]
            query, key, value = (
                times(y, f"attn_{name}").reshape(len(tokens), -1, self.size).swapaxes(0, 1) for name in "qkv"
            )
            shared = self.heads // self.kv_heads
            seen = [
                Head(self, query[g * shared : (g + 1) * shared], key[g], value[g], cells, context).read(reading)
                for g in range(self.kv_heads)
            ]
            x = x + times(np.concatenate(seen).swapaxes(0, 1).reshape(len(tokens), -1), "attn_output")
            y = self.norm(x, f"blk.{number}.ffn_norm")
            gate = times(y, "ffn_gate")
            x = x + times(gate / (1 + np.exp(-gate)) * times(y, "ffn_up"), "ffn_down")
        logits = self.norm(x[first:-1], "output_norm") @ self.weights["token_embd.weight"].T
        logits -= logits.max(-1, keepdims=True)
        right = np.take_along_axis(logits, np.array(tokens[first + 1 :])[:, None], -1)[:, 0]
        return np.log(np.exp(logits).sum(-1)) - right


@dataclass(frozen=True)
class Step:
    """Tokens [start, end) that are read together."""

    start: int
    end: int
    window: int
    """The first token of the window, 0 while all of them are in the context."""
    waiting: int
    """Of the tokens before them: whose queries have not been counted."""
    counts: bool
    """The queries are counted."""
    alone: bool
    """One token of an answer."""
    chooses: bool
    """It fills the cells."""


def steps(total: int, first: int, context: int, cells: int, refresh: int, turn: int) -> Iterator[Step]:
    """Yield how a layer reads a text: `first` tokens in chunks, as a prompt, the others one by one, as an answer.

    The tokens of an answer are counted TOGETHER when `turn` tokens less than a multiple of that have been read, which
    is another number for each layer.
    """
    done = window = waiting = 0
    while done < total:
        n = min(CHUNK, first - done) if done < first else 1
        used = done - window + SINKS + cells if window else done
        slides = used >= context
        begins = slides and not window
        if slides:
            before = window or SINKS + cells
            window = before + -(-(used + n - context) // BLOCK) * BLOCK
        else:
            n = min(n, context - used)
        if n == 1:
            counts = begins or (done + n + turn) % TOGETHER == 0 or waiting + n >= TOGETHER
        else:
            counts = slides or waiting + n >= (1 if window else TOGETHER)
        alone = n == 1 and window > 0
        chooses = window > 0 and (slides or not alone or done % refresh == 0)
        yield Step(done, done + n, window, waiting, counts, alone, chooses)
        waiting = 0 if counts else waiting + n
        done += n


class Head:
    """A KV head of a layer: its cache and its memory."""

    def __init__(self, model: Model, query: Array, key: Array, value: Array, cells: int, context: int) -> None:
        """Take what the layer makes of all tokens, not rotated: query [shared, n, size], key and value [n, size]."""
        n = key.shape[0]
        scale = np.float32(model.size**-0.5)
        self.model, self.key, self.value = model, key, value
        self.query = model.rotate(query, np.arange(n)) * scale
        self.rotated = model.rotate(key, np.arange(n))
        # queries and keys are compared at one distance, whatever the true one is
        self.asking = model.rotate(query, np.full(n, max(1, (context - cells) // 2 - SINKS))) * scale
        whole = n // BLOCK * BLOCK - BLOCK  # the blocks begin behind the sinks
        self.means = key[SINKS : SINKS + whole].reshape(-1, BLOCK, model.size).mean(1)
        self.cells = cells
        self.got = np.zeros(n, np.float32)  # squared attention
        self.shown: list[int] = []  # the tokens in the memory cells
        self.survivors: list[int] = []

    def read(self, reading: list[Step]) -> Array:
        """Return the output of the attention, [shared, n, size]."""
        return np.concatenate([self._step(step) for step in reading], 1)

    def _step(self, step: Step) -> Array:
        if self.cells:
            self._remember(step)
        positions = np.arange(step.start, step.end)
        keys, values = self.rotated[step.window : step.end], self.value[step.window : step.end]
        places = np.arange(step.window, step.end)
        if step.window:
            kept = [*range(SINKS), *self.shown]
            before = np.arange(step.window - len(kept), step.window)  # where these sit
            keys = np.concatenate([self.model.rotate(self.key[kept], before), keys])
            values = np.concatenate([self.value[kept], values])
            places = np.concatenate([before, places])
        logits = self.query[:, positions] @ keys.T
        logits[:, places[None] > positions[:, None]] = -np.inf
        return softmax(logits) @ values

    def _remember(self, step: Step) -> None:
        """Count what the queries look at, and fill the cells."""
        relevance = None
        if step.counts:
            start = max(step.start - step.waiting, SINKS)
            size = (step.end - start) % TOGETHER
            while start < step.end:
                relevance = self._count(start, start + size, step.window) if size else None
                start, size = start + size, TOGETHER
            if step.window:
                age = step.end + 1 - np.arange(SINKS, step.window)
                self.survivors = [SINKS + i for i in top(self.got[SINKS : step.window] / age, self.cells)]
        if step.alone and step.chooses:
            query = self.asking[:, step.start]
            tokens = self._candidates(query, step.window)
            relevance = tokens, softmax(query @ self.key[tokens].T).sum(0)
        if step.chooses:
            assert relevance is not None
            self._choose(step.window, *relevance)

    def _count(self, start: int, end: int, window: int) -> tuple[list[int], Array]:
        """Count the attention of the queries [start, end); return what of the archive they look at, and how much."""
        query = self.asking[:, start:end]
        pooled = query
        if (end - start) % POOL == 0:
            pooled = query.reshape(query.shape[0], -1, POOL, self.model.size).mean(2)
        archived = self._candidates(pooled.reshape(-1, self.model.size), window)
        tokens = [*archived, *range(max(window, SINKS), end)]
        logits = query @ self.key[tokens].T
        logits[:, np.array(tokens)[None] > np.arange(start, end)[:, None]] = -np.inf
        mass = softmax(logits).reshape(-1, len(tokens))
        self.got[tokens] += (mass * mass).sum(0) / (query.shape[0] * BLOCK)
        mass = mass[:, : len(archived)]
        return archived, (mass / (mass.sum(1, keepdims=True) + 1e-20)).mean(0)  # each query counts the same

    def _candidates(self, query: Array, window: int) -> list[int]:
        """Stage 1: tokens of the best blocks, and those in the cells or in no whole block; query: [n, size]."""
        blocks = max(0, window - SINKS) // BLOCK
        n = CANDIDATES * self.cells // BLOCK
        if blocks <= n:
            return list(range(SINKS, window))
        best = top(credited(softmax(query @ self.means[:blocks].T).sum(0)), n)
        return sorted({*tokens_of(best), *self.shown, *range(SINKS + blocks * BLOCK, window)})

    def _choose(self, window: int, tokens: list[int], relevance: Array) -> None:
        blocks = (window - SINKS) // BLOCK
        score = np.zeros(blocks + 1, np.float32)
        np.add.at(score, (np.array(tokens) - SINKS) // BLOCK, relevance)
        score = credited(score[:blocks])  # the last one is not whole
        best = [block for block in top(score, int(RECALLED * self.cells / BLOCK + 0.5)) if score[block] > 0]
        chosen = tokens_of(best)
        recalled = set(chosen)
        others = [token for token in self.survivors if token not in recalled]
        self.shown = sorted([*chosen, *others[: self.cells - len(chosen)]])


def softmax(x: Array) -> Array:
    """Over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def top(x: Array, n: int) -> list[int]:
    """Return the indices of the n largest, the first of equals first."""
    return np.argsort(-x, kind="stable")[:n].tolist()


def tokens_of(blocks: list[int]) -> list[int]:
    """Return the tokens of blocks of the archive."""
    return [SINKS + block * BLOCK + i for block in blocks for i in range(BLOCK)]


def credited(x: Array) -> Array:
    """Give blocks a part of the score of the two before them: what follows a match is what the next tokens need."""
    res = x.copy()
    for back, share in enumerate(CREDITS, 1):
        res[back:] += np.float32(share) * x[:-back]
    return res
