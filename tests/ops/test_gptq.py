"""GPTQ and GPTAQ: the fast form agrees with a plain one that inverts a matrix per column, and it errs less than RTN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from packlight.errors import CheckpointError, UsageError
from packlight.ops.gptq import DAMPING, gptq, inverse_factor, output_error
from packlight.ops.grid import Clip, QuantizedTensor, Scales, fit, quantize, round_to
from packlight.spec import Grid

ROWS, COLS = 6, 96
ORDERS = [
    pytest.param({"act_order": True, "static_groups": True}, id="act-order"),
    pytest.param({"act_order": False, "static_groups": True}, id="static"),
    pytest.param({"act_order": False, "static_groups": False}, id="dynamic"),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> torch.Tensor:
    """float32 (rows, cols), as they come from a checkpoint."""
    return normal(rows, cols, seed=seed, dtype=torch.float32) * 0.05


def inputs(cols: int = COLS, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Correlated inputs of different sizes, float64 (tokens, cols)."""
    mixed = normal(tokens, cols, seed=seed) @ (torch.eye(cols) + normal(cols, cols, seed=seed + 1) / 4)
    return mixed * (0.2 + normal(cols, seed=seed + 2).abs())


def drifted(x: torch.Tensor, share: float = 0.3, seed: int = 7) -> torch.Tensor:
    """What enters a layer after the layers before it have been changed: partly a function of `x`, partly noise."""
    cols = x.shape[1]
    return x + share * (x @ normal(cols, cols, seed=seed) / cols**0.5 + 0.5 * normal(*x.shape, seed=seed + 1))


