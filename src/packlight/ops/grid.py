"""Integer grids: fitting scales and zero points, rounding to codes, and back.

The convention is that of compressed-tensors: codes are signed, `w = (code - zero_point) * scale`, and a symmetric scale
is `2 max|w| / (2^bits - 1)`, so that the grid spans the full range of a signed integer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from packlight.errors import CheckpointError
from packlight.spec import Grid

ROW_CHUNK = 1024
"""Rows that are worked on at once: rows are independent, and an LM head's float copies would outweigh it many times."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix on a grid. No later stage rounds these again.

    Args:
        codes: int8 (rows, cols), each in [grid.qmin, grid.qmax].
        scale: floating point (rows, groups), in the dtype in which it is stored.
        zero_point: int8 (rows, groups), in [grid.qmin, grid.qmax]; None for a symmetric grid.
        grid: the grid that the codes belong to.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The (rows, cols) matrix in `dtype`, by default that of the scale, computed in that dtype."""
        return dequantize(self.codes, self.scale, self.zero_point, dtype)


def quantize(weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, name: str = "weight") -> QuantizedTensor:
    """Round to nearest on a min-max grid.

    Args:
        weight: floating point (rows, cols).
        grid: bits, group size and symmetry; its group must divide `cols`.
        scale_dtype: dtype in which scales are stored. Codes are rounded with the stored scale, not with a finer one.
        name: for the error message.

    Raises:
        CheckpointError: `weight` holds a NaN or an infinity.
        UsageError: the group does not divide the row.
    """
    parts = [_quantize_rows(part, grid, scale_dtype, name) for part in weight.split(ROW_CHUNK)]
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        grid,
    )


def fit(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Min-max scale (rows, groups) in `scale_dtype` and int8 zero point (rows, groups), None when symmetric."""
    rows, cols = weight.shape
    groups = grid.num_groups(cols)
    values = weight.float().reshape(rows, groups, cols // groups)  # (rows, groups, group_size)
    low, high = values.amin(dim=-1), values.amax(dim=-1)  # (rows, groups)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CheckpointError(
            f"{name} holds a NaN or an infinity, which no grid can store: repair the checkpoint first"
        )
    steps = grid.qmax - grid.qmin
    if grid.symmetric:
        scale = _positive(2 * torch.maximum(low.abs(), high.abs()) / steps, scale_dtype)
        return scale, None
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero must be on the grid: padding and pruned weights stay zero
    scale = _positive((high - low) / steps, scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax)
    # A group of zeros has any zero point; with 0 its codes are 0 too, and a kernel has no large numbers to cancel out.
    zero_point = torch.where(high > low, zero_point, torch.zeros_like(zero_point))
    return scale, zero_point.to(torch.int8)


def round_to(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Nearest codes, int8 (rows, cols), of `weight` on a given grid."""
    rows, cols = weight.shape
    groups = scale.shape[1]
    values = weight.float().reshape(rows, groups, cols // groups) / scale.float().unsqueeze(-1)
    values = values.round_()
    if zero_point is not None:
        values += zero_point.unsqueeze(-1)
    return values.clamp_(grid.qmin, grid.qmax).to(torch.int8).reshape(rows, cols)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`(codes - zero_point) * scale`, (rows, cols), rounded once to `dtype` (default: the scale's)."""
    rows, cols = codes.shape
    groups = scale.shape[1]
    values = codes.reshape(rows, groups, cols // groups).to(scale.dtype)
    if zero_point is not None:
        # Differences of codes are integers up to 255, exact in every float dtype that scales are stored in.
        values -= zero_point.to(scale.dtype).unsqueeze(-1)
    values *= scale.unsqueeze(-1)
    return values.reshape(rows, cols).to(dtype or scale.dtype)


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over a tensor's bytes, hex; equal for equal values in equal dtypes and order."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def squared_error(exact: torch.Tensor, approximate: torch.Tensor) -> float:
    """||exact - approximate||^2 in float32, some rows at a time."""
    pairs = zip(exact.split(ROW_CHUNK), approximate.split(ROW_CHUNK), strict=True)
    return sum(float((theirs.float() - mine.float()).square().sum()) for mine, theirs in pairs)


def squared_norm(values: torch.Tensor) -> float:
    """||values||^2 in float32, some rows at a time."""
    return sum(float(part.float().square().sum()) for part in values.split(ROW_CHUNK))


def _quantize_rows(weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, name: str) -> QuantizedTensor:
    scale, zero_point = fit(weight, grid, scale_dtype, name)
    return QuantizedTensor(round_to(weight, scale, zero_point, grid), scale, zero_point, grid)


def _positive(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in their storage dtype, a group of zeros given scale 1, and no scale rounded down to zero."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(min=torch.finfo(dtype).tiny, max=torch.finfo(dtype).max).to(dtype)
