"""The tensors of a packed checkpoint, exactly: names, dtypes, shapes, order and the size of the file.

Everything that plans or writes bytes on disk starts from `tensor_layout`, so that no size is computed twice. The
layouts are those of compressed-tensors (vllm-project/compressed-tensors, `compressors/pack_quantized` and
`compressors/naive_quantized`):

    pack-quantized   weight_packed int32 (rows, ceil(cols * bits / 32)), weight_scale (rows, groups),
                     weight_shape int64 (2,), weight_zero_point int32 (ceil(rows * bits / 32), groups)
    int-quantized    weight int8 (rows, cols), weight_scale (rows, groups), weight_zero_point int8 (rows, groups)

and packlight's own, for what those two cannot say (other widths than 4 and 8 bits, a grid for every tensor, quantized
scales):

    packlight        the tensors of pack-quantized, but where scales are quantized weight_scale_packed int32
                     (rows, ceil(groups * scale_bits / 32)) and weight_scale_unit (rows, 1) in place of weight_scale

A pruned model may leave its zeros out (`Precision.sparse`). Of each pruned matrix, packlight's own layout then holds

    packlight        weight_mask uint8 (rows, ceil(cols / 8)), bit i of byte j says whether column 8j + i is kept,
                     weight_values (kept,) row after row, weight_shape int64 (2,)

which takes cols / 8 + (1 - s) * cols * size bytes a row at a share of zeros s, and so saves from s > 1 / (8 * size) on.

A fused stack of experts (3-D) is packed matrix by matrix, with the stack in front of every shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from packlight.errors import UsageError
from packlight.spec import DTYPE_BYTES, FLOAT_DTYPES, Grid, ModelSpec, Precision, TensorSpec

Layout = Literal["pack-quantized", "int-quantized", "packlight"]
MAX_SHARD_BYTES = 5_000_000_000
"""Transformers' own limit of a weight file."""
Role = Literal["codes", "scales", "zero_points", "shapes", "masks", "values", "left_alone"]

# In the order of alignment that the safetensors writer sorts by (safetensors/src/tensor.rs, `enum Dtype`).
SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
}
_ALIGNMENT = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES)}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. `role` says what part of a quantized matrix it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role = "left_alone"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def tensor_layout(spec: ModelSpec, precision: Precision, layout: Layout | None = None) -> list[StoredTensor]:
    """All tensors of the file, in the order in which they lie there: by alignment, wide first, then by name.

    That is the order of the safetensors writer; it keeps every tensor aligned to its own element size. The default
    layout is `layout_of` the precision.

    Raises:
        UsageError: a group does not divide a row, or the layout cannot hold the precision.
    """
    layout = layout or layout_of(precision)
    check_layout(precision, layout)
    stored = [part for tensor in spec.tensors for part in stored_parts(tensor, precision, layout)]
    return sorted(stored, key=lambda part: (-_ALIGNMENT[part.dtype], part.name))


def layout_of(precision: Precision) -> Layout:
    """The layout that holds a precision: the widest-read one that stock transformers loads it from, else our own."""
    return "pack-quantized" if _is_plain(precision) and len(precision.grids) < 2 else "packlight"


def check_layout(precision: Precision, layout: Layout) -> None:
    """Raises UsageError where a layout of compressed-tensors cannot hold a precision."""
    if layout == "packlight" or _is_plain(precision):
        return
    raise UsageError(
        f"the {layout} layout holds 4 and 8 bits, one grid for the blocks and float scales, not {precision}: "
        "choose packlight"
    )


def _is_plain(precision: Precision) -> bool:
    if precision.sparse is not None or precision.tensors:
        return False
    return all(grid.bits in (4, 8) and grid.scale_bits is None for grid in precision.grids)


def stored_parts(tensor: TensorSpec, precision: Precision, layout: Layout) -> list[StoredTensor]:
    """What one logical tensor becomes in the file."""
    if precision.is_masked(tensor):
        return _masked(tensor, precision)
    grid = precision.grid_of(tensor)
    if grid is None:
        return [StoredTensor(tensor.name, dense_dtype(tensor, precision), tensor.shape)]
    if layout == "int-quantized":
        return _unpacked(tensor, grid, precision.dtype)
    return _packed(tensor, grid, precision.dtype)


