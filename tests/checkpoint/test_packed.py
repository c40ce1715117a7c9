"""The stored parts of a matrix: written as the layout says, read back bit for bit, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from packlight.checkpoint.packed import decode, packed_names, stored_tensors
from packlight.checkpoint.shards import SINGLE_NAME, read_index
from packlight.errors import CheckpointError
from packlight.ops.grid import QuantizedTensor, quantize
from packlight.plan.layout import Layout, stored_parts
from packlight.spec import Grid, Precision, TensorSpec

BASE = "model.layers.0.mlp.up_proj"


def made(grid: Grid, rows: int = 13, cols: int = 96) -> QuantizedTensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) + 0.3
    return quantize(weight, grid, torch.bfloat16)


def parts_of(weight: QuantizedTensor, layout: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{BASE}."): tensor for name, tensor in stored_tensors(BASE, weight, layout)}


def assert_equal(found: QuantizedTensor, wanted: QuantizedTensor) -> None:
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
    assert (found.zero_point is None) == (wanted.zero_point is None)
    if found.zero_point is not None and wanted.zero_point is not None:
        assert torch.equal(found.zero_point, wanted.zero_point)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.sampled_from([None, 1, 8, 32]), st.booleans(), st.integers(1, 40), st.integers(1, 3))
def test_packed_parts_come_back(bits: int, group: int | None, symmetric: bool, rows: int, groups: int) -> None:
    weight = made(Grid(bits, group, symmetric), rows, groups * (group or 5))
    assert_equal(decode(parts_of(weight, "pack-quantized"), weight.grid, BASE), weight)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, None, False), Grid(8, 32, False)], ids=str)
def test_plain_parts_come_back(grid: Grid) -> None:
    weight = made(grid)
    assert_equal(decode(parts_of(weight, "int-quantized"), grid, BASE), weight)


EVERY_LAYOUT = [("pack-quantized", grid) for grid in (Grid(8), Grid(8, 32, False), Grid(4, 32, False), Grid(3, 16))]
EVERY_LAYOUT += [("int-quantized", grid) for grid in (Grid(8), Grid(8, 32, False))]


@pytest.mark.parametrize(("layout", "grid"), EVERY_LAYOUT, ids=str)
def test_what_is_written_is_what_was_planned(grid: Grid, layout: Layout) -> None:
    weight = made(grid)
    spec = TensorSpec(f"{BASE}.weight", weight.shape, "bfloat16", "linear")
    planned = {p.name: (p.dtype, p.shape) for p in stored_parts(spec, Precision("bfloat16", grid), layout)}
    stored = stored_tensors(BASE, weight, layout)
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in stored} == planned


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_is_named(part: str) -> None:
    weight = made(Grid(4, 32, False))
    parts = parts_of(weight, "pack-quantized")
    del parts[part]
    with pytest.raises(CheckpointError, match=f"{BASE}.{part} is missing"):
        decode(parts, weight.grid, BASE)


def test_codes_that_are_missing_altogether() -> None:
    weight = made(Grid(4, 32))
    parts = parts_of(weight, "pack-quantized")
    del parts["weight_packed"]
    with pytest.raises(CheckpointError, match="weight is missing"):
        decode(parts, weight.grid, BASE)


def test_shapes_that_do_not_belong_together() -> None:
    weight = made(Grid(4, 32, False))
    parts = parts_of(weight, "pack-quantized")
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \(13, 2\), its grid implies \(13, 3\)"):
        decode(parts | {"weight_scale": weight.scale[:, :2]}, weight.grid, BASE)
    with pytest.raises(CheckpointError, match="weight_zero_point has shape"):
        decode(parts | {"weight_zero_point": parts["weight_zero_point"][:, :2]}, weight.grid, BASE)
    with pytest.raises(CheckpointError, match="weight_zero_point has shape"):
        decode(parts, Grid(4, 16, False), BASE)


@pytest.mark.parametrize("claimed", [(13, 128), (13, 64), (12, 96), (14, 96), (13, 0), (-1, 96)])
def test_a_shape_that_the_words_do_not_hold(claimed: tuple[int, int]) -> None:
    weight = made(Grid(4))
    parts = parts_of(weight, "pack-quantized") | {"weight_shape": torch.tensor(claimed)}
    with pytest.raises(CheckpointError, match=f"{BASE}.weight_"):
        decode(parts, weight.grid, BASE)


def test_the_matrices_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = dict(stored_tensors("a", made(Grid(4, 32, False)), "pack-quantized"))
    tensors |= dict(stored_tensors("b", made(Grid(8)), "int-quantized"))
    tensors |= {"c.weight": torch.zeros(2, 2), "b.bias": torch.zeros(13)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / SINGLE_NAME)
    found = packed_names(read_index(tmp_path))
    assert set(found) == {"a", "b"}
    assert found["a"].names == {f"a.weight_{part}" for part in ("packed", "scale", "shape", "zero_point")}
    assert found["b"].names == {"b.weight", "b.weight_scale"}
