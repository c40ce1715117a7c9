"""KV caches by name, and the bytes that each of them takes. Arithmetic on shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from packlight.plan.memory import kv_elements_per_layer
from packlight.spec import DTYPE_BYTES, ModelSpec

KVCacheKind = Literal["static", "growing", "sliding", "int8", "int4", "offloaded"]
KINDS: tuple[KVCacheKind, ...] = get_args(KVCacheKind)

GROUP = 32
"""Tokens that share a scale in each channel of quantized keys, and channels that do so, at most, in each token of the
values (KIVI, arXiv 2402.02750, uses 32)."""
LEAST_GROUP = 8
"""Channels of a group of values, at least: below this, scales take more room than codes."""
RECENT = 32
"""The newest tokens, at least these, stay in the compute dtype."""
SCALE_BYTES = 2
"""float16, for a scale and for the least value of a group."""

ABOUT: dict[KVCacheKind, str] = {
    "static": "one buffer for all tokens, allocated once; a step writes one column",
    "growing": "transformers' own: exactly what is filled, copied at every token",
    "sliding": "the last tokens only; exact where the model itself looks no further back",
    "int8": "keys per channel and values per token in 8 bits, the newest tokens as they are",
    "int4": "the same in 4 bits",
    "offloaded": "on disk (CPU) or in main memory (GPU), one layer at a time beside the computation",
}


@dataclass(frozen=True)
class KVCacheBytes:
    """Bytes of a filled cache: `held` between two steps, `step` on top of that while one layer is attended to."""

    held: int
    step: int

    @property
    def total(self) -> int:
        return self.held + self.step


def kind_bytes(
    spec: ModelSpec,
    kind: KVCacheKind,
    context: int,
    users: int = 1,
    dtype: str = "bfloat16",
    window: int | None = None,
) -> KVCacheBytes:
    """What a cache of one kind takes for `users` sequences of `context` tokens.

    Args:
        window: of layers that have none of their own, for the sliding cache.
    """
    size = DTYPE_BYTES[dtype]
    layer = users * context * kv_elements_per_layer(spec) * size  # keys and values of one layer, all tokens
    whole = spec.num_layers * layer
    if kind == "static":
        return KVCacheBytes(whole, 0)
    if kind == "growing":  # a layer's keys, then its values, lie there twice while the old are copied into the new
        return KVCacheBytes(whole, layer // 2)
    if kind == "offloaded":
        return KVCacheBytes(layer, 0)
    if kind == "sliding":
        per_token = layer // context
        held = [
            per_token * min(context, own - 1 if own is not None else context) for own in layer_windows(spec, window)
        ]
        return KVCacheBytes(sum(held), max(held) + per_token)
    elements = users * kv_elements_per_layer(spec)
    blocks = quantized_blocks(context)
    codes = blocks * GROUP * elements * int(kind.removeprefix("int")) // 8
    groups = blocks * elements // 2 + blocks * GROUP * elements // 2 // (value_group(spec.head_dim) or spec.head_dim)
    scales = 2 * SCALE_BYTES * groups
    recent = min(context, RECENT + GROUP) * elements * size
    return KVCacheBytes(spec.num_layers * (codes + scales + recent), layer)


def quantized_blocks(tokens: int) -> int:
    """Whole groups of tokens that a quantized cache of `tokens` tokens holds as codes."""
    return max(0, tokens - RECENT) // GROUP


def value_group(head_dim: int) -> int | None:
    """Channels that share a scale in quantized values; None where the heads do not divide into groups."""
    group = math.gcd(head_dim, GROUP)
    return group if group >= LEAST_GROUP else None


def layer_windows(spec: ModelSpec, window: int | None = None) -> list[int | None]:
    """How far each layer's sliding cache looks back, None for all the way; its own windows come first."""
    sliding = spec.num_sliding_layers if spec.sliding_window is not None else 0
    return [spec.sliding_window] * sliding + [window] * (spec.num_layers - sliding)
