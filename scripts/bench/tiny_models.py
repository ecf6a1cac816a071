"""Make the models that llama-server's test suite wants, with random weights, from the vocabularies in its source.

The suite downloads small models; these have the same kinds and take a tenth of a second to load. Their text is
nonsense, so tests that expect a certain story cannot pass with them. Needs the packages `gguf` and `numpy`.

    python scripts/bench/tiny_models.py VOCABULARIES OUT
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_LAYER = 64, 4, 2, 128, 4
HEAD = N_EMBD // N_HEAD
FILL_IN_THE_MIDDLE = {"prefix": "<PRE>", "suffix": "<SUF>", "middle": "<MID>"}
IMAGE, PATCH, N_VISION, N_VISION_FF, MERGE = 448, 14, 32, 64, 2
"""An image becomes (448 / 14 / 2)^2 = 256 tokens, as in Gemma 3."""


@functools.cache
def read_tokenizer(vocabulary: Path) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """Return the tokenizer's keys in a GGUF file, each with value and type."""
    fields = gguf.GGUFReader(vocabulary).fields
    return {name: (field.contents(), field.types[0]) for name, field in fields.items() if name.startswith("tokenizer.")}


class TinyModel:
    """A GGUF file in the making."""

    def __init__(self, path: Path, architecture: str, *, shard_tensors: int = 0) -> None:
        self.writer = gguf.GGUFWriter(path, architecture, split_max_tensors=shard_tensors)
        self.random = np.random.default_rng(1)

    def copy_vocabulary(self, vocabulary: Path) -> int:
        """Take the tokenizer over from a file without tensors and return the number of tokens."""
        tokenizer = read_tokenizer(vocabulary)
        for name, (value, kind) in tokenizer.items():
            if kind == gguf.GGUFValueType.ARRAY:
                self.writer.add_array(name, value)
            else:
                self.writer.add_key_value(name, value, kind)
        return len(tokenizer["tokenizer.ggml.tokens"][0])

    def ones(self, *names: str, size: int = N_EMBD) -> None:
        for name in names:
            self.writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def norm(self, *names: str, size: int = N_EMBD) -> None:
        """Layer norms: weight and bias."""
        self.ones(*names, size=size)
        for name in names:
            self.writer.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    def matrix(self, name: str, *shape: int, scale: float | None = None, bias: bool = False) -> None:
        """A random matrix in f16; the first dimension is the output, as numpy sees it."""
        self.table(name, *shape, scale=scale or shape[-1] ** -0.5, kind=np.float16)
        if bias:
            self.writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))

    def table(self, name: str, *shape: int, scale: float, kind: type = np.float32) -> None:
        """A random tensor; what is added to activations has to be in f32."""
        self.writer.add_tensor(f"{name}.weight", self.random.normal(0, scale, shape).astype(kind))

    def attention(self, block: str, n_head_kv: int, *, n_embd: int = N_EMBD, bias: bool = False, out: str) -> None:
        n_kv = n_embd // N_HEAD * n_head_kv
        self.matrix(f"{block}.attn_q", n_embd, n_embd, bias=bias)
        self.matrix(f"{block}.attn_k", n_kv, n_embd, bias=bias)
        self.matrix(f"{block}.attn_v", n_kv, n_embd, bias=bias)
        self.matrix(f"{block}.{out}", n_embd, n_embd, bias=bias)

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def add_sizes(model: TinyModel, *, context: int, n_head_kv: int) -> None:
    model.writer.add_block_count(N_LAYER)
    model.writer.add_context_length(context)
    model.writer.add_embedding_length(N_EMBD)
    model.writer.add_feed_forward_length(N_FF)
    model.writer.add_head_count(N_HEAD)
    model.writer.add_head_count_kv(n_head_kv)


