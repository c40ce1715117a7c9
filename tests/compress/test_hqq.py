"""HQQ: its iteration is the published one, its points are ones that can be stored, and it is never worse than RTN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.tensors import read_tensor
from packlight.compress import run as compress
from packlight.compress.quantize.hqq import ROWS, Hqq, half_quadratic
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.walk import WalkResult
from packlight.errors import CheckpointError, UsageError
from packlight.ops.grid import QuantizedTensor, Scales, fit, round_to
from packlight.spec import Grid

DTYPES = ["bfloat16", "float16", "float32"]


def normal(rows: int, cols: int, seed: int = 0, std: float = 0.03) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std


def with_outliers(weight: torch.Tensor, share: float = 0.02, times: float = 4.0, seed: int = 9) -> torch.Tensor:
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(chosen, weight * times, weight)


def both(weight: torch.Tensor, grid: Grid, **options: Any) -> tuple[QuantizedTensor, QuantizedTensor]:
    """The same matrix by RTN and by HQQ."""
    shared = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    shared |= {"scale_bits": grid.scale_bits, **{k: v for k, v in options.items() if k in ("clip", "dtype")}}
    return Rtn(**shared).round("w", grid, weight), Hqq(**(shared | options)).round("w", grid, weight)


def losses(weight: torch.Tensor, made: QuantizedTensor, norm: float = 0.7) -> torch.Tensor:
    """||W - W'||_p^p of each group, (rows, groups)."""
    error = (made.dequantize().double() - weight.double()).abs().pow(norm)
    return error.reshape(*made.scale.shape, -1).sum(dim=-1)


def improvement(weight: torch.Tensor, grid: Grid, **options: Any) -> float:
    rtn, hqq = both(weight, grid, **options)
    return float(losses(weight, hqq).sum() / losses(weight, rtn).sum())


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Grid, dict[str, Any]]:
    group = draw(st.sampled_from([1, 2, 8, 32, None]))
    scale_bits = None if group is None else draw(st.sampled_from([None, 4, 6, 8]))
    grid = Grid(draw(st.integers(2, 8)), group, draw(st.booleans()), scale_bits)
    cols = draw(st.integers(1, 4)) * (group or draw(st.integers(1, 33)))
    std, shift = draw(st.sampled_from([0.02, 1.0, 30.0])), draw(st.sampled_from([0.0, 1.0, -5.0]))
    weight = normal(draw(st.integers(1, 5)), cols, draw(st.integers(0, 2**31)), std) + shift * std
    if draw(st.booleans()):
        weight = with_outliers(weight, 0.1, 10.0)
    if draw(st.booleans()):
        weight[0] = draw(st.sampled_from([0.0, 0.5]))
    options: dict[str, Any] = {"dtype": draw(st.sampled_from(DTYPES)), "clip": draw(st.sampled_from(["minmax", "mse"]))}
    options |= {"norm": draw(st.sampled_from([0.3, 0.7, 1.0])), "beta": draw(st.sampled_from([0.1, 10.0, 1e6]))}
    return weight, grid, options


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_group_is_worse_than_its_start(case: tuple[torch.Tensor, Grid, dict[str, Any]]) -> None:
    weight, grid, options = case
    rtn, hqq = both(weight, grid, **options)
    before, after = losses(weight, rtn, options["norm"]), losses(weight, hqq, options["norm"])
    assert bool((after <= before * (1 + 1e-5) + 1e-12).all())  # the choice is made in float32


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_result_is_on_a_grid_that_can_be_stored(case: tuple[torch.Tensor, Grid, dict[str, Any]]) -> None:
    weight, grid, options = case
    made = both(weight, grid, **options)[1]
    assert made.shape == weight.shape and made.codes.dtype == torch.int8 and made.grid == grid
    assert grid.qmin <= int(made.codes.min()) and int(made.codes.max()) <= grid.qmax
    assert made.scale.dtype == getattr(torch, options["dtype"])
    assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())
    assert torch.equal(made.codes, round_to(weight, made.scale, made.zero_point, grid))
    assert (made.zero_point is None) is grid.symmetric and (made.coded_scale is None) is (grid.scale_bits is None)
    if made.zero_point is not None:
        assert made.zero_point.dtype == torch.int8
        assert grid.qmin <= int(made.zero_point.min()) and int(made.zero_point.max()) <= grid.qmax
    if made.coded_scale is not None and grid.scale_bits is not None:
        assert torch.equal(made.coded_scale.value(), made.scale)
        assert int(made.coded_scale.codes.min()) >= 1
        assert int(made.coded_scale.codes.max()) < 1 << grid.scale_bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "at_most"), [(2, 32, 0.9), (2, None, 0.75), (3, 64, 0.95), (4, 64, 0.98), (4, None, 0.96)]
)
def test_it_lowers_the_norm_on_weights_with_outliers(
    bits: int, group: int | None, at_most: float, symmetric: bool
) -> None:
    for weight in (normal(128, 512), with_outliers(normal(128, 512))):
        assert improvement(weight, Grid(bits, group, symmetric)) < at_most


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_scales_are_fitted_too(symmetric: bool) -> None:
    assert improvement(with_outliers(normal(64, 512)), Grid(3, 32, symmetric, 6)) < 0.95


