"""The KV cache: one buffer per layer, allocated once for a known number of tokens.

transformers' `DynamicCache` copies the whole cache at every token; this one writes in place and hands out views, so
that its bytes are those that were planned and a step costs no copy.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from packlight.errors import UsageError


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, (batch, kv_heads, capacity, head_dim) each, filled from the left.

    `update` returns views of the filled part; they stay valid until the next `update`.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def buffer(like: torch.Tensor) -> torch.Tensor:
            batch, heads, _, width = like.shape
            return torch.zeros(batch, heads, self.capacity, width, dtype=like.dtype, device=like.device)

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise UsageError(f"the KV cache holds {self.capacity} tokens and {end} were asked for: shorten the prompt")
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


def allocate(config: PreTrainedConfig, capacity: int) -> Cache:
    """A cache for `capacity` tokens per sequence.

    Models that mix in layers without keys and values (state spaces, linear attention) get transformers' own cache.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return Cache(layers=[PreallocatedLayer(capacity) for _ in range(text.num_hidden_layers)])
    return DynamicCache(config=config)