def make_llama(path: Path, vocabulary: Path, *, gemma: bool = False, shard_tensors: int = 0) -> None:
    """A text model that can also fill in the middle; with `gemma`, the text part of a Gemma 3."""
    model = TinyModel(path, "gemma3" if gemma else "llama", shard_tensors=shard_tensors)
    add_sizes(model, context=8192, n_head_kv=N_HEAD_KV)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_key_length(HEAD)
    model.writer.add_value_length(HEAD)
    if gemma:
        model.writer.add_sliding_window(512)
    else:
        model.writer.add_rope_dimension_count(HEAD)
    n_vocab = model.copy_vocabulary(vocabulary)
    model.writer.add_vocab_size(n_vocab)
    for number, name in enumerate(FILL_IN_THE_MIDDLE):
        model.writer.add_uint32(f"tokenizer.ggml.fim_{name[:3]}_token_id", n_vocab - 1 - number)
    model.matrix("token_embd", n_vocab, N_EMBD, scale=0.1 if gemma else 1)
    model.matrix("output", n_vocab, N_EMBD, scale=0.5)
    model.ones("output_norm")
    for block in (f"blk.{layer}" for layer in range(N_LAYER)):
        model.ones(f"{block}.attn_norm", f"{block}.ffn_norm")
        if gemma:
            model.ones(f"{block}.post_attention_norm", f"{block}.post_ffw_norm")
            model.ones(f"{block}.attn_q_norm", f"{block}.attn_k_norm", size=HEAD)
        model.attention(block, N_HEAD_KV, out="attn_output")
        model.matrix(f"{block}.ffn_gate", N_FF, N_EMBD)
        model.matrix(f"{block}.ffn_up", N_FF, N_EMBD)
        model.matrix(f"{block}.ffn_down", N_EMBD, N_FF)
    model.write()


def make_bert(path: Path, vocabulary: Path) -> None:
    """An embedding model."""
    model = TinyModel(path, "bert")
    add_sizes(model, context=512, n_head_kv=N_HEAD)
    model.writer.add_layer_norm_eps(1e-12)
    model.writer.add_causal_attention(False)
    model.writer.add_pooling_type(gguf.PoolingType.CLS)
    n_vocab = model.copy_vocabulary(vocabulary)
    model.matrix("token_embd", n_vocab, N_EMBD, scale=1)
    model.table("position_embd", 512, N_EMBD, scale=0.1)
    model.table("token_types", 2, N_EMBD, scale=0.1)
    model.norm("token_embd_norm")
    for block in (f"blk.{layer}" for layer in range(N_LAYER)):
        model.attention(block, N_HEAD, bias=True, out="attn_output")
        model.norm(f"{block}.attn_output_norm", f"{block}.layer_output_norm")
        model.matrix(f"{block}.ffn_up", N_FF, N_EMBD, bias=True)
        model.matrix(f"{block}.ffn_down", N_EMBD, N_FF, bias=True)
    model.write()


def make_projector(path: Path) -> None:
    """The eyes of a Gemma 3."""
    model = TinyModel(path, "clip")
    writer = model.writer
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_image_size(IMAGE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(N_VISION)
    writer.add_vision_feed_forward_length(N_VISION_FF)
    writer.add_vision_projection_dim(N_EMBD)
    writer.add_vision_block_count(2)
    writer.add_vision_head_count(N_HEAD)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(MERGE)
    model.table("v.patch_embd", N_VISION, 3, PATCH, PATCH, scale=0.05)
    writer.add_tensor("v.patch_embd.bias", np.zeros(N_VISION, np.float32))
    model.table("v.position_embd", (IMAGE // PATCH) ** 2, N_VISION, scale=0.1)
    for block in ("v.blk.0", "v.blk.1"):
        model.norm(f"{block}.ln1", f"{block}.ln2", size=N_VISION)
        model.attention(block, N_HEAD, n_embd=N_VISION, bias=True, out="attn_out")
        model.matrix(f"{block}.ffn_up", N_VISION_FF, N_VISION, bias=True)
        model.matrix(f"{block}.ffn_down", N_VISION, N_VISION_FF, bias=True)
    model.norm("v.post_ln", size=N_VISION)
    model.ones("mm.soft_emb_norm", size=N_VISION)
    model.table("mm.input_projection", N_VISION, N_EMBD, scale=0.1)
    model.write()


def main() -> None:
    vocabularies, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    spm = vocabularies / "ggml-vocab-llama-spm.gguf"
    make_llama(out / "tiny-llama.gguf", spm)
    make_llama(out / "tiny-split.gguf", spm, shard_tensors=16)
    make_llama(out / "tiny-gemma3.gguf", spm, gemma=True)
    make_projector(out / "mmproj-tiny-gemma3.gguf")
    make_bert(out / "tiny-bert.gguf", vocabularies / "ggml-vocab-bert-bge.gguf")


if __name__ == "__main__":
    main()
