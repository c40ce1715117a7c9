"""LLM.int8(): its two limits, and what one column of large activations does without the decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.ops.llm_int8 import ALPHA, Int8Rows, llm_int8, outlier_columns, to_int8, vectorwise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def with_outliers(x: torch.Tensor, columns: list[int], seed: int = 0) -> torch.Tensor:
    """Magnitudes of 20 to 60 of either sign in some columns of (tokens, in_features)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(x), len(columns))
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    planted = x.clone()
    planted[:, columns] = signs * (20 + 40 * torch.rand(shape, generator=generator))
    return planted


def relative_error(made: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((made.double() - exact).norm() / exact.norm())


@st.composite
def products(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (tokens, cols), some with outliers, some rows of either factor zero, and weights (out, cols)."""
    tokens, out, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    seed, dtype = draw(st.integers(0, 2**31)), DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    x = normal(tokens, cols, seed=seed, std=draw(st.sampled_from([1e-3, 1.0, 3.0])))
    weight = normal(out, cols, seed=seed + 1, std=draw(st.sampled_from([0.02, 1.0])))
    x = with_outliers(x, sorted(draw(st.sets(st.integers(0, cols - 1), max_size=2))), seed)
    x[draw(st.integers(0, tokens - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    weight[draw(st.integers(0, out - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return x.to(dtype), weight.to(dtype)


@settings(max_examples=200, deadline=None)
@given(products())
def test_without_outliers_it_is_vector_wise_exactly(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = case
    wanted = vectorwise(x, weight)
    assert wanted.dtype == x.dtype and wanted.shape == (len(x), len(weight))
    assert bool(torch.isfinite(wanted).all())
    for given_weight in (weight, to_int8(weight)):
        assert torch.equal(llm_int8(x, given_weight, math.inf), wanted)


@settings(max_examples=200, deadline=None)
@given(products())
def test_with_outliers_only_it_is_the_product_in_16_or_32_bit(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = case
    made = llm_int8(x, weight, 0.0)
    # Sums of up to 40 products whose order may differ, rounded to the dtype.
    bound = 40 * torch.finfo(x.dtype).eps * (x.double().abs() @ weight.double().abs().T) + 1e-7
    assert made.dtype == x.dtype
    assert bool(((made.double() - x.double() @ weight.double().T).abs() <= bound).all())
    stored = to_int8(weight)
    decoded = stored.columns(torch.ones(x.shape[1], dtype=torch.bool)).to(x.dtype)
    assert torch.equal(llm_int8(x, stored, 0.0), llm_int8(x, decoded, 0.0))


@settings(max_examples=200, deadline=None)
@given(products())
def test_codes_err_by_half_a_step_and_use_the_whole_range(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    for rows in case:
        made = to_int8(rows)
        assert made.codes.dtype == torch.int8 and made.absmax.dtype == torch.float32
        largest = rows.float().abs().amax(dim=1)
        assert torch.equal(made.codes.int().abs().amax(dim=1), torch.where(largest > 0, 127, 0).int())
        step = made.absmax.double().unsqueeze(1) / 127
        error = (made.codes.double() * step - rows.double()).abs()
        assert bool((error <= step * (0.5 + 1e-4)).all())


@settings(max_examples=100, deadline=None)
@given(products())
def test_vector_wise_errs_by_less_than_its_steps_allow(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    """|x w - x' w'| <= |x - x'| |w| + |x'| |w - w'|, summed over the columns."""
    x, weight = case[0].float(), case[1].float()
    half_x, half_w = (to_int8(rows).absmax.double().unsqueeze(1) / 254 for rows in (x, weight))  # half a step
    magnitudes = x.double().abs(), weight.double().abs()
    bound = half_x * magnitudes[1].sum(1) + (magnitudes[0] + half_x).sum(1, keepdim=True) * half_w.T
    error = (vectorwise(x, weight).double() - x.double() @ weight.double().T).abs()
    assert bool((error <= bound * 1.001 + 1e-6).all())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_integers_up_to_127_are_multiplied_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, (5, 16), generator=generator) for _ in range(2))
    x[:, 0], weight[:, 0] = 127, 127
    assert torch.equal(vectorwise(x.to(dtype), weight.to(dtype)), (x @ weight.T).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("columns", [[3], [3, 200], [0, 1, 2, 100, 101, 102, 255]])
def test_outliers_blow_up_vector_wise_and_not_the_decomposition(columns: list[int], dtype: torch.dtype) -> None:
    plain = normal(32, 256)
    weight = normal(64, 256, seed=1, std=0.05)
    weight[:, columns] *= 0.1  # so that the outliers are not all of the output, as in trained models
    x = with_outliers(plain, columns)
    plain, x, weight = plain.to(dtype), x.to(dtype), weight.to(dtype)
    assert bool((plain.abs() < ALPHA).all())
    assert outlier_columns(x).nonzero().flatten().tolist() == columns
    undisturbed = relative_error(vectorwise(plain, weight), plain, weight)
    assert undisturbed < 0.02
    assert relative_error(llm_int8(x, weight), x, weight) < 1.2 * undisturbed
    # int8 weights in the outlier columns: their rounding is multiplied by 20 to 60.
    assert relative_error(llm_int8(x, to_int8(weight)), x, weight) < 5 * undisturbed
    assert relative_error(vectorwise(x, weight), x, weight) > 8 * undisturbed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_with_outliers_the_decomposition_never_errs_more(dtype: torch.dtype) -> None:
    for seed in range(100):
        cols = (64, 96, 128, 256)[seed % 4]
        columns = list(range(seed % 7, cols, cols // 3))
        x = with_outliers(normal(16, cols, seed=seed), columns, seed).to(dtype)
        weight = normal(24, cols, seed=seed + 1000, std=0.05).to(dtype)
        assert relative_error(llm_int8(x, weight), x, weight) <= relative_error(vectorwise(x, weight), x, weight)


def test_the_outlier_columns_are_found_in_every_call() -> None:
    x, stored = normal(8, 64), to_int8(normal(4, 64, seed=1))
    first = llm_int8(x, stored)
    llm_int8(with_outliers(x, [1]), stored)
    assert torch.equal(llm_int8(x, stored), first)


def test_a_magnitude_of_exactly_alpha_is_an_outlier() -> None:
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 3], x[0, 1] = 6.0, -6.0, 5.999
    assert outlier_columns(x).tolist() == [False, False, True, True]


def test_decoded_weights_stand_in_for_the_exact_ones() -> None:
    """The one difference of the deployed form: outlier columns meet weights that were rounded to int8."""
    x, weight = with_outliers(normal(8, 64), [5]), normal(4, 64, seed=1)
    stored = to_int8(weight)
    difference = llm_int8(x, weight) - llm_int8(x, stored)
    rounding = weight[:, 5] - stored.columns(torch.tensor([5]))[:, 0]
    assert torch.allclose(difference, torch.outer(x[:, 5], rounding), atol=1e-4)


def test_zero_rows_and_columns_stay_zero() -> None:
    x, weight = normal(4, 16), normal(3, 16, seed=1)
    x[1], weight[2] = 0, 0
    for made in (vectorwise(x, weight), llm_int8(x, weight, 1.0)):
        assert bool((made[1] == 0).all()) and bool((made[:, 2] == 0).all())
    x[:, 3] = 0
    assert torch.equal(llm_int8(x, weight), vectorwise(x, weight))
    assert torch.equal(vectorwise(torch.zeros(2, 16), weight), torch.zeros(2, 3))
    assert to_int8(torch.zeros(2, 3)).absmax.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, ALPHA, math.inf])
