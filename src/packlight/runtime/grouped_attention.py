"""Scaled dot-product attention over grouped keys and values (GQA, arXiv 2305.13245) without repeating them.

The queries of the heads that share one key-value head are laid one under the other, so that each key is read once:
(batch, kv_heads, group * tokens, head_dim) against (batch, kv_heads, buffer, head_dim). transformers' own `sdpa`
repeats the keys whenever there is a mask and it is being traced, which copies the whole cache at every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in evaluation mode, as transformers' `AttentionInterface` calls it.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv_heads, buffer, head_dim).
        value: the same.
        attention_mask: (batch, 1, tokens, buffer), true where a key is seen.

    Returns:
        (batch, tokens, heads, head_dim), and no weights.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    stacked = query.reshape(batch, kv_heads, group * tokens, head_dim)
    mask = attention_mask.repeat(1, 1, group, 1)  # (batch, 1, group * tokens, buffer)
    out = nn.functional.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def whole_mask(*args: Any, **options: Any) -> torch.Tensor:
    """transformers' mask for `sdpa`, (batch, 1, tokens, buffer) and true where a key is seen, never left out: a mask
    that is left out means causal from the first key on, which is wrong once queries lie one under the other."""
    mask = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    assert isinstance(mask, torch.Tensor)
    return mask


def use_grouped_attention_(model: PreTrainedModel) -> None:
    """Let a model that computes with `sdpa` compute with `grouped_sdpa`; one that needs `eager` keeps it."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, grouped_sdpa)
    AttentionMaskInterface.register(NAME, whole_mask)
    model.set_attn_implementation(NAME)
