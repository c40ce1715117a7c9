"""A KV cache in 8 or 4 bits, after KIVI (arXiv 2402.02750): old tokens as codes, the newest as they are.

A step de-quantizes one layer at a time, so that it takes less memory and more time than a cache in the compute dtype.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from packlight.errors import UsageError
from packlight.ops.kv_quantize import (
    KVCodes,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from packlight.plan.kv_cache import GROUP, LEAST_GROUP, RECENT, quantized_blocks, value_group
from packlight.runtime.kv_static import buffer_like, check_room


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer for `capacity` tokens.

    `RECENT` to `RECENT + GROUP - 1` of the newest tokens are kept in the compute dtype; older ones leave in whole
    groups. New tokens see each other, and the newest before them, unrounded.
    """

    is_sliding = False

    def __init__(self, capacity: int, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.bits = capacity, bits
        self.group = GROUP  # channels of the values that share a scale
        self.coded = self.recent = 0  # tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        group = value_group(value_states.shape[-1])
        if group is None or key_states.shape[-1] % 2:
            raise UsageError(
                f"heads of {value_states.shape[-1]} channels do not divide into groups of {LEAST_GROUP} to {GROUP}: "
                "a quantized KV cache cannot hold them, take another kind"
            )
        self.group = group
        self.dtype, self.device = key_states.dtype, key_states.device
        recent = min(self.capacity, RECENT + GROUP)
        self.keys, self.values = buffer_like(key_states, recent), buffer_like(value_states, recent)
        tokens = quantized_blocks(self.capacity) * GROUP
        keys = quantize_keys(buffer_like(key_states, GROUP), self.bits, GROUP)  # for the shapes of its parts
        values = quantize_values(buffer_like(value_states, GROUP), self.bits, group)
        # (batch, kv_heads, groups of tokens, ...) and (batch, kv_heads, tokens, ...)
        self.key_codes = KVCodes(*(_room(part, tokens // GROUP) for part in keys.tensors))
        self.value_codes = KVCodes(*(_room(part, tokens) for part in values.tensors))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        check_room(self.get_seq_length() + key_states.shape[-2], self.capacity)
        new_keys = torch.cat([self.keys[:, :, : self.recent], key_states], dim=-2)
        new_values = torch.cat([self.values[:, :, : self.recent], value_states], dim=-2)
        keys = torch.cat([self._old_keys(), new_keys], dim=-2)
        values = torch.cat([self._old_values(), new_values], dim=-2)
        leaving = max(0, new_keys.shape[-2] - RECENT) // GROUP * GROUP
        if leaving:
            self._encode(new_keys[:, :, :leaving], new_values[:, :, :leaving])
        self.recent = new_keys.shape[-2] - leaving
        self.keys[:, :, : self.recent] = new_keys[:, :, leaving:]
        self.values[:, :, : self.recent] = new_values[:, :, leaving:]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.coded + self.recent

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.coded = self.recent = 0

    def resident_bytes(self) -> int:
        """Bytes of codes, scales and the newest tokens."""
        if self.keys is None or self.values is None:
            return 0
        tensors = (self.keys, self.values, *self.key_codes.tensors, *self.value_codes.tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _old_keys(self) -> torch.Tensor:
        filled = KVCodes(*(part[:, :, : self.coded // GROUP] for part in self.key_codes.tensors))
        return dequantize_keys(filled, self.bits, self.dtype)

    def _old_values(self) -> torch.Tensor:
        filled = KVCodes(*(part[:, :, : self.coded] for part in self.value_codes.tensors))
        return dequantize_values(filled, self.bits, self.dtype)

    def _encode(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.coded + keys.shape[-2]
        groups = slice(self.coded // GROUP, end // GROUP)
        new_keys, new_values = quantize_keys(keys, self.bits, GROUP), quantize_values(values, self.bits, self.group)
        for room, part in zip(self.key_codes.tensors, new_keys.tensors, strict=True):
            room[:, :, groups] = part
        for room, part in zip(self.value_codes.tensors, new_values.tensors, strict=True):
            room[:, :, self.coded : end] = part
        self.coded = end


def _room(like: torch.Tensor, count: int) -> torch.Tensor:
    """Zeros of the shape of `like` but for its third dimension, which has `count` places."""
    return torch.zeros(*like.shape[:2], count, *like.shape[3:], dtype=like.dtype, device=like.device)