def test_an_outlier_no_longer_widens_the_step_of_its_group() -> None:
    weight = normal(16, 64)
    weight[:, 5] = 0.3  # ten standard deviations
    rtn, hqq = both(weight, Grid(3, None))
    others = torch.arange(64) != 5
    errors = [(made.dequantize() - weight)[:, others].abs().median() for made in (rtn, hqq)]
    assert errors[1] < 0.7 * errors[0]
    assert bool((hqq.scale < rtn.scale).all())


def plain(
    group: torch.Tensor, scale: float, zero: float, grid: Grid, norm: float, beta: float, rounds: int
) -> tuple[float, float]:
    """The formulas of the module's docstring for the weights of one group, one after the other, in float64."""
    step, best, kept = scale, float("inf"), (scale, zero)
    for _ in range(rounds + 1):
        q = [min(max(round(w / scale + zero), grid.qmin), grid.qmax) for w in group.tolist()]
        errors = [w - (c - zero) * scale for w, c in zip(group.tolist(), q, strict=True)]
        loss = sum(abs(e / step) ** norm for e in errors)
        if loss >= best:
            break
        best, kept = loss, (scale, zero)
        target = []
        for w, e in zip(group.tolist(), errors, strict=True):
            size = abs(e) / step
            shrunk = max(size - size ** (norm - 1) / beta, 0.0) * step
            target.append(w - (shrunk if e > 0 else -shrunk))
        if not grid.symmetric:
            mean = sum(c - t / scale for c, t in zip(q, target, strict=True)) / len(q)
            zero = min(max(round(mean), grid.qmin), grid.qmax)
        above = sum((c - zero) * t for c, t in zip(q, target, strict=True))
        below = sum((c - zero) ** 2 for c in q)
        scale = above / below if below and above / below > 0 else scale
    return kept


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("norm", "beta", "rounds"), [(0.7, 10.0, 20), (0.7, 10.0, 1), (0.9, 3.0, 5)])
def test_the_iteration_is_its_formulas(bits: int, symmetric: bool, norm: float, beta: float, rounds: int) -> None:
    weight, grid = with_outliers(normal(6, 64, seed=bits)), Grid(bits, 32, symmetric)
    fitted = fit(weight, grid, torch.float32)
    # Not the fitted scale itself: the largest weight lies half-way between two codes of a symmetric grid there. Nor the
    # fitted zero point, from which few groups move.
    shifted = None if fitted.zero_point is None else (fitted.zero_point + 1).clamp(max=grid.qmax)
    start = Scales(fitted.scale * 0.93, shifted)
    made = half_quadratic(weight, start, grid, norm, beta, rounds)
    for row in range(6):
        for place, group in enumerate(weight[row].double().split(32)):
            first = 0.0 if shifted is None else float(shifted[row, place])
            scale, zero = plain(group, float(start.scale[row, place]), first, grid, norm, beta, rounds)
            assert float(made.scale[row, place]) == pytest.approx(scale, rel=1e-5)
            assert made.zero_point is None or int(made.zero_point[row, place]) == zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_iteration_more_never_raises_the_norm(symmetric: bool) -> None:
    weight, grid = with_outliers(normal(32, 128)), Grid(3, 32, symmetric)
    start = fit(weight, grid, torch.float32)

    def norms(scales: Scales) -> torch.Tensor:
        codes = round_to(weight, scales.scale, scales.zero_point, grid)
        return losses(weight, QuantizedTensor.on(scales, codes, grid))

    before = norms(start)
    for iterations in range(1, 8):
        after = norms(half_quadratic(weight, start, grid, 0.7, 10.0, iterations))
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("times", [2.0**-10, 2.0**6])
def test_the_unit_of_the_weights_changes_nothing(times: float, symmetric: bool) -> None:
    weight, grid = with_outliers(normal(16, 64)), Grid(3, 32, symmetric)
    made, scaled = (both(w, grid)[1] for w in (weight, weight * times))
    assert torch.equal(made.codes, scaled.codes) and torch.equal(made.scale * times, scaled.scale)


