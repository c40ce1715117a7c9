"""Hadamard matrices: orthogonal, of signs only, and applied without being formed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.ops.hadamard import BASES, hadamard, is_available, random_signs, randomized_hadamard, rotate

SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 40, 56, 64, 96, 144, 240, 288, 336, 400, 560, 576, 784, 896, 960, 1536]
IMPOSSIBLE = [-4, 0, 3, 5, 6, 7, 14, 18, 36, 44, 52, 60, 72, 100, 11008, 4864]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_orthonormal_and_has_entries_of_one_magnitude(n: int) -> None:
    assert is_available(n)
    made = hadamard(n)
    assert made.shape == (n, n) and made.dtype == torch.float64
    signs = made * math.sqrt(n)
    assert torch.allclose(signs.abs(), torch.ones_like(signs), rtol=0, atol=1e-14)
    assert torch.equal(signs.round() @ signs.round().T, n * torch.eye(n, dtype=torch.float64))
    assert torch.allclose(made @ made.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", IMPOSSIBLE)
def test_an_impossible_order_is_refused_in_one_sentence(n: int) -> None:
    assert not is_available(n)
    for make in (hadamard, lambda n: randomized_hadamard(n, 0), lambda n: rotate(torch.ones(2, max(n, 1)), n)):
        with pytest.raises(UsageError, match=f"no Hadamard matrix of order {n} here: choose a power of two"):
            make(n)


def test_the_available_orders_are_the_products() -> None:
    products = {1}
    for factor in (2, *BASES.values()):
        grown = products
        while grown := {n * factor for n in grown if n * factor <= 4096}:
            products = products | grown
    assert {n for n in range(4097) if is_available(n)} == products


@pytest.mark.parametrize("hidden", [576, 960, 768, 896, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192, 8960, 14336])
def test_the_widths_of_common_models_are_available(hidden: int) -> None:
    assert is_available(hidden)


def test_a_seed_determines_the_randomized_matrix() -> None:
    first, again, other = (randomized_hadamard(96, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(first @ first.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(first.abs(), hadamard(96).abs())
    assert set(random_signs(96, 7).tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("n", SIZES[:20])
def test_rotating_is_multiplying(n: int) -> None:
    x = normal(3, 2, n)
    assert torch.allclose(rotate(x, n), x @ hadamard(n), rtol=0, atol=1e-12)
    assert torch.allclose(rotate(x, n, inverse=True), x @ hadamard(n).T, rtol=0, atol=1e-12)
    assert torch.allclose(rotate(x * random_signs(n, 1), n), x @ randomized_hadamard(n, 1), rtol=0, atol=1e-12)


def test_each_head_is_rotated_on_its_own() -> None:
    x = normal(5, 3 * 24)
    wanted = torch.cat([part @ hadamard(24) for part in x.split(24, dim=1)], dim=1)
    assert torch.allclose(rotate(x, 24), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 30), (30,), ()])
def test_columns_that_the_order_does_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="a rotation of order 12 needs rows of a multiple of 12 columns"):
        rotate(torch.ones(shape), 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_rotation_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x = normal(8, 96, dtype=dtype)
    made = rotate(x, 96)
    assert made.dtype == dtype and made.shape == x.shape
    exact = x.double() @ hadamard(96)
    assert bool(((made.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all())


def test_an_empty_batch_stays_empty() -> None:
    assert rotate(torch.empty(0, 24), 12).shape == (0, 24)


def test_a_rotation_spreads_an_outlier_evenly() -> None:
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 100] = 48.0
    assert torch.allclose(rotate(x, 576).abs(), torch.full_like(x, 2.0), rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SIZES[:16]), st.integers(1, 5), st.integers(0, 2**31))
def test_a_rotation_is_undone_and_keeps_lengths(n: int, rows: int, seed: int) -> None:
    x = normal(rows, n, seed=seed)
    rotated = rotate(x, n)
    assert torch.allclose(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(rotate(rotated, n, inverse=True), x, rtol=0, atol=1e-12)
