"""The power with which a cost grows: the slope of its logarithm over the logarithm of the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from packlight.errors import UsageError


@dataclass(frozen=True)
class Exponent:
    """cost = factor * size ** value, by least squares on the logarithms.

    Args:
        value: the slope.
        stderr: its standard error, from the residuals; None for two points, which leave no residual.
        factor: the cost at size 1.
        n: how many points were fitted.
    """

    value: float
    stderr: float | None
    factor: float
    n: int

    def at(self, size: float) -> float:
        """The fitted cost at a size."""
        return float(self.factor * size**self.value)


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fit a power law.

    Raises:
        UsageError: fewer than two different sizes, or a size or cost that is not positive.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise UsageError(f"an exponent needs costs at two different sizes or more, not {len(costs)} at {list(sizes)}")
    if min(*sizes, *costs) <= 0:
        raise UsageError("an exponent is fitted to positive sizes and costs: leave out what was too small to measure")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    stderr = math.sqrt(residual / (n - 2) / spread) if n > 2 else None
    return Exponent(slope, stderr, math.exp(intercept), n)
