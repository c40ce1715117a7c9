"""KV caches behind transformers' `Cache`: one small layer class for each kind, and `allocate`, which chooses.

A layer's `update` takes the keys and values of new tokens, (batch, kv_heads, tokens, head_dim), and returns those that
the new tokens attend to; what it returns stays valid until the next `update`. `held_bytes` is what a cache holds
between two steps, as `plan.kv_cache` predicts it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from packlight.errors import UsageError
from packlight.plan.kv_cache import KVCacheKind
from packlight.runtime.kv_offloaded import OffloadedLayer
from packlight.runtime.kv_quantized import QuantizedLayer
from packlight.runtime.kv_sliding import SlidingLayer
from packlight.runtime.kv_static import StaticLayer

WITH_KEYS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that keep keys and values; others are state spaces and linear attention."""


def allocate(config: PreTrainedConfig, capacity: int, kind: KVCacheKind = "static", window: int | None = None) -> Cache:
    """A cache for `capacity` tokens per sequence.

    Models that mix in layers without keys and values (state spaces, linear attention) get transformers' own cache.

    Args:
        window: how many tokens a sliding cache looks back in a model that has no windows of its own.

    Raises:
        UsageError: the kind does not fit the model, or the window is missing, too small or not wanted.
    """
    kinds = layer_kinds(config)
    if window is not None and kind != "sliding":
        raise UsageError(f"a window belongs to the sliding KV cache, not to the {kind} one")
    if not WITH_KEYS.issuperset(kinds):
        if kind in ("static", "growing"):
            return DynamicCache(config=config)
        raise UsageError(f"this model has layers without keys and values, which the {kind} KV cache cannot hold")
    if kind == "growing":
        return DynamicCache(config=config)
    return Cache(layers=list(_layers(config, capacity, kind, window)))


def argument_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer attends to, in transformers' words."""
    text = config.get_text_config(decoder=True)
    if types := getattr(text, "layer_types", None):
        return list(types)
    is_sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if is_sliding else "full_attention"] * text.num_hidden_layers


def windows(config: PreTrainedConfig, window: int | None) -> list[int | None]:
    """How many tokens each layer of a sliding cache looks back, itself included; None for all.

    Raises:
        UsageError: neither the model nor the caller has a window, or both do.
    """
    kinds = layer_kinds(config)
    own = getattr(config.get_text_config(decoder=True), "sliding_window", None)
    if "sliding_attention" in kinds:
        if window is not None:
            raise UsageError(f"this model has windows of its own, of {own} tokens: leave the window out")
        return [own if each == "sliding_attention" else None for each in kinds]
    if window is None:
        raise UsageError("this model attends to all tokens: say how many a sliding KV cache shall keep (--window)")
    if window < 1:
        raise UsageError(f"a window holds at least 1 token, not {window}")
    return [window] * len(kinds)


def held_bytes(cache: Cache) -> int:
    """Bytes of all buffers that a cache holds in memory between two steps."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layers(
    config: PreTrainedConfig, capacity: int, kind: KVCacheKind, window: int | None
) -> Sequence[CacheLayerMixin]:
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    if kind == "sliding":
        return [_windowed(each, capacity) for each in windows(config, window)]
    if kind == "offloaded":
        return OffloadedLayer.chain(num_layers, capacity)
    if kind == "static":
        return [StaticLayer(capacity) for _ in range(num_layers)]
    return [QuantizedLayer(capacity, int(kind.removeprefix("int"))) for _ in range(num_layers)]


def _windowed(window: int | None, capacity: int) -> StaticLayer | SlidingLayer:
    return StaticLayer(capacity) if window is None or window > capacity else SlidingLayer(window)


def _layer_bytes(layer: object) -> int:
    if hasattr(layer, "resident_bytes"):
        return int(layer.resident_bytes())
    held = {id(storage): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, _tensors(layer))}
    return sum(held.values())


def _tensors(layer: object) -> list[torch.Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.ndim > 1]
