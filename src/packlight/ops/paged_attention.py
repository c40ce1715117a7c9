"""Attention of many sequences at once, with keys and values in blocks of one pool (PagedAttention, arXiv 2309.06180).

The tokens of a batch lie flat behind each other: a token each of the sequences that are decoded, a chunk each of the
prompts that are read. Every sequence attends to its own blocks alone, over its own length: no padding, and a result
that does not depend on the rest of the batch. `reference` is the same arithmetic spelled out, and serves soft caps and
attention sinks, which torch's kernel does not compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

GATHERED = 4096
"""Tokens whose keys and values are gathered at once: copies that are small enough to be read again from the cache."""


@dataclass(frozen=True)
class Span:
    """One sequence in a flat batch.

    Args:
        first: row of its first token in the batch.
        count: its tokens in the batch.
        past: its tokens before those, which the pool holds.
        blocks: of the pool, in order; they have room for `past + count` tokens.
    """

    first: int
    count: int
    past: int
    blocks: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens that its last token attends to."""
        return self.past + self.count


@dataclass(frozen=True)
class Group:
    """Spans whose blocks are gathered together; `blocks` is (blocks of all spans,)."""

    spans: tuple[Span, ...]
    blocks: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A flat batch of spans.

    Args:
        slots: (tokens,), the place in the pool that each token's key and value go to.
        groups: all spans.
        block: tokens of a block.
    """

    slots: torch.Tensor
    groups: tuple[Group, ...]
    block: int


def make_batch(spans: Sequence[Span], block: int, device: torch.device | str = "cpu") -> Batch:
    """The batch of some spans, which follow each other without a gap."""
    slots = [
        span.blocks[place // block] * block + place % block for span in spans for place in range(span.past, span.total)
    ]
    return Batch(torch.tensor(slots, dtype=torch.int64, device=device), tuple(_groups(spans, block, device)), block)


def write(pool: torch.Tensor, new: torch.Tensor, batch: Batch) -> None:
    """Put keys or values into the pool, in place.

    Args:
        pool: (kv_heads, blocks, block * head_dim).
        new: (kv_heads, tokens, head_dim).
    """
    pool.view(pool.shape[0], -1, new.shape[-1]).index_copy_(1, batch.slots, new)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each span over its own blocks, which hold its new keys and values already.

    Args:
        q: (heads, tokens, head_dim).
        keys: (kv_heads, blocks, block * head_dim).
        values: (kv_heads, blocks, block * value_dim).
        scale: factor of the scores.
        window: tokens that a query looks back to, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: (heads,), a score more per head that takes its share of the softmax and gives nothing.

    Returns:
        (tokens, heads, value_dim).
    """
    kv_heads = keys.shape[0]
    head_dim, value_dim = q.shape[-1], values.shape[-1] // batch.block
    is_plain = softcap is None and sinks is None
    out = q.new_empty(q.shape[1], q.shape[0], value_dim)
    for group in batch.groups:
        k = keys.index_select(1, group.blocks).view(kv_heads, -1, head_dim)  # (kv_heads, gathered tokens, head_dim)
        v = values.index_select(1, group.blocks).view(kv_heads, -1, value_dim)
        start = 0
        for span in group.spans:
            rows, columns = slice(span.first, span.first + span.count), slice(start, start + span.total)
            if is_plain:
                made = _attend(q[:, rows], k[:, columns], v[:, columns], scale, window)
            else:
                made = reference(q[:, rows], k[:, columns], v[:, columns], scale, window, softcap, sinks)
            out[rows] = made.transpose(0, 1)
            start += len(span.blocks) * batch.block
    return out


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence's last tokens, spelled out, in float32.

    Args:
        q: (heads, tokens, head_dim), the last of the keys' tokens.
        k, v: (kv_heads, keys, ...).

    Returns:
        (heads, tokens, value_dim) in the dtype of q.
    """
    heads, tokens, _ = q.shape
    repeats = heads // k.shape[0]
    scores = q.float() @ k.float().repeat_interleave(repeats, 0).transpose(1, 2) * scale  # (heads, tokens, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_seen(tokens, k.shape[1], window, q.device), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, tokens, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
    return (weights @ v.float().repeat_interleave(repeats, 0)).to(q.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """`reference` by torch's kernel."""
    heads, tokens, head_dim = q.shape
    kv_heads, total = k.shape[:2]
    if tokens == 1:
        if window is not None and total > window:
            k, v = k[:, -window:], v[:, -window:]
        grouped = q.reshape(1, kv_heads, heads // kv_heads, head_dim)  # the heads of a group as tokens: no copies of k
        return F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale).view(heads, 1, -1)
    is_whole = tokens == total and (window is None or total <= window)
    mask = None if is_whole else _seen(tokens, total, window, q.device)
    is_grouped = heads != kv_heads
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], mask, is_causal=is_whole, scale=scale, enable_gqa=is_grouped
    )[0]


def _seen(tokens: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(tokens, total): whether a query, one of the last `tokens`, looks at a key."""
    queries = torch.arange(total - tokens, total, device=device)[:, None]
    keys = torch.arange(total, device=device)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _groups(spans: Sequence[Span], block: int, device: torch.device | str) -> list[Group]:
    groups: list[Group] = []
    held: list[Span] = []
    tokens = 0
    for span in spans:
        size = len(span.blocks) * block
        if held and tokens + size > GATHERED:
            groups.append(_group(held, device))
            held, tokens = [], 0
        held.append(span)
        tokens += size
    return [*groups, _group(held, device)] if held else groups


def _group(spans: Sequence[Span], device: torch.device | str) -> Group:
    return Group(tuple(spans), torch.tensor([block for span in spans for block in span.blocks], device=device))
