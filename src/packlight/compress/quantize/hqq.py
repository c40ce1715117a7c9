"""HQQ, half-quadratic quantization: points that are fitted to the weights by a norm that forgives outliers.

With points (q - z) s for the codes q, minimize ||W - (q - z) s||_p^p, p = 0.7, by half-quadratic splitting: the error
gets a variable E of its own, and alternately (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
Models", 2023, mobiusml.github.io/hqq_blog; code mobiusml/hqq)

    q = round(W / s + z)
    E = shrink(W - (q - z) s),   shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)
    z = mean(q - (W - E) / s)
    s = sum((q - z) (W - E)) / sum((q - z)^2)

over each group. It needs no data. It differs from its authors' code in three things. Their zero points are real numbers
and their scales are fixed; zero points are integers here, which alone cannot move by the fraction of a step that HQQ
asks for: z is rounded in every iteration, and s, by the same splitting in closed form, does the work (all of it on a
symmetric grid, and nearly all from the zero points of a min-max grid). Errors are measured in steps of the first scale,
so that beta does not depend on the magnitude of the weights: in the weights' own units, beta = 10 shrinks every error
below 0.17 to nothing. And a group keeps the points that it started from unless the new ones have the lower norm.

Its limits: it knows weights and no activations; it finds the best points near those it starts from, so that one weight
of twenty times the others' size keeps its whole group coarse; and at 8 bits there is little left to win.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.quantize.options import GridOptions, relative_error
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import CodedScale, QuantizedTensor, Scales, dequantize, fit, round_to
from packlight.spec import Grid

ROWS = 64
"""Rows that are worked on at once: few enough that what is computed about them stays in a processor's cache."""
LEAST_ERROR = 1e-6
"""In steps; smaller errors count as this one in |x|^(p - 1), which is infinite at 0."""


