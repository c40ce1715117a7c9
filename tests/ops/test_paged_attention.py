"""Paged attention: each sequence's result is that of its own keys and values, whatever lies beside it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.ops import paged_attention as module
from packlight.ops.paged_attention import Span, make_batch, paged_attention, reference, write

BLOCK = 4
KV_HEADS, REPEATS, HEAD_DIM, VALUE_DIM = 2, 3, 8, 6
SCALE = HEAD_DIM**-0.5

lengths = st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 9]), st.integers(0, 21)), min_size=1, max_size=7)
"""(new tokens, tokens before them) of each sequence."""


def random_batch(sizes: list[tuple[int, int]], seed: int) -> tuple[list[Span], list[torch.Tensor], list[torch.Tensor]]:
    """Spans over blocks in random places, and the whole keys and values of each."""
    torch.manual_seed(seed)
    needed = [-(-(count + past) // BLOCK) for count, past in sizes]
    places = random.Random(seed).sample(range(sum(needed) + 3), sum(needed))
    spans, first = [], 0
    for (count, past), blocks in zip(sizes, needed, strict=True):
        spans.append(Span(first, count, past, tuple(places[:blocks])))
        places, first = places[blocks:], first + count
    keys = [torch.randn(KV_HEADS, span.total, HEAD_DIM) for span in spans]
    values = [torch.randn(KV_HEADS, span.total, VALUE_DIM) for span in spans]
    return spans, keys, values


def fill(spans: list[Span], states: list[torch.Tensor]) -> torch.Tensor:
    """A pool that holds the past of each sequence and then its new tokens, and large numbers elsewhere."""
    width = states[0].shape[-1]
    count = max(block for span in spans for block in span.blocks) + 1
    pool = torch.full((KV_HEADS, count, BLOCK * width), 1e3)
    before = [Span(0, span.past, 0, span.blocks) for span in spans]
    for span, one in zip(before, states, strict=True):
        write(pool, one[:, : span.count], make_batch([span], BLOCK).slots)
    new = torch.cat([one[:, span.past :] for span, one in zip(spans, states, strict=True)], dim=1)
    write(pool, new, make_batch(spans, BLOCK).slots)
    return pool


@pytest.mark.parametrize(("gathered", "padded"), [(1, 9.0), (30, 1.2), (10**6, 1.0), (10**6, 9.0)])
@given(sizes=lengths, seed=st.integers(0, 99), window=st.sampled_from([None, 1, 5, 100]))
@settings(max_examples=40, deadline=None)
def test_every_sequence_attends_to_its_own_blocks(
    gathered: int, padded: float, sizes: list[tuple[int, int]], seed: int, window: int | None
) -> None:
    spans, keys, values = random_batch(sizes, seed)
    q = torch.randn(KV_HEADS * REPEATS, sum(span.count for span in spans), HEAD_DIM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHERED", gathered)
        patch.setattr(module, "PADDED", padded)
        made = paged_attention(q, fill(spans, keys), fill(spans, values), make_batch(spans, BLOCK), SCALE, window)
    for span, k, v in zip(spans, keys, values, strict=True):
        rows = slice(span.first, span.first + span.count)
        wanted = reference(q[:, rows], k, v, SCALE, window)
        torch.testing.assert_close(made[rows], wanted.transpose(0, 1))


def test_the_reference_is_softmax() -> None:
    q, k, v = torch.randn(2, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    scores = (q @ k.transpose(1, 2)) * 0.5
    scores[:, 0, 3:] = scores[:, 1, 4:] = -torch.inf  # the queries are the last three of five tokens
    torch.testing.assert_close(reference(q, k, v, 0.5), torch.softmax(scores, -1) @ v)


def test_sinks_take_their_share_and_soft_caps_bound_the_scores() -> None:
    torch.manual_seed(0)
    spans, keys, values = random_batch([(1, 6), (4, 0)], 1)
    q = torch.randn(KV_HEADS * REPEATS, 5, HEAD_DIM)
    pools = fill(spans, keys), fill(spans, values)
    batch = make_batch(spans, BLOCK)
    plain = paged_attention(q, *pools, batch, SCALE)
    none = torch.full((KV_HEADS * REPEATS,), -torch.inf)
    torch.testing.assert_close(paged_attention(q, *pools, batch, SCALE, sinks=none), plain)
    torch.testing.assert_close(paged_attention(q, *pools, batch, SCALE, softcap=1e4), plain, atol=1e-4, rtol=1e-3)
    huge = torch.full((KV_HEADS * REPEATS,), 50.0)
    assert paged_attention(q, *pools, batch, SCALE, sinks=huge).abs().max() < 1e-6
    flat = paged_attention(q, *pools, batch, SCALE, softcap=1e-6)
    torch.testing.assert_close(flat[0], values[0].mean(dim=1).repeat_interleave(REPEATS, 0), atol=1e-4, rtol=1e-4)
