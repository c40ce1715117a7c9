"""The functions behind the attention backends that are ours, with the signature that transformers calls.

With SDPA a mask is made only where it is needed: one query, or as many queries as keys, and no padding and no window
shorter than the text, need none. On CUDA the flash kernel takes no mask at all. On a CPU it takes one, boolean or
added, broadcast over heads or batch, and rows that see nothing come out as zeros.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache
from transformers.integrations.flex_attention import flex_attention_forward

from packlight.ops.attention import tiled_attention
from packlight.runtime.attention_case import Case, check_case, refused

Output = tuple[torch.Tensor, torch.Tensor | None]
"""(batch, tokens, heads, head_dim), and the weights of the softmax or None."""


def flash(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Output:
    """SDPA with the flash kernel and no other. Raises UsageError where that does not take the call."""
    check_case("flash", _case(module, query, value, attention_mask, dropout, more))
    key, value, is_causal = _causal_part(module, query, key, value, attention_mask, is_causal)
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    if tokens == 1 and heads != kv_heads and (attention_mask is None or attention_mask.shape[1] == 1):
        query = query.reshape(batch, kv_heads, heads // kv_heads, -1)  # the group as tokens: faster than enable_gqa
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scaling, "enable_gqa": query.shape[1] != kv_heads}
    choice = torch._fused_sdp_choice(query, key, value, attention_mask, dropout, **options)
    if choice == SDPBackend.FLASH_ATTENTION.value:  # SDPA's own choice; `sdpa_kernel` would cost 0.1 ms a layer
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, **options)
    else:
        output = _only_flash(query, key, value, attention_mask, dropout, options)
    return output.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def math(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Output:
    """SDPA with the math kernel and no other. Raises UsageError where that does not take the call."""
    check_case("math", _case(module, query, value, attention_mask, dropout, more))
    key, value, is_causal = _causal_part(module, query, key, value, attention_mask, is_causal)
    is_grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=is_grouped
        )
    return output.transpose(1, 2).contiguous(), None


def tiled(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Output:
    """The tiled reference. Raises UsageError where it does not take the call."""
    check_case("tiled", _case(module, query, value, attention_mask, dropout, more))
    key, value, is_causal = _causal_part(module, query, key, value, attention_mask, is_causal)
    softcap = more.get("softcap")
    output, _ = tiled_attention(query, key, value, attention_mask, is_causal=is_causal, scale=scaling, softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


def flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    **more: Any,
) -> Output:
    """FlexAttention. Raises UsageError where it does not take the call, or cannot be compiled for it."""
    from torch._inductor.exc import InductorError

    check_case("flex", _case(module, query, value, attention_mask, dropout, more))
    try:
        return flex_attention_forward(module, query, key, value, attention_mask, **more)
    except InductorError as error:
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
        raise refused(
            "flex", f"this call, which torch {torch.__version__} cannot compile ({reason})", "auto"
        ) from error


def _case(
    module: nn.Module, query: torch.Tensor, value: torch.Tensor, mask: Any, dropout: float, more: dict[str, Any]
) -> Case:
    """What one call asks for. `more` are the arguments that transformers passes on, most of them for other layers."""
    return Case(
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        dropout=dropout,
        softcap=more.get("softcap"),
        has_sinks=more.get("s_aux") is not None,
        has_dense_mask=isinstance(mask, torch.Tensor),
        has_position_bias=more.get("position_bias") is not None,
        is_paged=not isinstance(more.get("cache"), Cache | None),
        needs_weights=bool(more.get("output_attentions")),
        needs_grad=query.requires_grad,
    )


def _causal_part(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool | None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Keys, values, and whether the causal mask is the kernel's to apply.

    NOTE a trap: SDPA's `is_causal` is aligned to the first key. No mask with more keys than queries means the prefill
    of a static cache, whose keys behind the prompt are still empty.
    """
    tokens = query.shape[-2]
    if mask is not None or tokens == 1 or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return key, value, False
    return key[:, :, :tokens], value[:, :, :tokens], True


def _only_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """The flash kernel where SDPA would prefer another; torch's own reasons where it does not take the case."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        warnings.simplefilter("always")
        try:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, **options)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reasons = [str(one.message).split(" (Triggered")[0] for one in said]
            raise refused("flash", f"this call ({' '.join(reasons) or error})", "auto or math") from error
