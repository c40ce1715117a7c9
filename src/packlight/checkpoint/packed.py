"""The compressed-tensors layout: which stored tensors make up a matrix, and reading and writing them.

`pack-quantized` stores `weight_packed` int32 (rows, words), `weight_scale` (rows, groups), `weight_shape` int64 (2,)
and, for an asymmetric grid, `weight_zero_point` int32 packed along the rows, (words_of_rows, groups).
`packlight` stores the same, but for scales that are quantized themselves: `weight_scale_packed` int32 and
`weight_scale_unit` (rows, 1) in place of `weight_scale`.
`int-quantized` stores `weight` int8 (rows, cols), `weight_scale`, and `weight_zero_point` int8 (rows, groups).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.shards import TensorEntry
from packlight.checkpoint.stored import SCALES
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError
from packlight.ops.grid import CodedScale, QuantizedTensor
from packlight.ops.pack import num_words, pack, pack_unsigned, unpack, unpack_unsigned
from packlight.spec import Grid

PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_scale_packed",
    "weight_scale_unit",
    "weight_zero_point",
    "weight_shape",
)


@dataclass(frozen=True)
class PackedParts:
    """The stored tensors of one quantized matrix; `names` are full tensor names."""

    base: str
    names: frozenset[str]


def packed_names(index: Mapping[str, TensorEntry]) -> dict[str, PackedParts]:
    """Every quantized matrix of a checkpoint, keyed by module name (`model.layers.0.mlp.up_proj`)."""
    found = {}
    for name in index:
        if not name.endswith(SCALES):
            continue
        base = name.rpartition(".")[0]
        parts = [f"{base}.{part}" for part in (*PARTS, "weight")]
        found[base] = PackedParts(base, frozenset(part for part in parts if part in index))
    return found


def read_quantized(checkpoint: Checkpoint, base: str) -> QuantizedTensor:
    """Codes, scales and zero points of one matrix.

    Raises:
        CheckpointError: a part is missing, or the parts' shapes do not belong together.
    """
    grid = _grid_of(checkpoint, base)
    found = {}
    for part in (*PARTS, "weight"):
        if entry := checkpoint.index.get(f"{base}.{part}"):
            found[part] = read_tensor(entry)
    return decode(found, grid, base)


def decode(parts: Mapping[str, torch.Tensor], grid: Grid, base: str) -> QuantizedTensor:
    """A matrix from its stored parts, keyed by the last part of their names.

    Raises:
        CheckpointError: a part is missing, or the parts' shapes do not belong together.
    """
    is_packed = "weight_packed" in parts
    wanted = ["weight_packed", "weight_shape"] if is_packed else ["weight"]
    wanted += ["weight_scale"] if grid.scale_bits is None else ["weight_scale_packed", "weight_scale_unit"]
    wanted += [] if grid.symmetric else ["weight_zero_point"]
    if missing := [part for part in wanted if part not in parts]:
        raise CheckpointError(f"{base}.{missing[0]} is missing, which the checkpoint's quantization_config implies")
    zero = None if grid.symmetric else parts["weight_zero_point"]
    if is_packed:
        rows, cols = parts["weight_shape"].tolist()
        _check_shape(base, "weight_packed", parts["weight_packed"], (rows, num_words(cols, grid.bits)))
        if zero is not None:
            _check_shape(base, "weight_zero_point", zero, (num_words(rows, grid.bits), grid.num_groups(cols)))
        codes = unpack(parts["weight_packed"], grid.bits, cols)
        zero = None if zero is None else unpack(zero.T.contiguous(), grid.bits, rows).T.contiguous()
    else:
        codes = parts["weight"]
    if grid.scale_bits is None:
        return _checked(QuantizedTensor(codes, parts["weight_scale"], zero, grid), base)
    rows, cols = codes.shape
    groups, packed_scales, unit = grid.num_groups(cols), parts["weight_scale_packed"], parts["weight_scale_unit"]
    _check_shape(base, "weight_scale_packed", packed_scales, (rows, num_words(groups, grid.scale_bits)))
    _check_shape(base, "weight_scale_unit", unit, (rows, 1))
    coded = CodedScale(unpack_unsigned(packed_scales, grid.scale_bits, groups), unit)
    return _checked(QuantizedTensor(codes, coded.value(), zero, grid, coded), base)


def stored_tensors(base: str, weight: QuantizedTensor, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs that store one matrix in `layout`."""
    rows, cols = weight.shape
    zero = weight.zero_point
    if layout == "int-quantized":
        yield f"{base}.weight", weight.codes
        yield f"{base}.weight_scale", weight.scale
        if zero is not None:
            yield f"{base}.weight_zero_point", zero
        return
    yield f"{base}.weight_packed", pack(weight.codes, weight.grid.bits)
    if weight.coded_scale is None:
        yield f"{base}.weight_scale", weight.scale
    else:
        assert weight.grid.scale_bits is not None
        yield f"{base}.weight_scale_packed", pack_unsigned(weight.coded_scale.codes, weight.grid.scale_bits)
        yield f"{base}.weight_scale_unit", weight.coded_scale.unit
    yield f"{base}.weight_shape", torch.tensor([rows, cols], dtype=torch.int64)
    if zero is not None:
        yield f"{base}.weight_zero_point", pack(zero.T.contiguous(), weight.grid.bits).T.contiguous()


def _grid_of(checkpoint: Checkpoint, base: str) -> Grid:
    stored = checkpoint.spec.stored
    tensor = next((t for t in checkpoint.spec.tensors if t.name == f"{base}.weight"), None)
    grid = None if stored is None or tensor is None else stored.grid_of(tensor)
    if grid is None:
        raise CheckpointError(f"{checkpoint.path} stores {base} quantized, but its config does not say on which grid")
    return grid


def _checked(weight: QuantizedTensor, base: str) -> QuantizedTensor:
    rows, cols = weight.codes.shape
    expected = (rows, weight.grid.num_groups(cols))
    for part, tensor in (("weight_scale", weight.scale), ("weight_zero_point", weight.zero_point)):
        if tensor is not None:
            _check_shape(base, part, tensor, expected)
    return weight


def _check_shape(base: str, part: str, tensor: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"{base}.{part} has shape {tuple(tensor.shape)}, its grid implies {expected}")