def moments(exact: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = sum of x x^T and C = sum of (x~ - x) x^T."""
    return now.T @ now, (exact - now).T @ now


def raised(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H with its diagonal raised; a column that was never reached has the mean diagonal."""
    h, mean = hessian.clone(), hessian.diagonal().mean()
    h.diagonal()[h.diagonal() == 0] = mean
    h.diagonal().add_(damping * mean)
    return h


def assert_same(made: QuantizedTensor, wanted: QuantizedTensor) -> None:
    assert torch.equal(made.codes, wanted.codes)
    assert torch.equal(made.scale, wanted.scale) and made.scale.dtype == wanted.scale.dtype
    assert (made.zero_point is None) is (wanted.zero_point is None)
    assert made.zero_point is None or wanted.zero_point is None or torch.equal(made.zero_point, wanted.zero_point)


def on_the_points_of(made: QuantizedTensor, weight: torch.Tensor) -> QuantizedTensor:
    """`weight` rounded to nearest with the scales and zero points of `made`."""
    return replace(made, codes=round_to(weight, made.scale, made.zero_point, made.grid))


def plain(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    act_order: bool,
    static_groups: bool,
    clip: Clip,
    damping: float = DAMPING,
    cross: torch.Tensor | None = None,
) -> QuantizedTensor:
    """One column after the other on the whole matrix, by the equations of OBQ: after column j of the free columns F,

    W[:, F] -= (w_j - q) / [H_jF^-1]_jj * [H_jF^-1]_j,F   and, for GPTAQ,   W[:, F] += w_j C[j, F] H_F^-1.
    """
    rows, cols = weight.shape
    group = cols // grid.num_groups(cols)
    h = raised(hessian, damping)
    order = sorted(range(cols), key=lambda j: -float(hessian[j, j])) if act_order else list(range(cols))
    free_inverses = [torch.linalg.inv(h[order[k:]][:, order[k:]]) for k in range(cols)]
    importance = torch.empty(cols, dtype=torch.float64)
    for j, inverse in zip(order, free_inverses, strict=True):
        importance[j] = 1 / inverse[0, 0]
    w = weight.double()
    points: dict[int, Scales] = {}
    if static_groups:
        whole = fit(weight, grid, scale_dtype, "w", clip, importance)
        for g in range(cols // group):
            zero = None if whole.zero_point is None else whole.zero_point[:, g : g + 1]
            points[g] = Scales(whole.scale[:, g : g + 1], zero)
    codes = torch.empty(rows, cols, dtype=torch.int8)
    for k, (j, inverse) in enumerate(zip(order, free_inverses, strict=True)):
        if not static_groups and j % group == 0:
            span = slice(j, j + group)
            own = Grid(grid.bits, None, grid.symmetric)
            points[j // group] = fit(w[:, span], own, scale_dtype, "w", clip, importance[span])
        here = points[j // group]
        scale = here.scale[:, 0].double()
        zero = torch.zeros_like(scale) if here.zero_point is None else here.zero_point[:, 0].double()
        now = w[:, j].clone()
        code = ((now / scale).round() + zero).clamp(grid.qmin, grid.qmax)
        codes[:, j] = code.to(torch.int8)
        decoded = ((code - zero) * scale).to(scale_dtype).double()
        later = order[k + 1 :]
        if later:
            w[:, later] -= torch.outer((now - decoded) / inverse[0, 0], inverse[0, 1:])
            if cross is not None:
                w[:, later] += torch.outer(now, cross[j, later] @ free_inverses[k + 1])
    scales = torch.cat([points[g].scale for g in range(cols // group)], dim=1)
    zeros = [points[g].zero_point for g in range(cols // group)]
    return QuantizedTensor(codes, scales, None if grid.symmetric else torch.cat(zeros, dim=1), grid)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_cross", [False, True], ids=["gptq", "gptaq"])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(3, 48, False), Grid(4, None, False)], ids=str)
@pytest.mark.parametrize("options", ORDERS)
def test_it_is_the_plain_form(options: dict[str, bool], grid: Grid, clip: Clip, with_cross: bool) -> None:
    """In blocks of 32 columns: groups that are smaller, that straddle two blocks, and that hold all of them."""
    weight, exact = weights(), inputs()
    hessian, cross = moments(exact, drifted(exact))
    given = cross if with_cross else None
    made = gptq(weight, hessian, grid, torch.bfloat16, clip=clip, block_size=32, cross=given, **options)
    assert_same(made, plain(weight, hessian, grid, torch.bfloat16, clip=clip, cross=given, **options))


@pytest.mark.parametrize("with_cross", [False, True], ids=["gptq", "gptaq"])
@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, 32, False), Grid(2, 96, False), Grid(4)], ids=str)
@pytest.mark.parametrize("options", ORDERS)
def test_the_block_size_changes_nothing(options: dict[str, bool], grid: Grid, with_cross: bool) -> None:
    cols = 192
    weight, exact = weights(cols=cols), inputs(cols)
    hessian, cross = moments(exact, drifted(exact))

    def made(block_size: int) -> QuantizedTensor:
        given = cross if with_cross else None
        return gptq(weight, hessian, grid, torch.float32, block_size=block_size, cross=given, **options)

    wanted = made(cols)
    for block_size in (1, 7, 128, 1000):
        assert_same(made(block_size), wanted)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("grid", [Grid(2, 16), Grid(4, 32, False), Grid(8)], ids=str)
@pytest.mark.parametrize("options", ORDERS)
def test_with_independent_inputs_it_rounds_to_nearest(options: dict[str, bool], grid: Grid, clip: Clip) -> None:
    weight = weights()
    for hessian in (torch.eye(COLS), torch.zeros(COLS, COLS)):
        made = gptq(weight, hessian, grid, torch.bfloat16, clip=clip, **options)
        assert_same(made, quantize(weight, grid, torch.bfloat16, clip=clip))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("options", ORDERS)
def test_it_errs_less_than_rounding_to_nearest(options: dict[str, bool], bits: int, symmetric: bool) -> None:
    weight, hessian = weights(32), moments(inputs(), inputs())[0].float()
    made = gptq(weight, hessian, Grid(bits, 32, symmetric), torch.float32, **options)
    nearest = on_the_points_of(made, weight).dequantize()
    assert output_error(weight, made.dequantize(), hessian) < 0.9 * output_error(weight, nearest, hessian)


def test_act_order_errs_less_where_few_columns_matter() -> None:
    x = inputs(tokens=200)
    x[:, -8:] *= 20
    weight, hessian = weights(32), x.T @ x
    errors = [
        output_error(weight, gptq(weight, hessian, Grid(3), torch.float32, act_order=act_order).dequantize(), hessian)
        for act_order in (True, False)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("options", ORDERS)
def test_a_multiple_of_the_hessian_gives_the_same(options: dict[str, bool]) -> None:
    weight, exact = weights(), inputs()
    hessian, cross = moments(exact, drifted(exact))
    made = [
        gptq(weight, hessian * times, Grid(3, 16), torch.float32, cross=cross * times, **options)
        for times in (1.0, 2.0**-12, 2.0**10)
    ]
    assert_same(made[1], made[0])
    assert_same(made[2], made[0])


@pytest.mark.parametrize("options", ORDERS)
def test_columns_that_were_never_reached_are_rounded_to_nearest(options: dict[str, bool]) -> None:
    weight, x = weights(), inputs()
    dead = [0, 17, 40, 41, 95]
    x[:, dead] = 0
    made = gptq(weight, x.T @ x, Grid(3, 32, False), torch.float32, **options)
    assert torch.equal(made.codes[:, dead], on_the_points_of(made, weight).codes[:, dead])
    assert_same(made, plain(weight, x.T @ x, Grid(3, 32, False), torch.float32, clip="mse", **options))


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_rows_and_rows_of_zeros(symmetric: bool, options: dict[str, bool]) -> None:
    weight, x = weights(), inputs()
    weight[1], weight[2], weight[3] = 0.0, 0.5, -0.25
    made = gptq(weight, x.T @ x, Grid(4, 32, symmetric), torch.float32, **options)
    values = made.dequantize()
    assert bool((values[1] == 0).all()) and bool(torch.isfinite(values).all()) and bool((made.scale > 0).all())
    if options["static_groups"] and not symmetric:  # one value is an end of such a grid
        close = gptq(weight, x.T @ x, Grid(4, 32, False), torch.float32, clip="minmax", **options).dequantize()
        assert torch.allclose(close[2:4], weight[2:4], rtol=1e-5)


@pytest.mark.parametrize("options", ORDERS)
def test_rows_do_not_depend_on_each_other(options: dict[str, bool]) -> None:
    weight, exact = weights(), inputs()
    hessian, cross = moments(exact, drifted(exact))
    whole = gptq(weight, hessian, Grid(3, 16, False), torch.float32, cross=cross, **options)
    for row in range(ROWS):
        single = gptq(weight[row : row + 1], hessian, Grid(3, 16, False), torch.float32, cross=cross, **options)
        assert torch.equal(single.codes[0], whole.codes[row]) and torch.equal(single.scale[0], whole.scale[row])


def test_a_single_column_is_rounded_to_nearest() -> None:
    weight = weights(5, 1)
    for options in ({}, {"act_order": False, "static_groups": False}):
        made = gptq(weight, torch.full((1, 1), 3.0), Grid(4, None, False), torch.float32, **options)  # type: ignore[arg-type]
        assert_same(made, quantize(weight, Grid(4, None, False), torch.float32, clip="mse"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_scales_are_those_that_codes_are_rounded_with(symmetric: bool) -> None:
    weight, hessian = weights(32), moments(inputs(), inputs())[0]
    grid = Grid(3, 16, symmetric, 6)
    made = gptq(weight, hessian, grid, torch.bfloat16)
    assert made.coded_scale is not None and torch.equal(made.coded_scale.value(), made.scale)
    assert_same(gptq(weight, torch.eye(COLS), grid, torch.bfloat16), quantize(weight, grid, torch.bfloat16, clip="mse"))
    assert_same(made, plain(weight, hessian, grid, torch.bfloat16, True, True, "mse"))
    nearest = on_the_points_of(made, weight).dequantize()
    assert output_error(weight, made.dequantize(), hessian) < 0.9 * output_error(weight, nearest, hessian)


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_calibration_comes_closer_to_the_output_of_the_unchanged_model(
    bits: int, options: dict[str, bool]
) -> None:
    weight, exact = weights(32), inputs(tokens=2000)
    now = drifted(exact)
    hessian, cross = moments(exact, now)

    def distance(given: torch.Tensor | None) -> float:
        made = gptq(weight, hessian, Grid(bits, 32), torch.float32, cross=given, **options).dequantize().double()
        return float((weight.double() @ exact.T - made @ now.T).norm())

    assert distance(cross) < 0.95 * distance(None)


def test_without_a_difference_asymmetric_calibration_is_gptq() -> None:
    weight, hessian = weights(), moments(inputs(), inputs())[0]
    made = [gptq(weight, hessian, Grid(3, 16), torch.float32, cross=c) for c in (None, torch.zeros_like(hessian))]
    assert_same(made[1], made[0])


def test_the_matrix_of_asymmetric_calibration_solves_least_squares() -> None:
    """Row j of P = triu(C U^T, 1) U is C[j, F] H_F^-1 on the columns F after j, and zero up to j."""
    exact = inputs(24)
    hessian, cross = moments(exact, drifted(exact))
    u = inverse_factor(hessian, DAMPING, "w")
    p = torch.triu(cross @ u.T, diagonal=1) @ u
    h = raised(hessian, DAMPING)
    for j in range(24):
        wanted = torch.zeros(24, dtype=torch.float64)
        wanted[j + 1 :] = torch.linalg.solve(h[j + 1 :, j + 1 :], cross[j, j + 1 :])
        assert torch.allclose(p[j], wanted, rtol=0, atol=1e-12)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = inputs()
    x[:, 5] = 0
    u = inverse_factor(x.T @ x, DAMPING, "w")
    assert torch.equal(u, torch.triu(u))
    assert torch.allclose(u.T @ u @ raised(x.T @ x, DAMPING), torch.eye(COLS, dtype=torch.float64), atol=1e-9)


def test_one_token_is_enough() -> None:
    """H has rank 1: damping alone makes it definite."""
    x = inputs(tokens=1).float()
    made = gptq(weights(), x.T @ x, Grid(4, 32), torch.float32)
    assert bool(torch.isfinite(made.dequantize()).all())
    assert output_error(weights(), made.dequantize(), x.T @ x) < output_error(
        weights(), on_the_points_of(made, weights()).dequantize(), x.T @ x
    )


def test_damping_is_raised_where_rounding_errors_leave_the_hessian_indefinite() -> None:
    hessian = torch.eye(4) * 1.0
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05: 1 % is too little, 10 % is enough
    u = inverse_factor(hessian, 0.01, "w")
    assert torch.allclose(u.T @ u, torch.linalg.inv(raised(hessian, 0.1)), atol=1e-5)
    hessian[0, 1] = hessian[1, 0] = 3.0
    with pytest.raises(CheckpointError, match=r"the inputs of layer\.o_proj do not differ enough to fit to"):
        inverse_factor(hessian, 0.01, "layer.o_proj")


def test_the_output_error_is_that_of_the_outputs() -> None:
    weight, x = weights(), inputs()
    changed = weight + 0.01 * weights(seed=3)
    wanted = float(((weight.double() - changed.double()) @ x.T).square().sum())
    assert output_error(weight, changed, x.T @ x) == pytest.approx(wanted, rel=1e-9)


def test_what_it_is_given_stays_as_it_is() -> None:
    weight, exact = weights(), inputs()
    hessian, cross = moments(exact, drifted(exact))
    given = [weight.double(), hessian, cross]
    before = [tensor.clone() for tensor in given]
    for options in ({"act_order": True}, {"act_order": False, "static_groups": False}):
        gptq(given[0], given[1], Grid(3, 16), torch.float32, cross=given[2], **options)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize(
    ("grid", "options", "match"),
    [
        (Grid(4, 36), {}, "a group of 36 columns does not divide a row of 96"),
        (Grid(4, 32), {"static_groups": False}, "act-order and quantized scales need static groups"),
        (Grid(4, 32, True, 6), {"act_order": False, "static_groups": False}, "need static groups"),
    ],
)
def test_what_cannot_be_asked_is_refused(grid: Grid, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        gptq(weights(), torch.eye(COLS), grid, torch.float32, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", ORDERS)
def test_what_is_not_finite_is_refused_by_name(options: dict[str, bool], bad: float) -> None:
    weight, hessian = weights(), torch.eye(COLS)
    weight[2, 40] = bad
    with pytest.raises(CheckpointError, match=r"layer\.o_proj holds a NaN or an infinity"):
        gptq(weight, hessian, Grid(4, 32), torch.float32, name="layer.o_proj", **options)
    hessian[3, 5] = bad
    with pytest.raises(CheckpointError, match=r"the inputs of layer\.o_proj overflow"):
        gptq(weights(), hessian, Grid(4, 32), torch.float32, name="layer.o_proj", **options)
