"""Tiny models with random weights, of several architectures, that the real llama-server loads."""

from __future__ import annotations

import array
import random
import struct
from pathlib import Path

from gguf_files import Raw, encode, string, typed

EMBD, HEADS, KV_HEADS, HEAD, FF, LAYERS, CONTEXT = 64, 2, 1, 32, 128, 2, 2048
NAMES = ("llama", "mistral", "phi3", "gemma2", "gemma3", "qwen2", "qwen3")
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "<|endoftext|>"]


def make(path: Path, name: str) -> Path:
    """Write the model `name`; its vocabulary is the bytes."""
    arch = "llama" if name == "mistral" else name
    qkv, kv = HEADS * HEAD, KV_HEADS * HEAD
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (EMBD, len(TOKENS)), "output_norm": (EMBD,)}
    if not arch.startswith("gemma"):
        shapes["output"] = (EMBD, len(TOKENS))
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {"attn_norm": (EMBD,), "attn_output": (qkv, EMBD), "ffn_norm": (EMBD,)}
        layer |= {"ffn_down": (FF, EMBD)}
        if arch == "phi3":
            layer |= {"attn_qkv": (EMBD, qkv + 2 * kv), "ffn_up": (EMBD, 2 * FF)}
        else:
            layer |= {"attn_q": (EMBD, qkv), "attn_k": (EMBD, kv), "attn_v": (EMBD, kv)}
            layer |= {"ffn_gate": (EMBD, FF), "ffn_up": (EMBD, FF)}
        if arch in ("qwen3", "gemma3"):
            layer |= {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
        if arch.startswith("gemma"):
            layer |= {"post_attention_norm": (EMBD,), "post_ffw_norm": (EMBD,)}
        shapes |= {f"blk.{i}.{key}": shape for key, shape in layer.items()}
    tensors = {f"{key}.weight": shape for key, shape in shapes.items()}
    if arch == "qwen2":
        for i in range(LAYERS):
            tensors |= {f"blk.{i}.attn_q.bias": (qkv,), f"blk.{i}.attn_k.bias": (kv,), f"blk.{i}.attn_v.bias": (kv,)}
    own = {"context_length": CONTEXT, "embedding_length": EMBD, "block_count": LAYERS, "feed_forward_length": FF}
    own |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HEAD}
    own |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    if arch.startswith("gemma"):
        own["attention.sliding_window"] = 128
    fields: dict[str, object] = {"general.architecture": arch, "general.name": name.capitalize()}
    fields |= {f"{arch}.{key}": value for key, value in own.items()}
    fields[f"{arch}.attention.layer_norm_rms_epsilon"] = 1e-5
    fields |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": TOKENS}
    fields["tokenizer.ggml.scores"] = Raw(6, [0.0] * len(TOKENS), array=True)
    fields["tokenizer.ggml.token_type"] = Raw(5, [2, 3, 3, *[6] * 256, 1, 3], array=True)
    fields |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    head += b"".join(string(key) + encode(typed(value)) for key, value in fields.items())
    generator, body = random.Random(1), b""
    for key, shape in tensors.items():
        head += string(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        weights = [1.0] * count if "norm" in key else [generator.gauss(0, 0.1) for _ in range(count)]
        body += array.array("f", weights).tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path
