"""A KV cache that is allocated once, for a known number of tokens."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from packlight.errors import UsageError


class StaticLayer(CacheLayerMixin):
    """One buffer each for keys and values, (batch, kv_heads, capacity, head_dim), filled from the left.

    transformers' `DynamicCache` copies the whole cache at every token; this one writes in place and hands out views of
    the filled part, so that its bytes are those that were planned and a step costs no copy.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        check_room(end, self.capacity)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.length = 0

    def keep(self, tokens: int, batch: int) -> None:
        """Forget all but the first `tokens` tokens, which all sequences share, and give them to `batch` sequences."""
        self.length = tokens
        if self.keys is None or self.values is None or self.keys.shape[0] == batch:
            return
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = self._buffer(old[:1].expand(batch, -1, -1, -1))
            new[:, :, :tokens] = old[:1, :, :tokens]
            setattr(self, name, new)

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        return buffer_like(states, self.capacity)


def buffer_like(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Zeros, (batch, kv_heads, capacity, head_dim), for keys or values of that shape but for the tokens."""
    batch, heads, _, width = states.shape
    return torch.zeros(batch, heads, capacity, width, dtype=states.dtype, device=states.device)


def check_room(needed: int, capacity: int) -> None:
    """Raises UsageError where a cache is asked for more tokens than it holds."""
    if needed > capacity:
        raise UsageError(f"the KV cache holds {capacity} tokens and {needed} were asked for: shorten the prompt")
