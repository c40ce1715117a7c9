"""Integer grids: fitting scales and zero points, rounding to codes, and back.

The convention is that of compressed-tensors: codes are signed, `w = (code - zero_point) * scale`, and a symmetric scale
is `2 max|w| / (2^bits - 1)`, so that the grid spans the full range of a signed integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from packlight.errors import CheckpointError
from packlight.spec import Grid

Clip = Literal["minmax", "mse"]
CLIP_STEPS = 31
LEAST_SHARE = 0.4
"""The shares of a group's range that a search tries: 31 from 1 down to 0.4, where 2 bits have their optimum."""
ROW_CHUNK = 1024
"""Rows that are worked on at once: rows are independent, and an LM head's float copies would outweigh it many times."""


@dataclass(frozen=True)
class CodedScale:
    """Scales that are quantized themselves: scale = code * unit, computed in the unit's dtype.

    Args:
        codes: uint8 (rows, groups), at least 1.
        unit: floating point (rows, 1).
    """

    codes: torch.Tensor
    unit: torch.Tensor

    def value(self) -> torch.Tensor:
        """The scales, (rows, groups)."""
        return self.codes.to(self.unit.dtype) * self.unit


@dataclass(frozen=True)
class Scales:
    """The points of a grid for one matrix.

    Args:
        scale: floating point (rows, groups), in the dtype in which it is stored.
        zero_point: int8 (rows, groups), in [grid.qmin, grid.qmax]; None for a symmetric grid.
        coded: what `scale` is made of where the grid quantizes its scales; else None.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    coded: CodedScale | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix on a grid. No later stage rounds these again.

    Args:
        codes: int8 (rows, cols), each in [grid.qmin, grid.qmax].
        scale: floating point (rows, groups), in the dtype in which it is stored.
        zero_point: int8 (rows, groups), in [grid.qmin, grid.qmax]; None for a symmetric grid.
        grid: the grid that the codes belong to.
        coded_scale: what `scale` is made of where the grid quantizes its scales.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    grid: Grid
    coded_scale: CodedScale | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def to(self, device: str) -> QuantizedTensor:
        """The same on a device."""
        if self.codes.device.type == device:
            return self
        coded, zero = self.coded_scale, self.zero_point
        return QuantizedTensor(
            self.codes.to(device),
            self.scale.to(device),
            None if zero is None else zero.to(device),
            self.grid,
            None if coded is None else CodedScale(coded.codes.to(device), coded.unit.to(device)),
        )

    @classmethod
    def on(cls, scales: Scales, codes: torch.Tensor, grid: Grid) -> QuantizedTensor:
        """Codes on the points of a fitted grid."""
        return cls(codes, scales.scale, scales.zero_point, grid, scales.coded)

    @classmethod
    def stacked(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Some rows below the others, all on one grid."""
        if len(parts) == 1:
            return parts[0]
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        coded = [part.coded_scale for part in parts if part.coded_scale is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            parts[0].grid,
            CodedScale(torch.cat([c.codes for c in coded]), torch.cat([c.unit for c in coded])) if coded else None,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The (rows, cols) matrix in `dtype`, by default that of the scale, computed in that dtype."""
        return dequantize(self.codes, self.scale, self.zero_point, dtype)


def quantize(
    weight: torch.Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    name: str = "weight",
    clip: Clip = "minmax",
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round to nearest.

    Args:
        weight: floating point (rows, cols).
        grid: bits, group size and symmetry; its group must divide `cols`.
        scale_dtype: dtype in which scales are stored. Codes are rounded with the stored scale, not with a finer one.
        name: for the error message.
        clip, importance: see `fit`.

    Raises:
        CheckpointError: `weight` holds a NaN or an infinity.
        UsageError: the group does not divide the row.
    """
    parts = []
    for part in weight.split(ROW_CHUNK):
        scales = fit(part, grid, scale_dtype, name, clip, importance)
        parts.append(QuantizedTensor.on(scales, round_to(part, scales.scale, scales.zero_point, grid), grid))
    return QuantizedTensor.stacked(parts)


def fit(
    weight: torch.Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    name: str = "weight",
    clip: Clip = "minmax",
    importance: torch.Tensor | None = None,
) -> Scales:
    """The points of a grid for `weight` (rows, cols).

    Args:
        clip: 'minmax' spans each group from its least to its largest weight (symmetric: to its largest magnitude);
            'mse' shrinks that range to where sum of importance * (w - rounded w)^2 over the group is least.
        importance: weight of each column's error, (cols,), positive; default: all equal. 'mse' alone reads it.
    """
    rows, cols = weight.shape
    groups = grid.num_groups(cols)
    values = weight.float().reshape(rows, groups, cols // groups)  # (rows, groups, group_size)
    low, high = values.amin(dim=-1), values.amax(dim=-1)  # (rows, groups)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CheckpointError(
            f"{name} holds a NaN or an infinity, which no grid can store: repair the checkpoint first"
        )
    if grid.symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must be on the grid: pruned weights stay zero
    if clip == "mse":
        each = torch.ones(cols) if importance is None else importance.float()
        share = _best_share(values, low, high, grid, each.reshape(groups, cols // groups))
        low, high = low * share, high * share
    return _stored(low, high, grid, scale_dtype)


def _best_share(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, importance: torch.Tensor
) -> torch.Tensor:
    """The share of each group's range, (rows, groups), at which its weighted squared error is least."""
    best = torch.full_like(low, torch.inf)
    share = torch.ones_like(low)
    for step in range(CLIP_STEPS):
        tried = 1.0 - step * (1.0 - LEAST_SHARE) / (CLIP_STEPS - 1)
        scale, zero = _points(low * tried, high * tried, grid)
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = torch.div(values, scale).round_().add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero).mul_(scale)
        loss = error.sub_(values).square_().mul_(importance).sum(dim=-1)
        share = torch.where(loss < best, tried, share)
        best = torch.minimum(loss, best)
    return share


def _points(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point in float32 that span [low, high]; a group of zeros has scale 1."""
    scale = (high - low) / (grid.qmax - grid.qmin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.qmin - low / scale).round_().clamp_(grid.qmin, grid.qmax)


def _stored(low: torch.Tensor, high: torch.Tensor, grid: Grid, dtype: torch.dtype) -> Scales:
    """Points that span [low, high] (rows, groups) with scales as they are stored."""
    scale = (high - low) / (grid.qmax - grid.qmin)
    coded = None
    if grid.scale_bits is None:
        scale = round_to_dtype(scale, dtype)
    else:
        coded = _coded(scale, grid.scale_bits, dtype)
        scale = coded.value()
    if grid.symmetric:
        return Scales(scale, None, coded)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax)
    # A group of zeros has any zero point; with 0 its codes are 0 too, and a kernel has no large numbers to cancel out.
    zero_point = torch.where(high > low, zero_point, torch.zeros_like(zero_point))
    return Scales(scale, zero_point.to(torch.int8), coded)


def _coded(scale: torch.Tensor, bits: int, dtype: torch.dtype) -> CodedScale:
    """Scales (rows, groups) rounded to unsigned codes times one unit a row."""
    most = (1 << bits) - 1
    unit = round_to_dtype(scale.amax(dim=-1, keepdim=True) / most, dtype)
    codes = (scale / unit.float()).round_().clamp_(1, most)
    return CodedScale(codes.to(torch.uint8), unit)


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


def round_to_dtype(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in their storage dtype: zero becomes 1, and no other is rounded to zero or to infinity."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(min=torch.finfo(dtype).tiny, max=torch.finfo(dtype).max).to(dtype)
