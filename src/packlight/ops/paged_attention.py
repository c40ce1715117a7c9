"""Attention of many sequences at once, with keys and values in blocks of one pool (PagedAttention, arXiv 2309.06180).

The tokens of a batch lie flat behind each other: a token each of the sequences that are decoded, a chunk each of the
prompts that are read. Every sequence attends to its own blocks alone, over its own length; those of a token each and
of about the same length together. `reference` is the same arithmetic spelled out, and serves soft caps and
attention sinks, which torch's kernel does not compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional as F

GATHERED = 4096
"""Tokens whose keys and values are gathered at once: copies that are small enough to be read again from the cache."""
PADDED = 1.2
"""Sequences of a token each are attended to together while, filled up to the longest, they have no more than so many
times their own blocks: a call of torch's kernel costs as much as some blocks more."""


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
class Batch:
    """A flat batch of spans, as tensors.

    Args:
        slots: (tokens,), the place in the pool that each token's key and value go to.
        table: (spans + 1, 4): first, count, past and number of blocks of each span. The last row is empty, as is the
            last of `blocks`: a compiler makes code of its own for sizes of 1.
        blocks: (blocks of all spans + 1,).
        block: tokens of a block.
    """

    slots: torch.Tensor
    table: torch.Tensor
    blocks: torch.Tensor
    block: int

    @cached_property
    def spans(self) -> list[Span]:
        """The rows of the table."""
        blocks, start, made = self.blocks.tolist(), 0, []
        for first, count, past, held in self.table.tolist()[:-1]:
            made.append(Span(first, count, past, tuple(blocks[start : start + held])))
            start += held
        return made

    @cached_property
    def groups(self) -> list[Group]:
        """The spans of a token each, by length."""
        return [_group(spans, self.block, self.slots.device) for spans in _alike(self.spans, self.block)]


@dataclass(frozen=True)
class Group:
    """Spans of a token each whose lengths are about the same.

    Args:
        rows: (spans,), of the batch.
        blocks: (spans * width,), each span's filled up with its first to the same number.
        lengths: (spans,), tokens that each attends to.
        width: tokens of the blocks of one span.
        masks: by window, what was made already.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor
    width: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """(1, spans, 1, width): whether a span looks at a key."""
        if window not in self.masks:
            places = torch.arange(self.width, device=self.rows.device)
            seen = places < self.lengths[:, None]
            if window is not None:
                seen = seen & (places >= self.lengths[:, None] - window)
            self.masks[window] = seen[None, :, None, :]
        return self.masks[window]


def make_batch(spans: Sequence[Span], block: int, device: torch.device | str = "cpu") -> Batch:
    """The batch of some spans, which follow each other without a gap."""
    slots = [
        span.blocks[place // block] * block + place % block for span in spans for place in range(span.past, span.total)
    ]
    table = [[span.first, span.count, span.past, len(span.blocks)] for span in spans]
    blocks = [block for span in spans for block in span.blocks]
    return Batch(
        torch.tensor(slots, dtype=torch.int64, device=device),
        torch.tensor([*table, [0, 0, 0, 0]]),
        torch.tensor([*blocks, 0], device=device),
        block,
    )


def write(pool: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> None:
    """Put keys or values into the pool, in place.

    Args:
        pool: (kv_heads, blocks, block * head_dim).
        new: (kv_heads, tokens, head_dim).
        slots: (tokens,).
    """
    pool.view(pool.shape[0], -1, new.shape[-1]).index_copy_(1, slots, new)


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
        keys: (kv_heads, blocks, block * head_dim), finite also where nothing was written.
        values: (kv_heads, blocks, block * value_dim), likewise.
        scale: factor of the scores.
        window: tokens that a query looks back to, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: (heads,), a score more per head that takes its share of the softmax and gives nothing.

    Returns:
        (tokens, heads, value_dim).
    """
    out = q.new_empty(q.shape[1], q.shape[0], values.shape[-1] // batch.block)
    is_plain = softcap is None and sinks is None
    for group in batch.groups if is_plain else ():
        out[group.rows] = _decode(q, keys, values, group, batch.block, scale, window)
    for span in batch.spans:
        if span.count == 1 and is_plain:
            continue
        blocks = torch.tensor(span.blocks, device=q.device)
        k, v = (_gather(pool, blocks, batch.block)[:, : span.total] for pool in (keys, values))
        rows = slice(span.first, span.first + span.count)
        if is_plain:
            made = _attend(q[:, rows], k, v, scale, window)
        else:
            made = reference(q[:, rows], k, v, scale, window, softcap, sinks)
        out[rows] = made.transpose(0, 1)
    return out


@torch.library.custom_op("packlight::write_and_attend", mutates_args=("keys", "values"))
def write_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    blocks: torch.Tensor,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`write` of k and v (kv_heads, tokens, ...), then `paged_attention`: one node for a compiler, for any spans."""
    write(keys, k, slots)
    write(values, v, slots)
    return paged_attention(q, keys, values, Batch(slots, table, blocks, block), scale, window, softcap, sinks)


@write_and_attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    blocks: torch.Tensor,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape[1], q.shape[0], v.shape[-1])


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


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    block: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`reference` for one token of each span of a group, (spans, heads, value_dim), in one call."""
    (heads, _, head_dim), kv_heads, count = q.shape, keys.shape[0], len(group.rows)
    k = _gather(keys, group.blocks, block).view(kv_heads, count, group.width, head_dim)
    v = _gather(values, group.blocks, block).view(kv_heads, count, group.width, -1)
    # The heads of a group as tokens: no copies of keys. (kv_heads, spans, heads / kv_heads, head_dim)
    grouped = q.index_select(1, group.rows).view(kv_heads, heads // kv_heads, count, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(grouped, k, v, group.mask(window), scale=scale)
    return out.permute(1, 0, 2, 3).reshape(count, heads, -1)


def _gather(pool: torch.Tensor, blocks: torch.Tensor, block: int) -> torch.Tensor:
    """(kv_heads, tokens of the blocks, width)."""
    return pool.index_select(1, blocks).view(pool.shape[0], len(blocks) * block, -1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """`reference` for several tokens by torch's kernel."""
    (heads, tokens, _), (kv_heads, total, _) = q.shape, k.shape
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


def _alike(spans: Sequence[Span], block: int) -> Iterator[list[Span]]:
    """The spans of a token each in groups of about the same number of blocks."""
    held: list[Span] = []
    total = 0
    for span in sorted((one for one in spans if one.count == 1), key=lambda one: len(one.blocks)):
        longest = len(span.blocks)
        filled = longest * (len(held) + 1)
        if held and (filled > PADDED * (total + longest) or filled * block > GATHERED):
            yield held
            held, total = [], 0
        held.append(span)
        total += longest
    if held:
        yield held


def _group(spans: Sequence[Span], block: int, device: torch.device) -> Group:
    longest = max(len(span.blocks) for span in spans)
    blocks = [[*span.blocks, *span.blocks[:1] * (longest - len(span.blocks))] for span in spans]
    return Group(
        torch.tensor([span.first for span in spans], device=device),
        torch.tensor(blocks, device=device).flatten(),
        torch.tensor([span.total for span in spans], device=device),
        longest * block,
    )