def test_batches_no_tokens_and_no_columns_keep_their_shape(alpha: float) -> None:
    weight = normal(3, 16, seed=1)
    x = normal(2, 5, 16)
    assert torch.equal(llm_int8(x, weight, alpha).reshape(10, 3), llm_int8(x.reshape(10, 16), weight, alpha))
    assert llm_int8(x[0, 0], weight, alpha).shape == (3,)
    assert llm_int8(torch.empty(0, 16), weight, alpha).shape == (0, 3)
    assert torch.equal(llm_int8(torch.empty(2, 0), torch.empty(3, 0), alpha), torch.zeros(2, 3))


def test_the_largest_floats_do_not_overflow_the_codes() -> None:
    made = to_int8(torch.tensor([[3e38, -3e38, 1e38], [1e-38, 0.0, -1e-38]]))
    assert made.codes.tolist() == [[127, -127, 42], [127, 0, -127]]


@pytest.mark.parametrize("alpha", [-1.0, math.nan])
def test_an_alpha_that_is_no_magnitude_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha is the magnitude of an outlier, 0 or more, not"):
        llm_int8(torch.ones(1, 2), torch.ones(1, 2), alpha)


@pytest.mark.parametrize("weight", [torch.ones(3, 5), torch.ones(4), to_int8(torch.ones(3, 5))])
def test_shapes_that_do_not_belong_together_are_refused(weight: torch.Tensor | Int8Rows) -> None:
    for multiply in (vectorwise, llm_int8):
        with pytest.raises(UsageError, match=r"activations \(2, 4\) and weights \(.*\) do not multiply"):
            multiply(torch.ones(2, 4), weight)
