"""Attention twice: the softmax over whole rows, and the tiled form that never holds more than one block of scores.

    O = softmax(scale Q K^T) V,   a row at a time:   O_i = sum_j exp(s_ij - m_i) v_j / l_i,
    m_i = max_j s_ij,   l_i = sum_j exp(s_ij - m_i).

A softmax can be taken block by block, because a sum of exponentials that was formed against an old maximum is brought
to a new one by a single factor (online softmax, arXiv 1805.02867). FlashAttention (Dao et al., arXiv 2205.14135)
computes attention so, in blocks that fit the fast memory; FlashAttention-2 (arXiv 2307.08691, algorithm 1) takes one
block of queries at a time, runs over the blocks of keys and divides by l once, at the end:

    m' = max(m, rowmax S),   P = exp(S - m'),   O <- exp(m - m') O + P V_j,   l <- exp(m - m') l + rowsum P

and then O / l and L = m + log l, which is all that a backward pass needs besides the inputs.

Both functions have one signature and one result; `tiled_attention` is the reference to read and to test against, not a
fast kernel. Both count what they move between slow and fast memory when they are handed a `Traffic`.

Shapes: q (..., heads, tokens, head_dim), k and v (..., kv_heads, keys, head_dim), where heads is a multiple of
kv_heads (grouped-query attention) and v may have a width of its own. A mask broadcasts to (..., heads, tokens, keys);
it is boolean, True where a query sees a key, or a float that is added to the scores. Causal attention is aligned to
the end: the last query sees every key. A query that sees no key gets zeros and L = -inf.
"""

from __future__ import annotations

import math

import torch

from packlight.errors import UsageError
from packlight.ops.attention_traffic import Traffic

