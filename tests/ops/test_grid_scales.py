"""How the points of a grid are fitted: clipping by squared error, importance of columns, scales that are coded."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.ops.grid import CLIP_STEPS, LEAST_SHARE, ROW_CHUNK, QuantizedTensor, fit, quantize, squared_error
from packlight.spec import Grid

Clip = Literal["minmax", "mse"]


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Weights with outliers, which make clipping worth while."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.randn(rows, cols, generator=generator)


@st.composite
def matrices(draw: st.DrawFn, coded: bool) -> tuple[torch.Tensor, Grid]:
    group = draw(st.sampled_from([4, 8, 32] if coded else [None, 1, 4, 32]))
    cols = draw(st.integers(1, 4)) * (group or 24)
    scale_bits = draw(st.integers(4, 8)) if coded else None
    grid = Grid(draw(st.integers(2, 8)), group, draw(st.booleans()), scale_bits)
    weight = heavy_tailed(draw(st.integers(1, 6)), cols, draw(st.integers(0, 2**31)))
    return weight * draw(st.sampled_from([0.02, 1.0, 40.0])) + draw(st.sampled_from([0.0, 0.5])), grid


def error_by_group(weight: torch.Tensor, made: QuantizedTensor) -> torch.Tensor:
    """Squared error of every group, (rows, groups) in float64."""
    rows, groups = made.scale.shape
    difference = made.dequantize(torch.float32).double() - weight.double()
    return difference.square().reshape(rows, groups, -1).sum(dim=-1)


@settings(max_examples=100, deadline=None)
@given(matrices(coded=False))
def test_clipping_never_errs_more(case: tuple[torch.Tensor, Grid]) -> None:
    """The whole range is one of those that are tried, so no group can lose; sums differ by float32's rounding."""
    weight, grid = case
    whole = error_by_group(weight, quantize(weight, grid, torch.float32))
    clipped = error_by_group(weight, quantize(weight, grid, torch.float32, clip="mse"))
    assert bool((clipped <= whole * (1 + 1e-5) + 1e-12 * weight.square().max()).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_pays_where_there_are_outliers(bits: int, symmetric: bool) -> None:
    weight, grid = heavy_tailed(64, 128), Grid(bits, 64, symmetric)
    for dtype in (torch.float32, torch.bfloat16):
        whole = squared_error(weight, quantize(weight, grid, dtype).dequantize())
        clipped = squared_error(weight, quantize(weight, grid, dtype, clip="mse").dequantize())
        assert clipped < 0.95 * whole


def test_a_clipped_range_is_no_narrower_than_the_least_share() -> None:
    weight, grid = heavy_tailed(64, 128), Grid(2, 32)
    share = fit(weight, grid, torch.float32, clip="mse").scale / fit(weight, grid, torch.float32).scale
    assert LEAST_SHARE - 1e-6 <= float(share.min()) < float(share.max()) <= 1 + 1e-6
    steps = (1 - share) * (CLIP_STEPS - 1) / (1 - LEAST_SHARE)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_importance_moves_the_range_to_the_columns_that_matter() -> None:
    """One outlier among small weights: the whole range where it matters, a clipped one where the others do."""
    weight = torch.cat([torch.full((1, 1), 8.0), torch.linspace(-1, 1, 31)[None]], dim=1)
    outlier, others = torch.full((32,), 1e-6), torch.ones(32)
    outlier[0], others[0] = 1.0, 1e-6
    whole = fit(weight, Grid(3), torch.float32, clip="minmax", importance=others).scale
    assert torch.equal(whole, fit(weight, Grid(3), torch.float32).scale), "minmax reads no importance"
    kept = quantize(weight, Grid(3), torch.float32, clip="mse", importance=outlier)
    clipped = quantize(weight, Grid(3), torch.float32, clip="mse", importance=others)
    assert float(clipped.scale) < 0.6 * float(whole)
    assert squared_error(weight[:, :1], kept.dequantize()[:, :1]) < squared_error(
        weight[:, :1], clipped.dequantize()[:, :1]
    )
    assert squared_error(weight[:, 1:], clipped.dequantize()[:, 1:]) < squared_error(
        weight[:, 1:], kept.dequantize()[:, 1:]
    )


@settings(max_examples=100, deadline=None)
@given(matrices(coded=False), st.integers(0, 2**31))
def test_importance_lowers_the_error_that_it_weights(case: tuple[torch.Tensor, Grid], seed: int) -> None:
    weight, grid = case
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 1e-3
    steered = quantize(weight, grid, torch.float32, clip="mse", importance=importance)
    plain = quantize(weight, grid, torch.float32, clip="mse")
    weighted = [
        float(((made.dequantize().double() - weight.double()).square() * importance).sum()) for made in (steered, plain)
    ]
    assert weighted[0] <= weighted[1] * (1 + 1e-5) + 1e-12 * float(weight.square().max())


def test_any_multiple_of_an_importance_is_the_same() -> None:
    weight, importance = heavy_tailed(8, 64), torch.arange(1.0, 65.0)
    one = fit(weight, Grid(3, 32), torch.float32, clip="mse", importance=importance)
    other = fit(weight, Grid(3, 32), torch.float32, clip="mse", importance=importance * 1024)
    assert torch.equal(one.scale, other.scale)


@settings(max_examples=100, deadline=None)
@given(matrices(coded=True), st.sampled_from(["minmax", "mse"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_coded_scales(case: tuple[torch.Tensor, Grid], clip: Clip, dtype: torch.dtype) -> None:
    """A code of at least 1 times the unit of the row; half a unit from the scale that it stands for."""
    weight, grid = case
    assert grid.scale_bits is not None
    made = quantize(weight, grid, dtype, clip=clip)
    coded, most = made.coded_scale, (1 << grid.scale_bits) - 1
    assert coded is not None
    assert coded.codes.dtype == torch.uint8 and coded.codes.shape == made.scale.shape
    assert coded.unit.dtype == dtype == made.scale.dtype and coded.unit.shape == (len(weight), 1)
    assert int(coded.codes.min()) >= 1 and int(coded.codes.max()) <= most
    assert torch.equal(coded.codes.to(dtype) * coded.unit, made.scale)
    assert bool((coded.codes.amax(dim=1) >= most - 1).all()), "the largest scale of a row takes the largest code"
    plain = fit(weight, Grid(grid.bits, grid.group_size, grid.symmetric), torch.float32, clip=clip)
    unit = coded.unit.float()
    # A scale below half a unit takes the code 1 all the same; the unit's own rounding counts once for each code.
    bound = torch.maximum(unit * (0.5 + most * torch.finfo(dtype).eps), (unit - plain.scale) * 1.01)
    assert bool(((made.scale.float() - plain.scale).abs() <= bound).all())


@pytest.mark.parametrize("scale_bits", [4, 6, 8])
def test_more_bits_for_scales_err_less(scale_bits: int) -> None:
    weight = heavy_tailed(64, 256) * torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    floats = squared_error(weight, quantize(weight, Grid(4, 32), torch.float32).dequantize())
    coded = squared_error(weight, quantize(weight, Grid(4, 32, scale_bits=scale_bits), torch.float32).dequantize())
    assert coded < floats * (1 + {4: 0.5, 6: 0.1, 8: 0.02}[scale_bits])


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_bits", [None, 4, 6, 8])
def test_a_group_and_a_row_of_zeros(scale_bits: int | None, symmetric: bool, clip: Clip) -> None:
    weight = heavy_tailed(3, 64)
    weight[0, :32] = 0
    weight[1] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = quantize(weight, Grid(3, 32, symmetric, scale_bits), dtype, clip=clip)
        assert bool((made.dequantize()[0, :32] == 0).all()) and bool((made.dequantize()[1] == 0).all())
        assert bool((made.dequantize()[0, 32:] != 0).any())
        assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())
        alone = quantize(weight[:, 32:], Grid(3, 32, symmetric, scale_bits), dtype, clip=clip)
        assert torch.equal(made.codes[[0, 2], 32:][:1], alone.codes[:1]), "zeros beside a group do not change it"


def test_coded_scales_do_not_depend_on_the_chunks_of_rows() -> None:
    weight, grid = heavy_tailed(ROW_CHUNK + 3, 16), Grid(4, 8, False, 6)
    whole, last = quantize(weight, grid, torch.bfloat16), quantize(weight[ROW_CHUNK - 1 :], grid, torch.bfloat16)
    assert whole.coded_scale is not None and last.coded_scale is not None
    assert torch.equal(whole.coded_scale.codes[ROW_CHUNK - 1 :], last.coded_scale.codes)
    assert torch.equal(whole.coded_scale.unit[ROW_CHUNK - 1 :], last.coded_scale.unit)
    assert torch.equal(whole.codes[ROW_CHUNK - 1 :], last.codes)
