"""A model of transformers over a paged KV cache: a flat batch of tokens in, logits of some of them out.

transformers passes what its forward is given beyond its own arguments on to the attention function, which finds the
batch there; a key and a value go to their slots of the pool, and every sequence attends to its own blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import mark_static
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from packlight.errors import UsageError
from packlight.ops.paged_attention import Batch, Span, make_batch, paged_attention, write, write_and_attend
from packlight.runtime.compiled import compile_forward_, traced
from packlight.runtime.model_decoder import context_of
from packlight.runtime.serving.blocks import BLOCK

NAME = "packlight_paged"
"""Of the attention function, in transformers' `AttentionInterface`."""

LENGTH_BOUND = ("dynamic", "longrope")
"""Kinds of RoPE scaling whose angles depend on the longest sequence: beyond the original context, one request would
change the answers of the others."""


@dataclass(frozen=True)
class PagedStep:
    """What the attention of every layer needs to know of one step.

    Args:
        batch: where the tokens lie.
        pools: keys and values by layer; a layer's are made when it is first met.
        blocks: of the pools.
    """

    batch: Batch
    pools: dict[int, tuple[torch.Tensor, torch.Tensor]]
    blocks: int


class PagedModel:
    """A model and the pools of its KV cache.

    Args:
        model: its attention is set to the paged one, in place.
        blocks: of `BLOCK` tokens each.

    Raises:
        UsageError: an architecture whose attention cannot be paged.
    """

    def __init__(self, model: PreTrainedModel, blocks: int) -> None:
        self.model, self.blocks = model, blocks
        self.pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        _register()
        _check(model)
        model.set_attn_implementation(NAME)
        self._try()

    def run(self, tokens: Sequence[int], spans: Sequence[Span], wanted: Sequence[int]) -> torch.Tensor:
        """Compute a flat batch; returns the logits of the rows `wanted`, (wanted, vocab), on the CPU.

        Args:
            tokens: ids, those of all spans behind each other.
            spans: where each sequence's tokens are, in the batch and in the pool.
        """
        return self._forward(tokens, spans, wanted)

    def compile(self, backend: str = "inductor") -> float:
        """Compile the model without its head, in place, for any number of tokens; returns the seconds that it took.

        Two graphs are made, for one token and for more; no request makes a third.

        Args:
            backend: of `torch.compile`; only `inductor` makes code, `eager` traces and nothing more.

        Raises:
            UsageError: no C++ compiler, or a model that cannot be traced.
        """
        start = time.perf_counter()
        for pair in self.pools.values():
            for pool in pair:
                mark_static(pool)
        compile_forward_(self.model.base_model, backend)
        # NOTE a trap: sizes that are equal in the first call are taken to be equal for ever. Here all differ: tokens,
        # rows of the table, its columns (4), blocks.
        blocks = (0,) * 5
        with traced():
            self._forward([0], [Span(0, 1, 0, blocks)], [0])
            self._forward([0] * 7, [Span(0, 6, 0, blocks), Span(6, 1, 0, blocks[:3])], [6])
        return time.perf_counter() - start

    def cache_bytes(self) -> int:
        """Bytes of the pools."""
        return sum(tensor.nbytes for pair in self.pools.values() for tensor in pair)

    @torch.inference_mode()
    def hidden(self, tokens: Sequence[int], past: int, blocks: Sequence[int]) -> torch.Tensor:
        """Last hidden states of one text's tokens behind `past` others, (tokens, width), in float32 on the CPU."""
        spans = [Span(0, len(tokens), past, tuple(blocks))]
        positions = _positions(spans, self.model.device)
        body = self.model.base_model
        out = body(self._ids(tokens), position_ids=positions, use_cache=False, paged=self._step(spans))
        states: torch.Tensor = out.last_hidden_state[0]
        return states.float().cpu()

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], spans: Sequence[Span], wanted: Sequence[int]) -> torch.Tensor:
        rows = torch.tensor(wanted, dtype=torch.int64, device=self.model.device)
        logits: torch.Tensor = self.model(
            self._ids(tokens),
            position_ids=_positions(spans, self.model.device),
            use_cache=False,
            logits_to_keep=rows,
            paged=self._step(spans),
        ).logits
        return logits[0].cpu()

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)

    def _step(self, spans: Sequence[Span]) -> PagedStep:
        return PagedStep(make_batch(spans, BLOCK, self.model.device), self.pools, self.blocks)

    def _try(self) -> None:
        """One token through the model: the pools are made, and a layer that does not use them is found out."""
        self._forward([0], [Span(0, 1, 0, (0,))], [0])
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        if len(self.pools) != layers:
            raise _refused(self.model, f"only {len(self.pools)} of its {layers} layers attend over blocks")


def paged_context(config: PreTrainedConfig) -> int | None:
    """Tokens of a request at most, as the model's config has it; None where it does not say."""
    text = config.get_text_config(decoder=True)
    scaling = getattr(text, "rope_parameters", None) or {}
    if scaling.get("rope_type") in LENGTH_BOUND:
        original: int | None = scaling.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if original is not None:
            return original
    return context_of(config)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedStep | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: query (1, heads, tokens, head_dim), key and value alike."""
    if paged is None:
        raise UsageError("a model that was made for serving computes with blocks only: load it again for other uses")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if layer not in paged.pools:
        paged.pools[layer] = (_pool(key, paged), _pool(value, paged))
    keys, values = paged.pools[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap, sinks = more.get("sliding_window"), more.get("softcap"), more.get("s_aux")
    batch = paged.batch
    if torch.compiler.is_compiling():
        out = write_and_attend(
            query[0],
            key[0],
            value[0],
            keys,
            values,
            batch.slots,
            batch.table,
            batch.blocks,
            batch.block,
            scale,
            window,
            softcap,
            sinks,
        )
    else:
        write(keys, key[0], batch.slots)
        write(values, value[0], batch.slots)
        out = paged_attention(query[0], keys, values, batch, scale, window, softcap, sinks)
    return out[None], None


def _pool(states: torch.Tensor, step: PagedStep) -> torch.Tensor:
    """Room for a layer's keys or values, (kv_heads, blocks, block * width)."""
    return states.new_zeros(states.shape[1], step.blocks, BLOCK * states.shape[-1])


def _positions(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """(1, tokens)."""
    return torch.cat([torch.arange(span.past, span.total) for span in spans])[None].to(device)


def _register() -> None:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(**_: Any) -> None:
    """Which keys a query looks at follows from its span."""


def _check(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise _refused(model, "it is not written against transformers' AttentionInterface")


def _refused(model: PreTrainedModel, reason: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} cannot be served in batches: {reason}; ask it with packlight generate, or "
        "export it to GGUF and serve that"
    )
