"""The one module that is exported, compiled, and run eagerly beside both: a model whose KV cache is an argument.

transformers' `StaticCache` keeps its tensors inside; a graph that is to share them with another graph must be handed
them. A sliding layer keeps the whole context here, and the mask alone makes it slide: one shape for every length.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from packlight.errors import UsageError
from packlight.runtime.fixed_shapes import FixedShapeDecoder, Shapes
from packlight.runtime.grouped_attention import use_grouped_attention_
from packlight.runtime.kv_cache import layer_kinds

_KINDS = {"full_attention", "sliding_attention"}
_ROPE_BY_LENGTH = {"dynamic", "longrope"}
"""Rotary tables that change with the length of the text: a graph cannot branch on it."""


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer in tensors of the caller, (batch, kv_heads, buffer, head_dim) each.

    `update` writes at `start` and returns the whole tensors; the mask hides what is not written yet.
    """

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.start = start
        self.is_sliding = is_sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("the tensors of a FixedLayer are given")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        positions = self.start + torch.arange(key_states.shape[-2], device=key_states.device)
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> int:
        return self.start  # type: ignore[return-value]  # a tensor, as in StaticCache: masks are computed from it

    def get_max_length(self) -> int:
        return self.get_mask_sizes(1)[0]


class FixedForward(nn.Module):
    """A model of transformers as a function of its tokens and its KV cache.

    Its attention is set to `grouped_sdpa` (`runtime/grouped_attention.py`), in place.

    Raises:
        UsageError: an architecture that has no such form; the message says why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        check_architecture(model)
        use_grouped_attention_(model)
        self.model = model
        self.is_sliding = [kind == "sliding_attention" for kind in layer_kinds(model.config)]

    def forward(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        padding: torch.Tensor,
        last: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Logits of one position, (batch, vocab).

        Args:
            ids: (batch, tokens).
            start: tokens that the cache holds already, a scalar.
            padding: of these, how many are padding on the left, (batch,).
            last: the position in `ids` whose logits are wanted, (1,).
            keys: of each layer, (batch, kv_heads, buffer, head_dim), written in place.
            values: the same.
        """
        parts = zip(keys, values, self.is_sliding, strict=True)
        cache = Cache(layers=[FixedLayer(k, v, start, is_sliding) for k, v, is_sliding in parts])
        places = start + torch.arange(ids.shape[1], device=ids.device)
        out = self.model(
            ids,
            attention_mask=torch.arange(keys[0].shape[2], device=ids.device) >= padding[:, None],  # (batch, buffer)
            position_ids=(places - padding[:, None]).clamp(min=0),  # (batch, tokens)
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: torch.Tensor = out.logits[:, 0]
        return logits


def check_architecture(model: PreTrainedModel) -> None:
    """Raises UsageError where a model cannot be run in fixed shapes, with the reason."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kinds = set(layer_kinds(model.config)) - _KINDS
    if kinds:
        raise UsageError(
            f"{name} has layers of the kind {', '.join(sorted(kinds))}: only layers with plain keys and values can be "
            "compiled in fixed shapes; run it without"
        )
    if not model._can_compile_fullgraph:
        raise UsageError(f"transformers does not write {name} as one graph: it cannot be compiled; run it without")
    rope = getattr(config, "rope_parameters", None) or {}
    changing = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)} & _ROPE_BY_LENGTH
    if changing:
        raise UsageError(
            f"{name} has rotary positions of the kind {', '.join(map(str, changing))}, which change "
            "with the length of the text: they cannot be compiled in fixed shapes; run it without"
        )


@torch.no_grad()  # NOTE a trap: tensors made in inference mode cannot be written by an exported graph
def allocate_cache(model: PreTrainedModel, shapes: Shapes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Zeroed keys and values of each layer, (batch, kv_heads, buffer, head_dim); their widths come from a trial run."""
    trial = DynamicCache()
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=trial, use_cache=True)

    def zeros(like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(
            shapes.batch, like.shape[1], shapes.buffer, like.shape[3], dtype=like.dtype, device=like.device
        )

    keys, values = [], []
    for layer in trial.layers:
        assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
        keys.append(zeros(layer.keys))
        values.append(zeros(layer.values))
    return keys, values


def eager_decoder(model: PreTrainedModel, shapes: Shapes) -> FixedShapeDecoder:
    """The plain path beside the compiled ones: the same module, not compiled."""
    keys, values = allocate_cache(model, shapes)
    forward = FixedForward(model)
    return FixedShapeDecoder(shapes, forward, forward, keys, values)
