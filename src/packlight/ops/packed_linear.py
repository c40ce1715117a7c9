"""`x @ dequant(W).T` for weights that stay packed: a plain reference, and torch's own CPU kernels beside it.

Every function takes x (..., cols) and returns (..., rows) in x's dtype. `reference` works for every grid, dtype and
device; `int8` and `int4` hand a bfloat16 x to the kernels of torch and are tested against it.
"""

from __future__ import annotations

import torch

from packlight.ops.grid import QuantizedTensor, dequantize
from packlight.ops.pack import unpack

ROW_CHUNK = 4096
"""Rows de-quantized at a time by the reference, so that an LM head never becomes a whole dense matrix."""

INT4_ROW_BLOCK = 64
"""Torch's int4 kernel stores blocks of this many output rows; a part of a matrix can be packed alone."""


def reference(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """De-quantize and multiply, some rows at a time.

    Args:
        x: (..., cols).
        words: int32 (rows, words), as `pack` made them.
        scale: (rows, groups).
        zero_point: int8 (rows, groups) or None.
        bits: width of a code.
    """
    cols = x.shape[-1]
    parts = []
    for start in range(0, words.shape[0], ROW_CHUNK):
        part = slice(start, start + ROW_CHUNK)
        zero = None if zero_point is None else zero_point[part]
        weight = dequantize(unpack(words[part], bits, cols), scale[part], zero, x.dtype)
        parts.append(torch.nn.functional.linear(x, weight))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Per-row 8-bit weights through torch's `_weight_int8pack_mm`.

    A zero point costs one sum over x: `x @ ((q - z) s).T = s (x @ q.T) - s z sum(x)`.

    Args:
        x: bfloat16 (..., cols).
        codes: int8 (rows, cols).
        scale: bfloat16 (rows,).
        zero_point: bfloat16 (rows,) or None.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch._weight_int8pack_mm(flat, codes, scale)
    if zero_point is not None:
        offset = flat.float().sum(dim=-1, keepdim=True) * (scale.float() * zero_point.float())  # (tokens, rows)
        out = (out.float() - offset).to(x.dtype)
    return out.reshape(*x.shape[:-1], codes.shape[0])


def int4(x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """Grouped 4-bit weights through torch's `_weight_int4pack_mm_for_cpu`.

    Args:
        x: bfloat16 (..., cols).
        packed: uint8 (rows, cols / 2), from `pack_int4`.
        scale_and_zero: bfloat16 (groups, rows, 2), from `pack_int4`.
        group_size: 32, 64, 128 or 256 columns.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group_size, scale_and_zero)
    return out.reshape(*x.shape[:-1], packed.shape[0])


def pack_int4(weight: QuantizedTensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel layout of a 4-bit matrix: (packed, scale_and_zero) as `int4` takes them.

    The kernel computes `(u - 8) * scale + zero` on unsigned codes u, so an integer zero point z becomes
    `-z * scale`. Scales of a wider group (a whole row) are repeated for every `group_size` columns.
    """
    rows, cols = weight.shape
    packed = torch.empty(rows, cols // 2, dtype=torch.uint8)
    step = INT4_ROW_BLOCK * max(1, ROW_CHUNK // INT4_ROW_BLOCK)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        unsigned = weight.codes[part].to(torch.int32) + 8
        packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    repeats = cols // group_size // weight.scale.shape[1]
    scale = weight.scale.repeat_interleave(repeats, dim=1)  # (rows, groups)
    if weight.zero_point is None:
        zero = torch.zeros_like(scale)
    else:
        zero = -(weight.zero_point.repeat_interleave(repeats, dim=1).to(scale.dtype) * scale)
    pairs = torch.stack((scale, zero), dim=-1).transpose(0, 1)  # (groups, rows, 2)
    return packed, pairs.contiguous().to(torch.bfloat16)
