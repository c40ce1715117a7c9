"""Grids: rounding errs by half a step at most, zero stays zero, and decoding is that of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as dequantize_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.errors import CheckpointError, UsageError
from packlight.ops.grid import (
    ROW_CHUNK,
    QuantizedTensor,
    dequantize,
    fit,
    quantize,
    round_to,
    squared_error,
    squared_norm,
)
from packlight.spec import Grid

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_matrix(rows: int, cols: int, seed: int = 0, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std + mean


def wide(values: torch.Tensor, cols: int) -> torch.Tensor:
    """(rows, groups) -> (rows, cols) in float64."""
    return values.double().repeat_interleave(cols // values.shape[1], dim=1)


@st.composite
def quantized_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, Grid, torch.dtype]:
    group = draw(st.sampled_from([None, 1, 2, 8, 32]))
    cols = draw(st.integers(1, 4)) * (group or draw(st.integers(1, 33)))
    grid = Grid(draw(st.integers(2, 8)), group, draw(st.booleans()))
    # float16 ends near 6e-5 at the small end: a magnitude that every dtype of scales can hold.
    std, shift = draw(st.sampled_from([0.05, 1.0, 30.0])), draw(st.sampled_from([0.0, 0.5, -5.0]))
    weight = random_matrix(draw(st.integers(1, 6)), cols, draw(st.integers(0, 2**31)), std, shift * std)
    return weight, grid, DTYPES[draw(st.sampled_from(sorted(DTYPES)))]


@settings(max_examples=200, deadline=None)
@given(quantized_matrices())
def test_codes_are_nearest_on_the_stored_grid(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    """Inside the grid's range the error is half a step; outside, the nearest end is taken."""
    weight, grid, scale_dtype = case
    made = quantize(weight, grid, scale_dtype)
    assert made.codes.dtype == torch.int8 and made.scale.dtype == scale_dtype
    assert grid.qmin <= int(made.codes.min()) and int(made.codes.max()) <= grid.qmax
    cols = weight.shape[1]
    scale = wide(made.scale, cols)
    zero = torch.zeros_like(scale) if made.zero_point is None else wide(made.zero_point, cols)
    low, high = (grid.qmin - zero) * scale, (grid.qmax - zero) * scale
    target = torch.minimum(torch.maximum(weight.double(), low), high)
    error = ((made.codes.double() - zero) * scale - target).abs()
    # The quotient weight / scale, at most 2^8, is rounded to float32 (2^-24) before it is rounded to a whole number.
    assert bool((error <= scale * (0.5 + 2.0**8 * 2.0**-24)).all())


