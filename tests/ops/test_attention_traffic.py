"""The formulas count what loops that run really move."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.ops.attention import softmax_attention, tiled_attention
from packlight.ops.attention_traffic import (
    Traffic,
    flash1_blocks,
    flash1_traffic,
    standard_traffic,
    tiled_blocks,
    tiled_traffic,
)


def one_head(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, width, generator=generator) for _ in range(3))
    return q, k, v


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_the_tiled_loop_moves_what_its_formula_says(
    tokens: int, width: int, block_q: int, block_k: int, is_causal: bool
) -> None:
    counted = Traffic()
    tiled_attention(*one_head(tokens, width), is_causal=is_causal, traffic=counted, block_q=block_q, block_k=block_k)
    assert counted == tiled_traffic(tokens, width, block_q, block_k, is_causal)


def test_grouped_heads_share_what_is_loaded() -> None:
    """Keys and values come once for all queries of their group: the work of two heads with one head's loads of them."""
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    counted, one = Traffic(), tiled_traffic(12, 8, 5, 5)
    tiled_attention(q, k, v, traffic=counted, block_q=5, block_k=5)
    assert counted.stores == 4 * one.stores
    assert counted.loads == 4 * 12 * 8 + 2 * (one.loads - 12 * 8)


def test_blocks_that_a_mask_hides_are_not_loaded() -> None:
    q, k, v = one_head(40, 4)
    window = torch.ones(40, 40, dtype=torch.bool).tril().triu(-7)
    full, windowed, additive = Traffic(), Traffic(), Traffic()
    tiled_attention(q, k, v, traffic=full, block_q=8, block_k=8)
    tiled_attention(q, k, v, window, traffic=windowed, block_q=8, block_k=8)
    tiled_attention(q, k, v, torch.where(window, 0.0, -math.inf), traffic=additive, block_q=8, block_k=8)
    assert windowed == additive
    assert full.loads == 40 * 4 + 25 * 2 * 8 * 4
    assert windowed.loads == 40 * 4 + 9 * 2 * 8 * 4  # the diagonal and the blocks left of it


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_the_plain_form_moves_what_its_formula_says(tokens: int) -> None:
    counted = Traffic()
    softmax_attention(*one_head(tokens, 8), traffic=counted)
    assert counted == standard_traffic(tokens, 8)


def algorithm_1(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sram: int) -> tuple[torch.Tensor, Traffic]:
    """FlashAttention's forward pass as the paper has it (arXiv 2205.14135), with its loads and stores counted."""
    (tokens, width), moved = q.shape, Traffic()
    block_q, block_k = flash1_blocks(width, sram)
    o, l, m = torch.zeros_like(q), torch.zeros(tokens, 1), torch.full((tokens, 1), -math.inf)  # noqa: E741
    for left in range(0, tokens, block_k):
        kj, vj = k[left : left + block_k], v[left : left + block_k]
        moved.load(kj, vj)
        for top in range(0, tokens, block_q):
            i = slice(top, top + block_q)
            moved.load(q[i], o[i], l[i], m[i])
            s = q[i] @ kj.T / width**0.5
            m_tile = s.amax(1, keepdim=True)
            p = (s - m_tile).exp()
            m_new = torch.maximum(m[i], m_tile)
            l_new = (m[i] - m_new).exp() * l[i] + (m_tile - m_new).exp() * p.sum(1, keepdim=True)
            o[i] = (l[i] * (m[i] - m_new).exp() * o[i] + (m_tile - m_new).exp() * (p @ vj)) / l_new
            l[i], m[i] = l_new, m_new
            moved.store(o[i], l[i], m[i])
    return o, moved


@pytest.mark.parametrize(("tokens", "width", "sram"), [(16, 4, 64), (50, 4, 100), (33, 8, 300), (9, 8, 32)])
def test_the_papers_loop_moves_what_its_formula_says(tokens: int, width: int, sram: int) -> None:
    q, k, v = one_head(tokens, width)
    output, counted = algorithm_1(q[0], k[0], v[0], sram)
    assert (output - softmax_attention(q, k, v)[0][0]).abs().max() < 1e-6
    assert counted == flash1_traffic(tokens, width, sram)


def test_traffic_grows_as_the_theorem_says() -> None:
    """Theta(N^2 d^2 / M): four times for twice the tokens, half for twice the fast memory."""
    base = flash1_traffic(65536, 64, 65536).total
    assert flash1_traffic(131072, 64, 65536).total == pytest.approx(4 * base, rel=0.01)
    assert flash1_traffic(65536, 64, 131072).total == pytest.approx(base / 2, rel=0.01)
    assert flash1_traffic(65536, 128, 65536).total == pytest.approx(4 * base, rel=0.05)
    assert standard_traffic(131072, 64).total == pytest.approx(4 * standard_traffic(65536, 64).total, rel=0.01)
    assert base < standard_traffic(65536, 64).total / 3


def test_tiled_blocks_fill_the_fast_memory() -> None:
    for width, sram in ((64, 4096 * 16), (128, 100_000), (1, 100)):
        block, same = tiled_blocks(width, sram)
        assert block == same
        assert 4 * block * width + block**2 <= sram < 4 * (block + 1) * width + (block + 1) ** 2


def test_flash1_blocks_are_the_papers() -> None:
    assert flash1_blocks(64, 65536) == (64, 256)
    assert flash1_blocks(64, 1024) == (4, 4)


@pytest.mark.parametrize("blocks", [flash1_blocks, tiled_blocks])
def test_a_fast_memory_without_room_for_a_row_is_refused(blocks) -> None:
    with pytest.raises(UsageError, match="255 elements"):
        blocks(64, 255)