BLOCK = 64
"""Rows of queries and of keys in a block, unless said otherwise."""


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    traffic: Traffic | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with all scores in memory at once: S = scale Q K^T, P = softmax(S), O = P V.

    Args:
        scale: of the scores; default 1 / sqrt(head_dim).
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask.
        traffic: what is moved is added to it, where S and P are written to slow memory and read back (arXiv
            2205.14135, algorithm 0).

    Returns:
        O (..., heads, tokens, width of v) in the dtype of q, and L (..., heads, tokens), the logarithm of the sum of
        the exponentials of a row's scores, in the dtype of the sums: float32, or float64 for float64.

    Raises:
        UsageError: shapes that do not belong together.
    """
    query, key, value, mask = _grouped(q, k, v, mask)
    scores = _scores(query, key, _scale(q, scale), softcap)  # (..., kv_heads, group, tokens, keys)
    scores = _masked(scores, mask)
    if is_causal:
        scores = scores.masked_fill(~_causal(q.shape[-2], k.shape[-2], q.device), -math.inf)
    top = _finite(scores.amax(dim=-1, keepdim=True)) if k.shape[-2] else scores.new_zeros(*scores.shape[:-1], 1)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)  # (..., tokens, 1)
    output = weights @ value.to(weights.dtype) / _no_zero(total)
    if traffic is not None:
        traffic.load(query, key)
        traffic.store(scores)
        traffic.load(scores)
        traffic.store(weights)
        traffic.load(weights, value)
        traffic.store(output)
    return _ungrouped(output, q).to(q.dtype), _ungrouped(top + total.log(), q).squeeze(-1)


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    traffic: Traffic | None = None,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, one block of scores (block_q, block_k) at a time: memory grows with the tokens, not with their square.

    Blocks that a causal or a given mask hides wholly are passed over.

    Args:
        block_q, block_k: queries and keys in a block; they need not divide the numbers of tokens.

    See `softmax_attention` for everything else. Raises UsageError also for a block of no rows.
    """
    if block_q < 1 or block_k < 1:
        raise UsageError(f"a block of attention has at least one query and one key, not {block_q} and {block_k}")
    query, key, value, mask = _grouped(q, k, v, mask)
    tokens, keys, scale = q.shape[-2], k.shape[-2], _scale(q, scale)
    offset = keys - tokens  # query i sees the keys up to i + offset
    sums = _sums_dtype(q)
    output = query.new_zeros(*query.shape[:-1], v.shape[-1])
    logsumexp = query.new_zeros(query.shape[:-1], dtype=sums)
    for start in range(0, tokens, block_q):
        rows = slice(start, min(start + block_q, tokens))
        q_block = query[..., rows, :]  # (..., kv_heads, group, block_q, head_dim)
        o = q_block.new_zeros(*q_block.shape[:-1], v.shape[-1], dtype=sums)
        m = q_block.new_full((*q_block.shape[:-1], 1), -math.inf, dtype=sums)
        l = torch.zeros_like(m)  # noqa: E741 - the paper's name
        if traffic is not None:
            traffic.load(q_block)
        visible = min(keys, rows.stop + offset) if is_causal else keys
        for left in range(0, visible, block_k):
            columns = slice(left, min(left + block_k, keys))
            block_mask = None if mask is None else _tile(mask, rows, columns)
            if block_mask is not None and _hides_all(block_mask):
                continue
            k_block, v_block = key[..., columns, :], value[..., columns, :]
            s = _masked(_scores(q_block, k_block, scale, softcap), block_mask)
            if is_causal and columns.stop - 1 > rows.start + offset:  # the block lies on the diagonal
                s = s.masked_fill(~_causal(tokens, keys, q.device, rows, columns), -math.inf)
            m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
            # While all of a row is hidden its maximum is -inf, and -inf - -inf would be NaN.
            p = (s - _finite(m_new)).exp()
            shrink = (m - _finite(m_new)).exp()
            o = shrink * o + p @ v_block.to(sums)
            l = shrink * l + p.sum(dim=-1, keepdim=True)  # noqa: E741
            m = m_new
            if traffic is not None:
                traffic.load(k_block, v_block)
        output[..., rows, :] = (o / _no_zero(l)).to(q.dtype)
        logsumexp[..., rows] = (_finite(m) + l.log()).squeeze(-1)
        if traffic is not None:
            traffic.store(o, l)
    return _ungrouped(output, q), logsumexp.reshape(q.shape[:-1])


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries as (..., kv_heads, group, tokens, head_dim), the rest so that it broadcasts: no key is copied."""
    if q.ndim < 3 or k.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or k.shape[-1] != q.shape[-1]:
        raise UsageError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not belong together: "
            "give (..., heads, tokens, head_dim), with as many values as keys"
        )
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if kv_heads == 0 or heads % kv_heads or q.shape[:-3] != k.shape[:-3]:
        raise UsageError(
            f"{tuple(q.shape)} queries cannot share {tuple(k.shape)} keys: "
            "the heads of the queries must be a multiple of those of the keys"
        )
    if mask is not None:
        try:
            mask = mask.expand(*q.shape[:-1], k.shape[-2])
        except RuntimeError as error:
            wanted = (*q.shape[:-1], k.shape[-2])
            raise UsageError(f"a mask {tuple(mask.shape)} does not broadcast to the scores {wanted}") from error
        mask = mask.unflatten(-3, (kv_heads, heads // kv_heads))
    return q.unflatten(-3, (kv_heads, heads // kv_heads)), k.unsqueeze(-3), v.unsqueeze(-3), mask


def _ungrouped(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.reshape(*q.shape[:-1], x.shape[-1])


def _sums_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    sums = _sums_dtype(query)
    scores = (query.to(sums) * scale) @ key.to(sums).transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _tile(mask: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return mask[..., rows, columns]


def _hides_all(mask: torch.Tensor) -> bool:
    return not bool((mask if mask.dtype == torch.bool else mask > -math.inf).any())


def _causal(
    tokens: int, keys: int, device: torch.device, rows: slice | None = None, columns: slice | None = None
) -> torch.Tensor:
    """Which keys the queries see, boolean (tokens, keys), or the part of it in some rows and columns."""
    rows, columns = rows or slice(0, tokens), columns or slice(0, keys)
    last = torch.arange(rows.start, rows.stop, device=device)[:, None] + (keys - tokens)
    return torch.arange(columns.start, columns.stop, device=device) <= last


def _finite(m: torch.Tensor) -> torch.Tensor:
    """Maxima to subtract: 0 where a row has seen no key yet."""
    return torch.where(m == -math.inf, 0.0, m)


def _no_zero(total: torch.Tensor) -> torch.Tensor:
    """Sums to divide by: 1 where a row saw no key, so that 0 / 1 = 0."""
    return torch.where(total == 0, 1.0, total)
