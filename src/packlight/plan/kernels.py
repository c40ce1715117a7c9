"""Which matrix multiplication runs a stored grid, and what that kernel holds in memory.

The runtime asks the same functions, so the plan and the run agree. `int4` is torch's
`_weight_int4pack_mm_for_cpu`, `int8` is `_weight_int8pack_mm`; both compute in bfloat16. `reference` keeps packed
words and dequantizes them at each use.
"""

from __future__ import annotations

import math
from typing import Literal

from packlight.plan.layout import dense_dtype, matrix_shape, packed_words
from packlight.spec import DTYPE_BYTES, Grid, ModelSpec, Precision, TensorSpec

Kernel = Literal["int4", "int8", "reference"]

INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes that the int4 kernel knows."""
INT4_ROWS = 64
"""The int4 kernel works on blocks of this many rows."""
KERNEL_DTYPE = "bfloat16"


def kernel_of(grid: Grid, rows: int, cols: int) -> Kernel:
    """The kernel that multiplies a matrix (rows, cols) on this grid, on a CPU and in bfloat16."""
    if grid.bits == 8 and grid.group_size is None:
        return "int8"
    if grid.bits == 4 and rows % INT4_ROWS == 0 and int4_group(grid, cols) is not None:
        return "int4"
    return "reference"


def int4_group(grid: Grid, cols: int) -> int | None:
    """The group size that the int4 kernel is given for rows of `cols` columns, or None where it has none.

    One scale per row is repeated over the largest group that the kernel knows and that divides the row.
    """
    if grid.group_size is None:
        return next((group for group in INT4_GROUPS if cols % group == 0), None)
    return grid.group_size if grid.group_size in INT4_GROUPS and grid.fits(cols) else None


def kernel_for(tensor: TensorSpec, precision: Precision) -> str:
    """The key of `Hardware.rates` that this tensor is multiplied with: a dtype, `int8`, `int4` or `reference`."""
    grid = precision.grid_of(tensor)
    if grid is None:
        return precision.dtype
    stack, rows, cols = matrix_shape(tensor)
    if stack or precision.dtype != KERNEL_DTYPE:
        return "reference"
    return kernel_of(grid, rows, cols)


def resident_tensor_bytes(tensor: TensorSpec, precision: Precision, is_tied: bool) -> int:
    """Bytes that the CPU runtime holds for one tensor.

    A tied embedding is looked up by row and multiplied as the head. On the int8 row grid both share their codes;
    the int4 kernel's order of codes cannot be looked up by row, so there both forms are held.
    """
    grid = precision.grid_of(tensor)
    if tensor.kind != "embedding" or grid is None:
        return multiplied_bytes(tensor, precision)
    if not is_tied:
        return _lookup_bytes(tensor, precision)
    if kernel_for(tensor, precision) == "int4":
        return _lookup_bytes(tensor, precision) + multiplied_bytes(tensor, precision)
    if kernel_for(tensor, precision) == "int8":
        lookup_zeros = 0 if grid.symmetric else tensor.shape[0]  # int8 beside the kernel's bfloat16
        return multiplied_bytes(tensor, precision) + lookup_zeros
    return _lookup_bytes(tensor, precision)


def multiplied_bytes(tensor: TensorSpec, precision: Precision) -> int:
    """Bytes that one multiplication with this tensor reads: its kernel's codes, scales and zero points."""
    grid = precision.grid_of(tensor)
    if grid is None:
        return tensor.numel * DTYPE_BYTES[dense_dtype(tensor, precision)]
    kernel = kernel_for(tensor, precision)
    if kernel == "reference":
        return _lookup_bytes(tensor, precision)
    _, rows, cols = matrix_shape(tensor)
    scale_bytes = DTYPE_BYTES[precision.dtype]
    if kernel == "int8":
        return rows * cols + rows * scale_bytes * (1 if grid.symmetric else 2)
    group = int4_group(grid, cols)
    assert group is not None, "kernel_of said int4"
    return rows * cols // 2 + rows * (cols // group) * 2 * scale_bytes  # scale and zero, one pair a group


def head_of(spec: ModelSpec) -> TensorSpec | None:
    """The tensor that makes logits: the LM head, or the tied input embedding."""
    kind = "embedding" if spec.is_tied else "head"
    return next((tensor for tensor in spec.tensors if tensor.kind == kind), None)


def _lookup_bytes(tensor: TensorSpec, precision: Precision) -> int:
    """Packed words, scales and int8 zero points: what is held where rows are dequantized one by one."""
    grid = precision.grid_of(tensor)
    assert grid is not None, "only quantized tensors are looked up in packed form"
    stack, rows, cols = matrix_shape(tensor)
    groups = rows * grid.num_groups(cols)
    words = rows * (cols if grid == Grid(8, None, grid.symmetric) else 4 * packed_words(cols, grid.bits))
    return math.prod(stack) * (words + groups * (DTYPE_BYTES[precision.dtype] + (0 if grid.symmetric else 1)))
