"""The planned tensors are, byte for byte, those that the safetensors library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.plan.layout import StoredTensor, artifact_bytes, safetensors_header, tensor_layout, total_bytes
from packlight.plan.memory import disk_bytes
from packlight.spec import Grid, ModelSpec, Precision, TensorSpec


def spec_of(*tensors: TensorSpec, is_tied: bool = False) -> ModelSpec:
    return ModelSpec(
        **{"name": "m", "architecture": "M", "model_type": "llama", "dtype": "float32", "is_tied": is_tied},
        **{"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1},
        **{"head_dim": 8, "vocab_size": 8, "max_context": 64, "tensors": tensors},
    )


dims = st.integers(1, 40)
grids = st.builds(Grid, st.integers(2, 8), st.sampled_from([None, 1, 3, 8, 32]), st.booleans())


@st.composite
def specs(draw: st.DrawFn) -> tuple[ModelSpec, Precision]:
    grid = draw(grids)
    cols = draw(dims) * (grid.group_size or 1)
    tensors = [
        TensorSpec("model.embed_tokens.weight", (draw(dims), draw(dims)), "float32", "embedding"),
        TensorSpec("model.layers.0.mlp.up_proj.weight", (draw(dims), cols), "float32", "linear"),
        TensorSpec("model.layers.0.mlp.experts.down_proj", (draw(st.integers(1, 3)), 5, cols), "float32", "expert"),
        TensorSpec("model.norm.weight", (draw(dims),), "float32", "other"),
        TensorSpec("model.layers.0.größe", (), "int64", "other"),
        TensorSpec("model.mask", (draw(dims),), "bool", "other"),
    ]
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    return spec_of(*tensors), Precision(dtype, draw(st.sampled_from([None, grid])), None)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(specs())
def test_the_file_is_the_one_that_safetensors_writes(tmp_path: Path, made: tuple[ModelSpec, Precision]) -> None:
    import torch
    from safetensors.torch import save_file

    spec, precision = made
    stored = tensor_layout(spec, precision)
    tensors = {part.name: torch.zeros(part.shape, dtype=getattr(torch, part.dtype)) for part in stored}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = safetensors_header(stored)
    assert file.read_bytes()[: len(header)] == header
    assert file.stat().st_size == artifact_bytes(spec, precision) == len(header) + disk_bytes(spec, precision).total


def test_the_writer_of_packlight_keeps_the_order(tmp_path: Path) -> None:
    from packlight.checkpoint.shards import write_shards

    spec = spec_of(
        TensorSpec("a.0.w.weight", (5, 33), "float32", "linear"), TensorSpec("b.weight", (3,), "float32", "other")
    )
    precision = Precision("bfloat16", Grid(3, 11, symmetric=False))
    stored = tensor_layout(spec, precision)
    data = {part.name: bytes(part.nbytes) for part in stored}
    (file,) = write_shards(tmp_path, [(part.name, part.dtype, part.shape) for part in stored], data.__getitem__)
    header = safetensors_header(stored)
    assert file.read_bytes()[: len(header)] == header
    assert file.stat().st_size == artifact_bytes(spec, precision)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 11])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_shapes_are_those_of_compressed_tensors(bits: int, group: int | None, is_symmetric: bool) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rows, cols = 5, 33
    spec = spec_of(TensorSpec("a.0.w.weight", (rows, cols), "float32", "linear"))
    stored = {part.name: part for part in tensor_layout(spec, Precision("float32", Grid(bits, group, is_symmetric)))}
    packed = helpers.pack_to_int32(torch.zeros(rows, cols, dtype=torch.int8), bits)
    assert stored["a.0.w.weight_packed"].shape == tuple(packed.shape)
    groups = cols // group if group else 1
    assert stored["a.0.w.weight_scale"].shape == (rows, groups)
    assert stored["a.0.w.weight_shape"] == StoredTensor("a.0.w.weight_shape", "int64", (2,), "shapes")
    if is_symmetric:
        assert "a.0.w.weight_zero_point" not in stored
    else:
        zeros = helpers.pack_to_int32(torch.zeros(rows, groups, dtype=torch.int8), bits, packed_dim=0)
        assert stored["a.0.w.weight_zero_point"].shape == tuple(zeros.shape)


def test_int_quantized() -> None:
    spec = spec_of(TensorSpec("a.0.w.weight", (5, 32), "float32", "linear"))
    stored = tensor_layout(spec, Precision("bfloat16", Grid(8, 16, symmetric=False)), "int-quantized")
    assert [(part.name, part.dtype, part.shape) for part in stored] == [
        ("a.0.w.weight_scale", "bfloat16", (5, 2)),
        ("a.0.w.weight", "int8", (5, 32)),
        ("a.0.w.weight_zero_point", "int8", (5, 2)),
    ]
    assert total_bytes(stored) == 20 + 160 + 10


def test_int_quantized_holds_eight_bits_only() -> None:
    spec = spec_of(TensorSpec("a.0.w.weight", (5, 32), "float32", "linear"))
    with pytest.raises(UsageError, match="8 bits, not 4"):
        tensor_layout(spec, Precision(linear=Grid(4)), "int-quantized")


def test_a_group_that_does_not_divide_the_row() -> None:
    spec = spec_of(TensorSpec("a.0.w.weight", (5, 33), "float32", "linear"))
    with pytest.raises(UsageError, match="does not divide a row of 33"):
        artifact_bytes(spec, Precision(linear=Grid(4, 32)))
