"""A KV cache that forgets what lies outside a window."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from packlight.runtime.kv_static import buffer_like


class SlidingLayer(CacheLayerMixin):
    """The last `window - 1` tokens: with the newest one, all that a query may look back on.

    `update` returns what is held and what is new; within a prompt's chunk the mask keeps each query to its window.
    """

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.held = self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = buffer_like(key_states, self.window - 1), buffer_like(value_states, self.window - 1)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys[:, :, : self.held], key_states], dim=-2)
        values = torch.cat([self.values[:, :, : self.held], value_states], dim=-2)
        self.held = min(keys.shape[-2], self.window - 1)
        self.keys[:, :, : self.held] = keys[:, :, keys.shape[-2] - self.held :]
        self.values[:, :, : self.held] = values[:, :, values.shape[-2] - self.held :]
        self.length += key_states.shape[-2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.length - self.held

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window

    def reset(self) -> None:
        self.held = self.length = 0
