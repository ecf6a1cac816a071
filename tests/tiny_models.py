"""Tiny models with random weights, of several architectures, that the real llama-server loads."""

from __future__ import annotations

import array
import random
import struct
from pathlib import Path

from gguf_files import Raw, encode, string, typed

SSM = {"conv_kernel": 4, "inner_size": 128, "state_size": 8, "time_step_rank": 4}
EMBD, HEADS, KV_HEADS, HEAD, FF, LAYERS, CONTEXT = 64, 2, 1, 32, 128, 2, 2048
NAMES = ("llama", "mistral", "phi3", "gemma2", "gemma3", "qwen2", "qwen3")
WITHOUT_MEMORY = ("mamba", "bert", "gpt2", "qwen2vl")
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "<|endoftext|>"]


def _norm(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (EMBD,) for name in names for part in ("weight", "bias")}


def _mamba() -> dict[str, tuple[int, ...]]:
    inner, rank = SSM["inner_size"], SSM["time_step_rank"]
    state, kernel = SSM["state_size"], SSM["conv_kernel"]
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (EMBD,), "ssm_in.weight": (EMBD, 2 * inner)}
    layer |= {"ssm_conv1d.weight": (kernel, inner), "ssm_conv1d.bias": (inner,), "ssm_a": (state, inner)}
    layer |= {"ssm_x.weight": (inner, rank + 2 * state), "ssm_dt.weight": (rank, inner), "ssm_dt.bias": (inner,)}
    return layer | {"ssm_d": (inner,), "ssm_out.weight": (inner, EMBD)}


def _learned_positions(arch: str) -> dict[str, tuple[int, ...]]:
    norms = ("attn_norm", "ffn_norm") if arch == "gpt2" else ("attn_output_norm", "layer_output_norm")
    layer: dict[str, tuple[int, ...]] = {**_norm(*norms), "attn_qkv.weight": (EMBD, 3 * EMBD)}
    layer |= {"attn_qkv.bias": (3 * EMBD,), "attn_output.weight": (EMBD, EMBD), "attn_output.bias": (EMBD,)}
    layer |= {"ffn_up.weight": (EMBD, FF), "ffn_up.bias": (FF,)}
    return layer | {"ffn_down.weight": (FF, EMBD), "ffn_down.bias": (EMBD,)}


def _llama(arch: str) -> dict[str, tuple[int, ...]]:
    qkv, kv = HEADS * HEAD, KV_HEADS * HEAD
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
    layer = {f"{key}.weight": shape for key, shape in layer.items()}
    if arch in ("qwen2", "qwen2vl"):
        layer |= {"attn_q.bias": (qkv,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    return layer


def _tensors(arch: str, layers: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (EMBD, len(TOKENS))}
    if arch == "mamba":
        layer = _mamba()
    elif arch in ("bert", "gpt2"):
        layer = _learned_positions(arch)
        tensors["position_embd.weight"] = (EMBD, CONTEXT)
    else:
        layer = _llama(arch)
    if arch == "bert":
        tensors |= {"token_types.weight": (EMBD, 2), **_norm("token_embd_norm")}
    elif arch == "gpt2":
        tensors |= _norm("output_norm")
    else:
        tensors["output_norm.weight"] = (EMBD,)
    if not arch.startswith("gemma") and arch != "bert":
        tensors["output.weight"] = (EMBD, len(TOKENS))
    return tensors | {f"blk.{i}.{key}": shape for i in range(layers) for key, shape in layer.items()}


def make(path: Path, name: str, sliding_window: int = 128) -> Path:
    """Write the model `name`; its vocabulary is the bytes. Gemmas alone slide."""
    arch = "llama" if name == "mistral" else name
    layers = 6 if arch == "gemma3" else LAYERS  # the sixth is its first with attention on everything
    tensors = _tensors(arch, layers)
    own = {"context_length": CONTEXT, "embedding_length": EMBD, "block_count": layers, "feed_forward_length": FF}
    own |= {"attention.head_count": HEADS, "rope.dimension_count": HEAD}
    own["attention.head_count_kv"] = HEADS if arch in ("bert", "gpt2") else KV_HEADS
    own |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    if arch == "mamba":
        own |= {"attention.head_count": 0, "attention.head_count_kv": 0, **{f"ssm.{key}": n for key, n in SSM.items()}}
    if arch.startswith("gemma"):
        own["attention.sliding_window"] = sliding_window
    fields: dict[str, object] = {"general.architecture": arch, "general.name": name.capitalize()}
    fields |= {f"{arch}.{key}": value for key, value in own.items()}
    fields |= {f"{arch}.attention.layer_norm_{kind}epsilon": 1e-5 for kind in ("", "rms_")}
    if arch == "qwen2vl":
        fields["qwen2vl.rope.dimension_sections"] = Raw(5, [4, 6, 6, 0], array=True)
    if arch == "bert":
        fields |= {"bert.attention.causal": False, "bert.pooling_type": 1, "tokenizer.ggml.token_type_count": 2}
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
        weights = [1.0] * count if "norm.weight" in key else [generator.gauss(0, 0.1) for _ in range(count)]
        if key.endswith("ssm_a"):
            weights = [-abs(weight) for weight in weights]  # a state that fades
        body += array.array("f", weights).tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path