def safetensors_header(stored: Sequence[StoredTensor]) -> bytes:
    """The head of a safetensors file that holds these tensors one after the other: length, JSON, padding."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in stored:
        header[part.name] = {
            "dtype": SAFETENSORS_DTYPES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.nbytes],
        }
        offset += part.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def artifact_bytes(spec: ModelSpec, precision: Precision, layout: Layout | None = None) -> int:
    """Exact size of the safetensors files of an artifact, headers included."""
    stored = tensor_layout(spec, precision, layout)
    shards = split_shards([part.nbytes for part in stored])
    headers = (len(safetensors_header([stored[place] for place in shard])) for shard in shards)
    return sum(headers) + total_bytes(stored)


def split_shards(sizes: Sequence[int], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[int]]:
    """Places of tensors of these sizes by shard: a shard is closed before it would grow past the limit."""
    shards: list[list[int]] = [[]]
    used = 0
    for place, size in enumerate(sizes):
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(place)
        used += size
    return shards


def total_bytes(stored: Iterable[StoredTensor]) -> int:
    """Bytes of the tensors' data, without a header."""
    return sum(part.nbytes for part in stored)


def dense_dtype(tensor: TensorSpec, precision: Precision) -> str:
    """The dtype of a tensor that is left alone: integer buffers and 8-bit floats keep theirs."""
    return precision.dtype if tensor.dtype in (*FLOAT_DTYPES, "float64") else tensor.dtype


def matrix_shape(tensor: TensorSpec) -> tuple[tuple[int, ...], int, int]:
    """The stack in front (empty for a plain matrix), rows and columns of a tensor that is quantized."""
    if len(tensor.shape) < 2:
        raise UsageError(f"{tensor.name} of shape {tensor.shape} is not a matrix and cannot be put on a grid")
    *stack, rows, cols = tensor.shape
    return tuple(stack), rows, cols


def packed_words(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits fill, without gaps between the codes."""
    return -(-count * bits // 32)


def _masked(tensor: TensorSpec, precision: Precision) -> list[StoredTensor]:
    assert precision.sparse is not None
    rows, cols = tensor.shape
    base, kept = _base(tensor), tensor.numel - precision.sparse.num_zeros(tensor)
    return [
        StoredTensor(f"{base}_mask", "uint8", (rows, -(-cols // 8)), "masks"),
        StoredTensor(f"{base}_values", dense_dtype(tensor, precision), (kept,), "values"),
        StoredTensor(f"{base}_shape", "int64", (2,), "shapes"),
    ]


def _packed(tensor: TensorSpec, grid: Grid, dtype: str) -> list[StoredTensor]:
    stack, rows, cols = matrix_shape(tensor)
    base, groups = _base(tensor), grid.num_groups(cols)
    parts = [
        StoredTensor(f"{base}_packed", "int32", (*stack, rows, packed_words(cols, grid.bits)), "codes"),
        StoredTensor(f"{base}_shape", "int64", (len(tensor.shape),), "shapes"),
    ]
    if grid.scale_bits is None:
        parts.append(StoredTensor(f"{base}_scale", dtype, (*stack, rows, groups), "scales"))
    else:
        words = packed_words(groups, grid.scale_bits)
        parts.append(StoredTensor(f"{base}_scale_packed", "int32", (*stack, rows, words), "scales"))
        parts.append(StoredTensor(f"{base}_scale_unit", dtype, (*stack, rows, 1), "scales"))
    if not grid.symmetric:
        zeros = (*stack, packed_words(rows, grid.bits), groups)
        parts.append(StoredTensor(f"{base}_zero_point", "int32", zeros, "zero_points"))
    return parts


def _unpacked(tensor: TensorSpec, grid: Grid, dtype: str) -> list[StoredTensor]:
    if grid.bits != 8:
        raise UsageError(f"the int-quantized layout holds 8 bits, not {grid.bits}: choose pack-quantized")
    stack, rows, cols = matrix_shape(tensor)
    base, groups = _base(tensor), grid.num_groups(cols)
    parts = [
        StoredTensor(base, "int8", tensor.shape, "codes"),
        StoredTensor(f"{base}_scale", dtype, (*stack, rows, groups), "scales"),
    ]
    if not grid.symmetric:
        parts.append(StoredTensor(f"{base}_zero_point", "int8", (*stack, rows, groups), "zero_points"))
    return parts


def _base(tensor: TensorSpec) -> str:
    """`model.layers.0.mlp.up_proj.weight`; fused experts have no `.weight` of their own and get one."""
    return tensor.name if tensor.name.endswith(".weight") else f"{tensor.name}.weight"
