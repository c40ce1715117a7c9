"""Tiled attention is softmax attention: any block sizes, any mask, any heads; and it holds no matrix of scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.errors import UsageError
from packlight.ops.attention import softmax_attention, tiled_attention

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(tokens: int, keys: int, *, num: int = 4, kv: int = 2, width: int = 8, batch: int = 2, seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, num, tokens, width), (batch, kv, keys, width), (batch, kv, keys, width))
    q, k, v = (torch.randn(*shape, generator=generator) for shape in shapes)
    return q, k, v


def random_mask(q: torch.Tensor, k: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Half of the keys hidden, and all of them from some queries."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(q), 1, q.shape[-2], k.shape[-2], generator=generator) < 0.5
    mask[:, :, ::3] = False
    return mask


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """In float64; torch has no causal mask that is aligned to the end."""
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)


def causal(tokens: int, keys: int) -> torch.Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (7, 7), (37, 37), (5, 37), (1, 37), (64, 64)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_both_are_what_torch_computes(tokens: int, keys: int, is_causal: bool, kv: int) -> None:
    q, k, v = heads(tokens, keys, kv=kv)
    wanted = torch_attention(q, k, v, causal(tokens, keys) if is_causal else None)
    plain, plain_sums = softmax_attention(q, k, v, is_causal=is_causal)
    assert (plain - wanted).abs().max() < 1e-6
    for block_q, block_k in ((1, 1), (3, 5), (16, 4), (100, 7)):
        tiled, sums = tiled_attention(q, k, v, is_causal=is_causal, block_q=block_q, block_k=block_k)
        assert (tiled - wanted).abs().max() < 1e-6
        assert (sums - plain_sums).abs().max() < 1e-5


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    st.booleans(),
    st.sampled_from(["none", "bool", "additive"]),
    st.integers(0, 2**20),
)
def test_any_blocks_and_masks_give_the_same(
    tokens: int, more: int, block_q: int, block_k: int, num_kv: tuple[int, int], is_causal: bool, kind: str, seed: int
) -> None:
    num, kv = num_kv
    q, k, v = heads(tokens, tokens + more, num=num, kv=kv, seed=seed)
    mask: torch.Tensor | None = random_mask(q, k, seed)
    if kind == "none":
        mask = None
    elif kind == "additive":
        assert mask is not None
        mask = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)), -math.inf)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3}
    wanted, wanted_sums = softmax_attention(q.double(), k.double(), v.double(), mask, **options)
    made, sums = tiled_attention(q, k, v, mask, **options, block_q=block_q, block_k=block_k)
    assert made.shape == wanted.shape and sums.shape == wanted_sums.shape == q.shape[:-1]
    assert torch.isfinite(made).all()
    assert torch.allclose(made.double(), wanted, atol=1e-6, rtol=0)
    assert torch.allclose(sums.double(), wanted_sums, atol=1e-5)  # -inf where no key is seen, in both


def test_queries_that_see_nothing_get_zeros_and_no_sum() -> None:
    q, k, v = heads(9, 9)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    for attention in (softmax_attention, tiled_attention):
        output, sums = attention(q, k, v, mask)
        assert torch.equal(output[:, :, 4], torch.zeros_like(output[:, :, 4]))
        assert (sums[:, :, 4] == -math.inf).all()
        assert torch.isfinite(sums[:, :, :4]).all() and (output[:, :, :4].abs() > 0).all()


def test_more_queries_than_keys_leave_the_first_ones_without_any() -> None:
    q, k, v = heads(8, 5)
    output, sums = tiled_attention(q, k, v, is_causal=True, block_q=2, block_k=2)
    wanted, _ = softmax_attention(q, k, v, is_causal=True)
    assert torch.equal(output[:, :, :3], torch.zeros_like(output[:, :, :3]))
    assert (sums[:, :, :3] == -math.inf).all() and torch.isfinite(sums[:, :, 3:]).all()
    assert (output - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("attention", [softmax_attention, tiled_attention])
def test_large_scores_do_not_overflow(attention: Any) -> None:
    q, k, v = heads(6, 6)
    output, sums = attention(q * 1e4, k * 1e4, v)
    assert torch.isfinite(output).all() and torch.isfinite(sums).all()
    assert (output - torch_attention(q * 1e4, k * 1e4, v, None)).abs().max() < 1e-3


@pytest.mark.parametrize("attention", [softmax_attention, tiled_attention])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_kept_in_float32_at_least(attention: Any, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(33, 33))
    output, sums = attention(q, k, v)
    assert output.dtype == dtype
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = torch_attention(q, k, v, None)
    assert (output.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max() + 1e-14


def test_values_may_be_wider_than_keys_and_scores_capped() -> None:
    q, k, _ = heads(9, 12)
    v = torch.randn(2, 2, 12, 5, generator=torch.Generator().manual_seed(1))
    wanted, _ = softmax_attention(q, k, v, softcap=2.0)
    made, _ = tiled_attention(q, k, v, softcap=2.0, block_k=5)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 8**0.5
    exact = (2 * torch.tanh(scores / 2)).softmax(-1) @ v.double().repeat_interleave(2, 1)
    assert made.shape == (2, 4, 9, 5)
    assert (made - exact).abs().max() < 1e-6 and (wanted - exact).abs().max() < 1e-6


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_of_the_tiled_form_is_larger_than_its_inputs_or_its_blocks(is_causal: bool) -> None:
    """Memory O(N B): neither scores nor a causal mask of N x N elements."""
    q, k, v = heads(512, 512, num=1, kv=1, batch=1)
    for attention, options in ((softmax_attention, {}), (tiled_attention, {"block_q": 16, "block_k": 32})):
        with LargestResult() as largest:
            attention(q, k, v, is_causal=is_causal, **options)
        if attention is tiled_attention:
            assert largest.numel == max(q.numel(), 16 * 32)
        else:
            assert largest.numel == 512 * 512


@pytest.mark.parametrize("attention", [softmax_attention, tiled_attention])
def test_shapes_that_do_not_belong_together_are_refused(attention: Any) -> None:
    q, k, v = heads(5, 7)
    for bad in ((q, k[..., :4], v), (q, k, v[:, :, :3]), (q[:, :3], k, v), (q[0], k, v), (q[0, 0], k[0, 0], v[0, 0])):
        with pytest.raises(UsageError):
            attention(*bad)
    with pytest.raises(UsageError, match="does not broadcast"):
        attention(q, k, v, torch.ones(3, 7, dtype=torch.bool))


def test_blocks_of_no_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="not 0 and 4"):
        tiled_attention(*heads(5, 5), block_q=0, block_k=4)