@pytest.mark.parametrize("scale_bits", [None, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_do_not_depend_on_each_other(symmetric: bool, scale_bits: int | None) -> None:
    weight, grid = with_outliers(normal(2 * ROWS + 3, 64)), Grid(3, 32, symmetric, scale_bits)
    whole = both(weight, grid)[1]
    for row in (0, 1, ROWS - 1, ROWS, 2 * ROWS + 2):
        single = both(weight[row : row + 1], grid)[1]
        assert torch.equal(single.codes[0], whole.codes[row]) and torch.equal(single.scale[0], whole.scale[row])
        assert symmetric or torch.equal(single.zero_point[0], whole.zero_point[row])  # type: ignore[index]
        if whole.coded_scale is not None and single.coded_scale is not None:
            assert torch.equal(single.coded_scale.unit[0], whole.coded_scale.unit[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    weight, grid = normal(8, 64).to(dtype), Grid(3, 32, False)
    assert torch.equal(both(weight, grid)[1].codes, both(weight.float(), grid)[1].codes)


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(4, 32, False), Grid(3, 16, False, 6), Grid(8)], ids=str)
def test_zeros_stay_zero(grid: Grid) -> None:
    weight = normal(3, 64)
    weight[0], weight[1, :32] = 0, 0
    made = both(weight, grid)[1].dequantize()
    assert bool((made[0] == 0).all()) and bool((made[1, :32] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e38])
def test_the_smallest_and_largest_numbers_give_finite_scales(size: float, dtype: str, symmetric: bool) -> None:
    weight = torch.tensor([[size, -size, 0.0, size / 2]])
    made = both(weight, Grid(4, None, symmetric), dtype=dtype)[1]
    assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())
    start = fit(weight, made.grid, made.scale.dtype)
    found = half_quadratic(weight, start, made.grid, 0.7, 10.0, 20)
    assert bool(torch.isfinite(found.scale).all()) and bool((found.scale > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = normal(2 * ROWS, 32)
    weight[-1, 3] = bad
    with pytest.raises(CheckpointError, match=r"layer\.q_proj holds a NaN or an infinity"):
        Hqq().round("layer.q_proj", Grid(4, 32), weight)


def test_a_group_that_does_not_divide_the_row_is_refused() -> None:
    with pytest.raises(UsageError, match="a group of 48 columns does not divide a row of 64"):
        Hqq(group_size=48).round("w", Grid(4, 48), normal(2, 64))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"norm": 0}, "norm is above 0 and at most 1, not 0"),
        ({"norm": 1.5}, "not 1.5"),
        ({"norm": float("nan")}, "not nan"),
        ({"beta": 0.0}, "beta is a positive number, not 0.0"),
        ({"beta": float("inf")}, "not inf"),
        ({"iterations": 0}, "iterations is a whole number of at least 1, not 0"),
        ({"iterations": 2.5}, "not 2.5"),
        ({"iterations": True}, "not True"),
        ({"bits": 1}, "bits must be 2 to 8, not 1"),
    ],
)
def test_it_checks_its_ranges(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Hqq(**bad)


def test_every_matrix_of_a_block_is_put_on_its_grid(tiny_model_dir: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=True))
    step = Hqq(3, 32, symmetric=False, embeddings=8)
    rows = list(compress.run(step, checkpoint, tmp_path, "pack-quantized", [1, 2, 3], None, WalkResult()))
    found = {row.subject: row.value for row in rows}
    error = norm = 0.0
    for spec in checkpoint.spec.quantizable:
        if spec.name.startswith("model.layers.0."):
            weight = read_tensor(checkpoint.index[spec.name]).double()
            made = step.round(spec.name, Grid(3, 32, False), weight).dequantize()
            error += float((made.double() - weight).square().sum())
            norm += float(weight.square().sum())
    assert found["model.layers.0"] == pytest.approx(error / norm, rel=1e-4)
    assert isinstance(found["embedding"], float) and 0 < found["embedding"] < 1e-3
