"""Small GGUF files, byte by byte, so that tests can also write wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPE_F32, TYPE_F16, TYPE_Q4_0 = 0, 1, 2

Tensor = tuple[str, tuple[int, ...], int, bytes]
"""(name, shape outermost first, ggml type, bytes)"""


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    """Type tag and value of one metadata entry."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind = STRING if isinstance(value[0], str) else I32 if isinstance(value[0], int) else F32
    body = b"".join(
        text(item) if kind == STRING else struct.pack("<i" if kind == I32 else "<f", item) for item in value
    )
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + body


def gguf(metadata: Mapping[str, Any], tensors: Sequence[Tensor], version: int = 3, alignment: int = 32) -> bytes:
    """A whole file."""
    infos, data = b"", b""
    for name, shape, kind, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, len(data))
        data += raw
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value_bytes(value) for key, value in metadata.items()) + infos
    return head + b"\0" * (-len(head) % alignment) + data


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> Path:
    path.write_bytes(gguf(metadata, tensors))
    return path


SIZES = {
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}

TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0] * 259 + [-3.0, -1.0, -2.0, -4.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def shapes(arch: str = "llama", vocab: int = 263) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a one-block model of the sizes above, tied."""
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (32,),
        "attn_q.weight": (32, 32),
        "attn_k.weight": (16, 32),
        "attn_v.weight": (16, 32),
        "attn_output.weight": (32, 32),
        "ffn_norm.weight": (32,),
        "ffn_gate.weight": (64, 32),
        "ffn_up.weight": (64, 32),
        "ffn_down.weight": (32, 64),
    }
    if arch == "qwen2":
        block |= {"attn_q.bias": (32,), "attn_k.bias": (16,), "attn_v.bias": (16,)}
    if arch == "qwen3":
        block |= {"attn_q_norm.weight": (8,), "attn_k_norm.weight": (8,)}
    named = {f"blk.0.{name}": shape for name, shape in block.items()}
    return {"token_embd.weight": (vocab, 32), **named, "output_norm.weight": (32,)}


def model(arch: str = "llama", dtype: str = "f4", **changes: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata and random tensors of a whole small model; `changes` are metadata with `__` for a dot."""
    metadata: dict[str, Any] = {"general.architecture": arch}
    metadata |= {key.replace("llama.", f"{arch}."): value for key, value in SIZES.items()}
    metadata |= TOKENIZER | {key.replace("__", "."): value for key, value in changes.items()}
    rng = np.random.default_rng(0)
    kind = {"f4": TYPE_F32, "f2": TYPE_F16}[dtype]
    tensors = []
    for name, shape in shapes(arch).items():
        is_norm = len(shape) == 1  # norms and biases stay in float32, as llama.cpp writes them
        values = rng.standard_normal(shape).astype("<f4" if is_norm else f"<{dtype}")
        tensors.append((name, shape, TYPE_F32 if is_norm else kind, values.tobytes()))
    return metadata, tensors
