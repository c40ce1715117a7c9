"""The compressed-tensors layout: which stored tensors make up a matrix, and reading and writing them.

`pack-quantized` stores `weight_packed` int32 (rows, words), `weight_scale` (rows, groups), `weight_shape` int64 (2,)
and, for an asymmetric grid, `weight_zero_point` int32 packed along the rows, (words_of_rows, groups).
`int-quantized` stores `weight` int8 (rows, cols), `weight_scale`, and `weight_zero_point` int8 (rows, groups).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.shards import TensorEntry
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError
from packlight.ops.grid import QuantizedTensor
from packlight.ops.pack import num_words, pack, unpack
from packlight.spec import Grid

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class PackedParts:
    """The stored tensors of one quantized matrix; `names` are full tensor names."""

    base: str
    names: frozenset[str]


def packed_names(index: Mapping[str, TensorEntry]) -> dict[str, PackedParts]:
    """Every quantized matrix of a checkpoint, keyed by module name (`model.layers.0.mlp.up_proj`)."""
    found = {}
    for name in index:
        if not name.endswith(".weight_scale"):
            continue
        base = name.removesuffix(".weight_scale")
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
    wanted += ["weight_scale"] if grid.symmetric else ["weight_scale", "weight_zero_point"]
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
    return _checked(QuantizedTensor(codes, parts["weight_scale"], zero, grid), base)


def stored_tensors(base: str, weight: QuantizedTensor, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs that store one matrix in `layout`: 'pack-quantized' or 'int-quantized'."""
    rows, cols = weight.shape
    zero = weight.zero_point
    if layout == "int-quantized":
        yield f"{base}.weight", weight.codes
        yield f"{base}.weight_scale", weight.scale
        if zero is not None:
            yield f"{base}.weight_zero_point", zero
        return
    yield f"{base}.weight_packed", pack(weight.codes, weight.grid.bits)
    yield f"{base}.weight_scale", weight.scale
    yield f"{base}.weight_shape", torch.tensor([rows, cols], dtype=torch.int64)
    if zero is not None:
        yield f"{base}.weight_zero_point", pack(zero.T.contiguous(), weight.grid.bits).T.contiguous()


def _grid_of(checkpoint: Checkpoint, base: str) -> Grid:
    stored = checkpoint.spec.stored
    tensor = next((t for t in checkpoint.spec.tensors if t.name == f"{base}.weight"), None)
    grid = None if stored is None or tensor is None else stored.grid_of(tensor.kind)
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