@settings(max_examples=200, deadline=None)
@given(quantized_matrices())
def test_the_grid_spans_the_weights(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    """No weight lies further outside the grid than the rounding of scale and zero point explains."""
    weight, grid, scale_dtype = case
    made = quantize(weight, grid, scale_dtype)
    scale = wide(made.scale, weight.shape[1])
    # Half a step each for the code and for the zero point (which a symmetric grid has not: its ends lie half a step
    # beyond a code), and the scale's own rounding, half an epsilon, times the widest code.
    steps = (0.5 if grid.symmetric else 1.0) + (1 << grid.bits) * torch.finfo(scale_dtype).eps / 2
    error = (made.dequantize(torch.float32).double() - weight.double()).abs()
    rounding = torch.finfo(scale_dtype).eps * weight.abs().max()  # of the product, computed in the scale's dtype
    assert bool((error <= scale * steps * 1.001 + rounding).all())


@settings(max_examples=100, deadline=None)
@given(quantized_matrices())
def test_zero_is_on_an_asymmetric_grid(case: tuple[torch.Tensor, Grid, torch.dtype]) -> None:
    weight, grid, scale_dtype = case
    weight[:, ::2] = 0
    made = quantize(weight, Grid(grid.bits, grid.group_size, symmetric=False), scale_dtype)
    assert bool((made.dequantize()[:, ::2] == 0).all())


@pytest.mark.parametrize("shift", [3.0, -3.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_signed_weights_use_the_whole_asymmetric_grid(shift: float, bits: int) -> None:
    """Weights on one side of zero: zero is an end of the grid, and a symmetric grid errs more."""
    weight = random_matrix(4, 64, std=0.5, mean=shift)
    asymmetric = quantize(weight, Grid(bits, 32, symmetric=False), torch.float32)
    assert asymmetric.zero_point is not None
    assert set(asymmetric.zero_point.unique().tolist()) == {asymmetric.grid.qmin if shift > 0 else asymmetric.grid.qmax}
    symmetric = quantize(weight, Grid(bits, 32), torch.float32)
    assert squared_error(weight, asymmetric.dequantize()) < squared_error(weight, symmetric.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.25, -3.0, 1e-3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_row(bits: int, value: float, symmetric: bool) -> None:
    """One value is an end of the grid: exact up to scale rounding, and half a step on a symmetric grid."""
    made = quantize(torch.full((1, 32), value), Grid(bits, None, symmetric), torch.float32)
    step = float(made.scale)
    bound = step / 2 if symmetric else 0.0
    assert abs(float(made.dequantize()[0, 0]) - value) <= bound + 4 * torch.finfo(torch.float32).eps * abs(value)
    assert len(made.codes.unique()) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_group_of_zeros_stays_zero(symmetric: bool, dtype: torch.dtype) -> None:
    weight = random_matrix(2, 64)
    weight[0, :32] = 0
    made = quantize(weight, Grid(4, 32, symmetric), dtype)
    assert bool((made.dequantize()[0, :32] == 0).all())
    assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_smallest_and_largest_numbers_give_finite_results(symmetric: bool) -> None:
    for dtype in DTYPES.values():
        for size in (1e-45, 1e-38, 1e38):
            weight = torch.tensor([[size, -size, 0.0, size / 2]])
            made = quantize(weight, Grid(4, None, symmetric), dtype)
            assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())


def test_a_single_row_and_a_single_column() -> None:
    row = quantize(random_matrix(1, 96), Grid(4, 32), torch.float32)
    assert row.codes.shape == (1, 96) and row.scale.shape == (1, 3)
    column = quantize(random_matrix(5, 1), Grid(8, None, symmetric=False), torch.float32)
    assert column.codes.shape == (5, 1) and column.scale.shape == (5, 1) and column.shape == (5, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_is_refused_by_name(bad: float, symmetric: bool) -> None:
    weight = random_matrix(3, 64)
    weight[2, 40] = bad
    with pytest.raises(CheckpointError, match="up_proj holds a NaN or an infinity"):
        quantize(weight, Grid(4, 32, symmetric), torch.bfloat16, "up_proj")


def test_a_group_that_does_not_divide_the_row() -> None:
    with pytest.raises(UsageError, match="32 columns does not divide a row of 48"):
        quantize(random_matrix(3, 48), Grid(4, 32), torch.bfloat16)


def test_rows_are_independent_of_each_other_and_of_the_chunks() -> None:
    weight = random_matrix(ROW_CHUNK + 2, 8)
    for symmetric in (True, False):
        grid = Grid(4, 4, symmetric)
        whole = quantize(weight, grid, torch.bfloat16)
        last = quantize(weight[ROW_CHUNK - 1 :], grid, torch.bfloat16)
        assert torch.equal(whole.codes[ROW_CHUNK - 1 :], last.codes)
        assert torch.equal(whole.scale[ROW_CHUNK - 1 :], last.scale)
        if whole.zero_point is not None and last.zero_point is not None:
            assert torch.equal(whole.zero_point[ROW_CHUNK - 1 :], last.zero_point)


def test_rounding_a_bfloat16_weight_reads_it_exactly() -> None:
    weight = random_matrix(4, 64).to(torch.bfloat16)
    assert torch.equal(
        quantize(weight, Grid(4, 32), torch.bfloat16).codes, quantize(weight.float(), Grid(4, 32), torch.bfloat16).codes
    )


def test_what_is_on_the_grid_stays_where_it_is() -> None:
    """Quantizing the de-quantized matrix on its own scales changes no code."""
    for symmetric in (True, False):
        made = quantize(random_matrix(6, 64), Grid(4, 32, symmetric), torch.float32)
        again = round_to(made.dequantize(), made.scale, made.zero_point, made.grid)
        assert torch.equal(again, made.codes)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decoding_is_that_of_compressed_tensors(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    made = quantize(random_matrix(7, 96, seed=bits), Grid(bits, group, symmetric), dtype)
    arguments = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )
    theirs = dequantize_elsewhere(made.codes, made.scale, made.zero_point, arguments)
    assert theirs.dtype == dtype
    assert torch.equal(made.dequantize(), theirs)


def test_the_symmetric_scale_is_that_of_the_docstring() -> None:
    weight = torch.tensor([[0.5, -1.5, 0.75, 0.0]])
    made = fit(weight, Grid(4), torch.float32)
    scale, zero_point = made.scale, made.zero_point
    assert zero_point is None
    assert float(scale) == pytest.approx(2 * 1.5 / 15, rel=torch.finfo(torch.float32).eps)


def test_decoding_into_another_dtype_rounds_once() -> None:
    made = quantize(random_matrix(3, 32), Grid(8), torch.bfloat16)
    assert torch.equal(dequantize(made.codes, made.scale, None, torch.float32), made.dequantize().float())


def test_squared_sums_do_not_depend_on_the_chunks() -> None:
    exact = torch.arange(2.0 * (ROW_CHUNK + 1)).reshape(-1, 2) % 7
    assert squared_norm(exact) == float(exact.double().square().sum())
    assert squared_error(exact, exact + 2) == 4.0 * exact.numel()


def test_a_quantized_tensor_cannot_be_changed_by_name() -> None:
    made = quantize(random_matrix(2, 32), Grid(4), torch.float32)
    assert isinstance(made, QuantizedTensor)
    with pytest.raises(AttributeError):
        made.grid = Grid(8)  # type: ignore[misc]
