"""GPTQ: round one input column after the other, and let the columns that are still free make up for the error.

For a layer y = W x with H = sum over calibration tokens of x x^T, the output error ||(W - W')X||^2 is a quadratic form
in H. With U the upper Cholesky factor of H^-1, rounding column j to q costs ((w_j - q) / U_jj)^2 / 2, and the best
answer of the later columns is `W[:, j:] -= (w_j - q) / U_jj * U[j, j:]` (Frantar et al., "GPTQ", arXiv 2210.17323,
equations 2, 3 and section 3).

Asymmetric calibration (GPTAQ, Li et al., arXiv 2504.02692) asks for the output W X~ of the unchanged model, where X~
is what entered the layer before anything was changed: with C = (X~ - X) X^T, the later columns also absorb
w_j (x~_j - x_j), by `W[:, j:] += w_j P[j, j:]`, P = triu(C U^T, 1) U.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from packlight.errors import CheckpointError, UsageError
from packlight.ops.grid import Clip, QuantizedTensor, Scales, fit
from packlight.spec import Grid

BLOCK_SIZE = 128
"""Columns whose updates are gathered before the rest of the matrix is changed; it does not change the result."""
DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it, so that it can be inverted."""


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    act_order: bool = True,
    static_groups: bool = True,
    clip: Clip = "mse",
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    cross: torch.Tensor | None = None,
    name: str = "weight",
) -> QuantizedTensor:
    """Put `weight` on a grid with the least output error that rounding column by column finds.

    Args:
        weight: floating point (rows, cols).
        hessian: sum of x x^T, (cols, cols); any positive multiple of it gives the same result.
        grid: of the result; its group must divide `cols`.
        scale_dtype: dtype in which scales are stored; a code is rounded with the stored scale.
        act_order: columns with the largest diagonal of H first; otherwise as they lie.
        static_groups: the points of every group are fitted before the first column is rounded; otherwise when the first
            column of a group comes round, on the weights as they have been changed by then. Needed by `act_order`,
            where the columns of a group do not come one after the other, and by grids that quantize their scales.
        clip: how the points of a group are fitted; see `ops.grid.fit`. The importance of a column is 1 / U_jj^2.
        damping: share of the mean diagonal that is added to the diagonal.
        cross: C = sum of (x~ - x) x^T, (cols, cols), in the units of `hessian`; None calibrates symmetrically.
        name: for error messages.

    Returns:
        Codes, scales and zero points. Columns that no token ever reached are rounded to nearest.

    Raises:
        UsageError: groups that are not static, where they must be.
        CheckpointError: `weight` or `hessian` is not finite.
    """
    if not static_groups and (act_order or grid.scale_bits is not None):
        raise UsageError("act-order and quantized scales need static groups")
    rows, cols = weight.shape
    group = cols // grid.num_groups(cols)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(cols)
    u = inverse_factor(hessian[order][:, order], damping, name)
    p = None if cross is None else torch.triu(cross[order][:, order] @ u.T, diagonal=1) @ u
    importance = torch.empty_like(diagonal)
    importance[order] = u.diagonal().reciprocal().square()
    w = weight.to(hessian.dtype)[:, order]
    codes = torch.empty(rows, cols, dtype=torch.int8)
    fitted: list[Scales] = []
    if static_groups:
        fitted = [fit(weight, grid, scale_dtype, name, clip, importance)]
        scale, zero = _expand(fitted[0], group, w.dtype)
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        error = torch.empty(rows, stop - start, dtype=w.dtype)
        for j in range(start, stop):
            if not static_groups and j % group == 0:
                end = j + group
                ahead = w[:, j:end].clone()
                if end > stop:  # what lies beyond this block has not heard of the errors in it yet
                    ahead[:, stop - j :] -= _owed(error[:, : j - start], w[:, start:j], u, p, start, stop, end)
                fitted.append(fit(ahead, replace(grid, group_size=None), scale_dtype, name, clip, importance[j:end]))
                scale, zero = _expand(_joined(fitted), group, w.dtype)
            s, z = scale[:, order[j]], zero[:, order[j]]
            before = w[:, j].clone()
            code = (before / s).round_().add_(z).clamp_(grid.qmin, grid.qmax)
            stored = ((code - z) * s).to(scale_dtype).to(w.dtype)  # as `dequantize` gives it back
            codes[:, order[j]] = code.to(torch.int8)
            error[:, j - start] = (before - stored) / u[j, j]
            w[:, j + 1 : stop] -= torch.outer(error[:, j - start], u[j, j + 1 : stop])
            if p is not None:
                w[:, j + 1 : stop] += torch.outer(before, p[j, j + 1 : stop])
        w[:, stop:] -= _owed(error, w[:, start:stop], u, p, start, stop, cols)
    return QuantizedTensor.on(_joined(fitted), codes, grid)


def output_error(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W') X||^2 over the calibration tokens: trace of D H D^T, D = W - W'."""
    difference = weight.to(hessian.dtype) - changed.to(hessian.dtype)
    return float(((difference @ hessian) * difference).sum())


def inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """U, upper triangular with U^T U = H^-1, of H with its diagonal raised; a column that was never reached stands for
    itself. Where rounding errors leave H indefinite, damping is raised tenfold, twice at most.

    Raises:
        CheckpointError: H is not finite, or indefinite with any damping.
    """
    mean = hessian.diagonal().mean()
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(f"the inputs of {name} overflow on the calibration text: give another --data")
    for factor in (1, 10, 100):
        h = hessian.clone()
        h.diagonal()[h.diagonal() <= 0] = mean if mean > 0 else 1.0
        h.diagonal().add_(factor * damping * mean)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                found: torch.Tensor = upper
                return found
    raise CheckpointError(f"the inputs of {name} do not differ enough to fit to: give more calibration text")


def _owed(
    error: torch.Tensor,
    columns: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor | None,
    start: int,
    stop: int,
    end: int,
) -> torch.Tensor:
    """What columns [stop, end) are to be lowered by for the columns from `start` on that have been rounded."""
    done = start + error.shape[1]
    owed = error @ u[start:done, stop:end]
    return owed if p is None else owed - columns @ p[start:done, stop:end]


def _expand(scales: Scales, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every column, (rows, cols)."""
    scale = scales.scale.to(dtype).repeat_interleave(group, dim=1)
    if scales.zero_point is None:
        return scale, torch.zeros_like(scale)
    return scale, scales.zero_point.to(dtype).repeat_interleave(group, dim=1)


def _joined(parts: list[Scales]) -> Scales:
    """The points of neighbouring groups as those of one matrix."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Scales(torch.cat([part.scale for part in parts], dim=1), torch.cat(zeros, dim=1) if zeros else None)