@dataclass(frozen=True)
class Hqq(GridOptions):
    """Half-quadratic quantization; see `GridOptions` for the other hyper-parameters.

    Args:
        norm: p, above 0 and at most 1; smaller forgives outliers more.
        beta: weight of the quadratic term, positive; the larger, the more of each error counts.
        iterations: at most, 1 or more; a group stops at the first one that does not lower its norm.
    """

    norm: float = 0.7
    beta: float = 10.0
    iterations: int = 20

    name: ClassVar[str] = "hqq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm <= 1:
            raise UsageError(f"norm is above 0 and at most 1, not {self.norm}")
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"beta is a positive number, not {self.beta}")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise UsageError(f"iterations is a whole number of at least 1, not {self.iterations}")

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Every matrix of every block; one row per block: ||W - W'||^2 / ||W||^2 over its matrices."""
        for block in blocks:
            originals = {name: weight for name, _, weight in self.matrices(block)}
            self.round_(block)
            yield relative_error(block, originals)

    def round(
        self, name: str, grid: Grid, weight: torch.Tensor, importance: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """One matrix, rounded to nearest on points that are fitted by HQQ. No group's p-norm is above that of `Rtn`."""
        parts = []
        for part in weight.split(ROWS):
            start = fit(part, grid, self.scale_dtype, name, self.clip, importance)
            found = half_quadratic(part, start, grid, self.norm, self.beta, self.iterations)
            parts.append(_better(part, start, found, grid, self.norm))
        return QuantizedTensor.stacked(parts)


def half_quadratic(
    weight: torch.Tensor, start: Scales, grid: Grid, norm: float, beta: float, iterations: int
) -> Scales:
    """The points that half-quadratic splitting arrives at from `start`.

    Args:
        weight: floating point (rows, cols).
        start: points in the dtype in which scales are stored; scales that are quantized keep their unit.

    Returns:
        Points of the same form, the scales rounded to it.
    """
    rows, groups = start.scale.shape
    step = start.scale.float().unsqueeze(-1)  # (rows, groups, 1), the unit of everything below
    values = weight.float().reshape(rows, groups, -1) / step  # (rows, groups, group_size)
    scale = torch.ones_like(step)
    zero = torch.zeros_like(step) if start.zero_point is None else start.zero_point.float().unsqueeze(-1)
    best, best_scale, best_zero = torch.full_like(step, torch.inf), scale, zero
    for _ in range(iterations + 1):  # the last round only judges the points of the one before
        points = (values / scale).add_(zero).round_().clamp_(grid.qmin, grid.qmax).sub_(zero)  # q - z
        error = values - points * scale
        size = error.abs()
        slope = size.clamp(min=LEAST_ERROR).pow_(norm - 1)
        loss = (size * slope).sum(dim=-1, keepdim=True)
        is_lower = loss < best
        if not bool(is_lower.any()):
            break
        best = torch.where(is_lower, loss, best)
        best_scale, best_zero = torch.where(is_lower, scale, best_scale), torch.where(is_lower, zero, best_zero)
        target = values - error.sign_().mul_(size.sub_(slope.div_(beta)).clamp_(min=0))  # W - E
        if not grid.symmetric:
            moved = (zero + (points - target / scale).mean(dim=-1, keepdim=True)).round_()
            moved.clamp_(grid.qmin, grid.qmax)
            points, zero = points.add_(zero - moved), moved
        fitted = (points * target).sum(dim=-1, keepdim=True) / points.square_().sum(dim=-1, keepdim=True)
        # Points that are all zero, or that lie across from their weights, say nothing about the scale (NaN included).
        scale = torch.where(fitted > 0, fitted, scale)
        # A group that has stopped goes back to its best points, and stays there.
        scale, zero = torch.where(is_lower, scale, best_scale), torch.where(is_lower, zero, best_zero)
    return _stored_as(start, grid, (best_scale * step).squeeze(-1), best_zero.squeeze(-1))


def _stored_as(start: Scales, grid: Grid, scale: torch.Tensor, zero: torch.Tensor) -> Scales:
    """Float points (rows, groups) in the form in which `start` is stored."""
    zero_point = None if start.zero_point is None else zero.to(torch.int8)
    if start.coded is None or grid.scale_bits is None:
        limits = torch.finfo(start.scale.dtype)
        return Scales(scale.clamp(limits.tiny, limits.max).to(start.scale.dtype), zero_point)
    unit = start.coded.unit
    codes = (scale / unit.float()).round_().clamp_(1, (1 << grid.scale_bits) - 1)
    coded = CodedScale(codes.to(torch.uint8), unit)
    return Scales(coded.value(), zero_point, coded)


def _better(weight: torch.Tensor, first: Scales, second: Scales, grid: Grid, norm: float) -> QuantizedTensor:
    """Of each group, the points whose p-norm of the error of the stored weights is lower; the first where equal."""
    made = [QuantizedTensor.on(s, round_to(weight, s.scale, s.zero_point, grid), grid) for s in (first, second)]
    losses = [_loss(weight, one, norm) for one in made]
    second_wins = losses[1] < losses[0]  # (rows, groups)

    def pick(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wins = second_wins.repeat_interleave(a.shape[1] // second_wins.shape[1], dim=1)
        return torch.where(wins, b, a)

    zeros = [s.zero_point for s in (first, second) if s.zero_point is not None]
    coded = [s.coded for s in (first, second) if s.coded is not None]
    return QuantizedTensor(
        pick(made[0].codes, made[1].codes),
        pick(first.scale, second.scale),
        pick(*zeros) if zeros else None,
        grid,
        CodedScale(pick(coded[0].codes, coded[1].codes), coded[0].unit) if coded else None,
    )


def _loss(weight: torch.Tensor, made: QuantizedTensor, norm: float) -> torch.Tensor:
    """sum |W - W'|^p of each group, (rows, groups), W' as it is decoded."""
    decoded = dequantize(made.codes, made.scale, made.zero_point, torch.float32)
    return decoded.sub_(weight).abs_().pow_(norm).reshape(*made.scale.shape, -1).sum(dim=-1)
