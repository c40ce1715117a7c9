"""Attention backends behind one interface: choose by name, and that one runs or says why it does not.

transformers asks its `AttentionInterface` for a function by the name in the config, and its `AttentionMaskInterface`
for the mask that belongs to it. The backends that are ours are registered there under names of their own; `eager` and
`flash-attn` are transformers' own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from packlight.errors import UsageError
from packlight.plan.attention import AUTO, BACKEND_NAMES, BACKENDS, AttentionBackend
from packlight.runtime.attention_case import Case, check_case, refused
from packlight.runtime.attention_forward import Output, flash, flex, math, tiled

Forward = Callable[..., Output]
"""(module, query, key, value, mask, **more) -> (output (batch, tokens, heads, width), weights or None); query
(batch, heads, tokens, head_dim), key and value (batch, kv_heads, keys, ...)."""


def backends() -> tuple[AttentionBackend, ...]:
    """All backends, in the order in which they are shown."""
    return BACKENDS


def set_backend(model: PreTrainedModel, name: str) -> None:
    """Have a model, its parts and their configs included, compute attention with one backend from now on.

    What the config tells is checked here; what only a call tells (a mask, other dtypes) is checked in the call, which
    then raises UsageError as well. After an error the model is as it was.

    Args:
        name: one of `BACKEND_NAMES`; `auto` is what transformers chooses itself.

    Raises:
        UsageError: no such backend, or one that does not compute this model; the sentence says what to use instead.
        MissingExtraError: its package is not installed.
    """
    if name not in BACKEND_NAMES:
        raise UsageError(f"there is no attention backend {name!r}: choose one of {', '.join(BACKEND_NAMES)}")
    check_case(name, model_case(model))
    _check_class(model, name)
    _register()
    before = _implementations(model)
    key = _KEYS[name]
    model.set_attn_implementation(key)  # type: ignore[arg-type]  # None is what it calls its own choice
    left = {config._attn_implementation for config, _ in before} - {key}
    if key is not None and left:  # it warns and goes on where a part keeps its own
        _restore(before)
        raise refused(name, f"{type(model).__name__}, of which a part keeps {', '.join(map(str, left))}", AUTO)


@contextmanager
def use(model: PreTrainedModel, name: str) -> Iterator[None]:
    """`set_backend` for the length of a block; afterwards the model has the backend that it had."""
    before = _implementations(model)
    set_backend(model, name)
    try:
        yield
    finally:
        _restore(before)


def attend(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one layer without a model: what a backend does in one, its mask included.

    Args:
        q: (batch, heads, tokens, head_dim); k, v: (batch, kv_heads, keys, head_dim), the tokens the last of the keys.

    Returns:
        (batch, tokens, heads, head_dim).

    Raises:
        UsageError: the backend does not compute this, or is `flash-attn`, which transformers calls from models only.
    """
    tokens, keys = q.shape[-2], k.shape[-2]
    forward, make_mask = _bare(name)
    mask = make_mask(
        batch_size=q.shape[0], q_length=tokens, kv_length=keys, q_offset=keys - tokens, dtype=q.dtype, device=q.device
    )
    layer = _Layer(q.shape[1] // k.shape[1])
    output, _ = forward(layer, q, k, v, mask, scaling=q.shape[-1] ** -0.5)
    return output


def model_case(model: PreTrainedModel) -> Case:
    """What a model asks for in every layer, as far as its config and its parts tell."""
    config = model.config.get_text_config(decoder=True)
    head_dim = _field(config, "qk_head_dim", "head_dim") or config.hidden_size // config.num_attention_heads
    return Case(
        device=model.device.type,
        dtype=model.dtype,
        head_dim=head_dim,
        value_dim=_field(config, "v_head_dim") or head_dim,
        dropout=(_field(config, "attention_dropout", "attn_pdrop") or 0.0) if model.training else 0.0,
        softcap=_field(config, "attn_logit_softcapping"),
        has_sinks=any(hasattr(module, "sinks") for module in model.modules()),
        needs_weights=bool(model.config.output_attentions),
        needs_grad=model.training,
    )


def _field(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that the config has and that is set."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _check_class(model: PreTrainedModel, name: str) -> None:
    """What the model's class says of itself."""
    kind = type(model).__name__
    supports = {
        "math": "_supports_sdpa",
        "flash": "_supports_sdpa",
        "flash-attn": "_supports_flash_attn",
        "flex": "_supports_flex_attn",
    }
    if name != AUTO and not model._can_set_attn_implementation():
        raise refused(name, f"{kind}, which is not written against transformers' AttentionInterface", AUTO)
    if name in supports and not getattr(model, supports[name]):
        raise refused(name, f"{kind}, whose class says {supports[name]} = False", AUTO)


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The configs of a model and of its parts, each once, the outer before the inner, with what they have chosen."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = {id(config): (config, config._attn_implementation) for config in configs}
    return list(found.values())


def _restore(before: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in before:
        config._attn_implementation = implementation


class _Layer(nn.Module):
    """Stands for a model's attention layer where there is no model."""

    is_causal = True

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups
        self.eval()


_KEYS: dict[str, str | None] = {
    AUTO: None,
    "eager": "eager",
    "math": "packlight_math",
    # NOTE a trap: transformers takes every name with "flash" in it for a FlashAttention package.
    "flash": "packlight_fused",
    "flash-attn": "flash_attention_2",
    "flex": "packlight_flex",
    "tiled": "packlight_tiled",
}
"""Names in transformers' interface."""

_FORWARDS: dict[str, tuple[Forward, Callable[..., Any]]] = {
    "math": (math, sdpa_mask),
    "flash": (flash, sdpa_mask),
    "flex": (flex, flex_attention_mask),
    "tiled": (tiled, sdpa_mask),
}


def _register() -> None:
    """Make our functions known to transformers; again does no harm.

    NOTE a trap: a function without a mask beside it is called without any, and padding is attended to.
    """
    for name, (forward, make_mask) in _FORWARDS.items():
        key = _KEYS[name]
        assert key is not None
        AttentionInterface.register(key, forward)
        AttentionMaskInterface.register(key, make_mask)


def _bare(name: str) -> tuple[Forward, Callable[..., Any]]:
    if name in _FORWARDS:
        return _FORWARDS[name]
    if name == "eager":
        from transformers.masking_utils import eager_mask
        from transformers.models.llama.modeling_llama import eager_attention_forward

        return eager_attention_forward, eager_mask
    if name == AUTO:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward, sdpa_mask
    raise UsageError(
        f"attention without a model has no backend {name}: choose {', '.join((AUTO, 'eager', *_FORWARDS))}"
    )
