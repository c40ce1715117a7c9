"""A model of transformers as a `Decoder`: with a KV cache, and without one."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from packlight.plan.kv_cache import KVCacheKind
from packlight.plan.memory import PREFILL_CHUNK
from packlight.runtime import kv_cache
from packlight.runtime.decoder import Decoder
from packlight.runtime.kv_static import StaticLayer
from packlight.runtime.prompts import common_length, pad, positions, unpad

SHARED = 16
"""Tokens that the prompts of a batch must have in common before these are computed apart: a pass of its own reads all
the weights once more."""


class CachedDecoder(Decoder):
    """Keys and values of earlier tokens are kept: a step computes one token.

    What a prompt has in common with the tokens in the cache is not computed again, and what the prompts of a batch have
    in common is computed once, where the kind of the cache allows it (static, offloaded).

    Args:
        capacity: tokens per sequence, prompt and answer together.
        kind: of the KV cache.
        window: tokens that a sliding cache keeps.
    """

    def __init__(
        self, model: PreTrainedModel, capacity: int, kind: KVCacheKind = "static", window: int | None = None
    ) -> None:
        self.model, self.kind, self.window = model, kind, window
        self.capacity: int | None = capacity
        self.reused = 0
        self.cache: Cache | None = None
        self.mask: torch.Tensor | None = None
        self._seen: list[list[int]] = []
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows = unpad(ids, mask)
        self.reused = self._reuse(rows)
        rest, rest_mask = pad([row[self.reused :] for row in rows])
        padded = int(rest_mask.min()) == 0
        self.mask = torch.cat([rest_mask.new_ones(len(rows), self.reused), rest_mask], dim=1) if padded else None
        # Behind padding the columns of a row are no longer those of its tokens.
        self._seen = [row[: self.reused] for row in rows] if padded else rows
        assert self.cache is not None
        return self._run(rest)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        else:
            for row, token in zip(self._seen, ids[:, 0].tolist(), strict=True):
                row.append(token)
        return self._run(ids)

    def free(self) -> None:
        self.cache, self.mask, self._seen, self.reused = None, None, [], 0

    def cache_bytes(self) -> int:
        return 0 if self.cache is None else kv_cache.held_bytes(self.cache)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.cache is not None
        return prefill(self.model, ids, self.cache, self.mask, self.window, self._takes_positions)

    def _reuse(self, rows: list[list[int]]) -> int:
        """Bring the cache to the state after the tokens that need no computing of their own; returns their number."""
        kept = self._keep(rows)
        if kept == 0:
            assert self.capacity is not None
            self.cache = kv_cache.allocate(self.model.config, self.capacity, self.kind, self.window)
        assert self.cache is not None
        shared = common_length(rows)
        if len(rows) > 1 and shared - kept >= SHARED and self._layers():
            self._expand(kept, 1)
            prefill(self.model, torch.tensor([rows[0][kept:shared]]), self.cache)
            self._expand(shared, len(rows))
            kept = shared
        elif kept:
            self._expand(kept, len(rows))
        return kept

    def _keep(self, rows: list[list[int]]) -> int:
        """How many tokens of the cache all of `rows` begin with."""
        if self.cache is None or not self._seen or not self._layers():
            return 0
        return common_length([*rows, *([*row, -1] for row in self._seen)])

    def _layers(self) -> list[StaticLayer]:
        """The cache's layers where each of them can be cut and repeated, else nothing."""
        layers = [] if self.cache is None else self.cache.layers
        found = [layer for layer in layers if isinstance(layer, StaticLayer)]
        return found if len(found) == len(layers) else []

    def _expand(self, tokens: int, batch: int) -> None:
        for layer in self._layers():
            layer.keep(tokens, batch)


class UncachedDecoder(Decoder):
    """Nothing is kept but the tokens: every step computes all of them again, as the textbook's first loop does."""

    reused = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.capacity: int | None = context_of(model.config)
        self.ids: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        device = self.model.device
        self.ids, self.mask = ids.to(device), None if mask is None else mask.to(device)
        return self._run()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.ids is not None
        self.ids = torch.cat([self.ids, ids.to(self.ids.device)], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        return self._run()

    def free(self) -> None:
        self.ids = self.mask = None

    def cache_bytes(self) -> int:
        return 0

    @torch.inference_mode()
    def _run(self) -> torch.Tensor:
        assert self.ids is not None
        more: dict[str, Any] = {}
        if self.mask is not None:
            more["attention_mask"] = self.mask
            if self._takes_positions:
                more["position_ids"] = positions(self.mask)
        with steady_kernels(self.model.device):
            logits: torch.Tensor = self.model(self.ids, use_cache=False, logits_to_keep=1, **more).logits
        return logits[:, -1]


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    takes_positions: bool = True,
) -> torch.Tensor:
    """Add tokens to the cache, a chunk at a time; returns the last position's logits, (batch, vocab).

    Args:
        ids: (batch, tokens).
        mask: (batch, tokens in the cache and new), 0 where padded; None where nothing is.
        window: how far back a query may look in a model that has no windows of its own.
        takes_positions: whether the model's forward has `position_ids`; others find them from the mask.
    """
    logits: torch.Tensor | None = None
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        chunk = ids[:, start : start + PREFILL_CHUNK].to(model.device)
        past = int(cache.get_seq_length())
        end = past + chunk.shape[1]
        more: dict[str, Any] = {}
        if mask is not None:
            more["attention_mask"] = mask[:, :end].to(model.device)
            if takes_positions:
                more["position_ids"] = positions(more["attention_mask"])[:, past:]
        if window is not None and chunk.shape[1] > 1:
            more["attention_mask"] = window_mask(model.dtype, past, end, window, len(ids), mask).to(model.device)
        with steady_kernels(model.device):
            logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1, **more).logits
    assert logits is not None
    return logits[:, -1]


def step(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """One token per sequence, ids (batch, 1); returns the next logits, (batch, vocab)."""
    return prefill(model, ids, cache)


def steady_kernels(device: torch.device) -> AbstractContextManager[None]:
    """NOTE a trap: on CUDA torch may attend with cuDNN, which makes a plan for every length that it has not met: for an
    answer that is every token. All other kernels stay allowed."""
    if device.type != "cuda":
        return nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(others)


def window_mask(
    dtype: torch.dtype, past: int, end: int, window: int, batch: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """What queries `past` to `end` may look at in a sliding cache: 0, and elsewhere the least number of the dtype.

    Returns:
        (batch, 1, queries, keys), the keys being the last `window - 1` tokens of the past and the queries' own.
    """
    queries = torch.arange(past, end)[:, None]
    keys = torch.arange(max(0, past - window + 1), end)[None, :]
    seen = ((keys <= queries) & (keys > queries - window)).expand(batch, 1, -1, -1)
    if mask is not None:
        seen = seen & mask[:, None, None, keys[0]].bool()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for, None where the config does not say."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found
