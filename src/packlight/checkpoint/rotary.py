"""Rotary positions: the order of rows in q and k, and the scaling parameters of GGUF metadata. No torch.

transformers rotates element i of a head with element i + head_dim / 2 (half-split); Meta's Llama, llama2.c and
GGUF's llama rotate neighbours 2i and 2i + 1 (interleaved). The rows of q and k are in the order of their code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from packlight.checkpoint.ggml import Array, dequantize
from packlight.checkpoint.gguf import GgufHeader
from packlight.errors import CheckpointError


def half_split_rows(values: Array, num_heads: int) -> Array:
    """Rows of q or k, (num_heads * head_dim, ...), from interleaved to half-split order; a contiguous copy."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def rope_parameters(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of a config.

    Raises:
        CheckpointError: a kind of scaling that is not converted, or frequency factors of an unknown formula.
    """
    arch = header.architecture
    if "rope_freqs.weight" in header.tensors:
        return {"rope_theta": theta, **_llama3_parameters(header, theta, head_dim)}
    kind = header.get(f"{arch}.rope.scaling.type", str, "none")
    factor = header.get(f"{arch}.rope.scaling.factor", float, header.get(f"{arch}.rope.scale_linear", float, 1.0))
    if kind == "none" and factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" or (kind == "none" and f"{arch}.rope.scale_linear" in header.metadata):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = header.get(f"{arch}.rope.scaling.original_context_length", int)
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "yarn", "rope_theta": theta, **scaling}
    raise CheckpointError(
        f"{header.path} scales rotary positions by {kind!r}; packlight converts none, linear, yarn and llama3: "
        f"give the original checkpoint directory"
    )


def _llama3_parameters(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """GGUF stores Llama 3's scaling as its result, one factor per frequency: find the parameters that give it."""
    tensor = header.tensors["rope_freqs.weight"]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{header.path} has a rope_freqs.weight that is not {head_dim // 2} float32 values")
    stored = dequantize(header.read(tensor), tensor.type)
    for original in (8192, 4096, 16384, 32768):
        factor = float(stored.max())
        if factor > 0 and np.allclose(_llama3_factors(theta, head_dim, factor, original), stored, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{header.path} has rotary frequency factors that Llama 3's formula does not give; "
        f"give the original checkpoint directory"
    )


def _llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> Array:
    """(head_dim / 2,): 1 for short wavelengths, `factor` for long ones, between them a blend of their inverses.

    Short is below original / 4, long above original / 1 (Llama 3.1's published low and high factors).
    """
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))
