"""packlight's own layout: what is written is what was planned, to the byte, comes back the same, and damage is named.

A grid of its own for every tensor, every width from 2 to 8, and scales that are quantized themselves.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.cli.conftest import save_llama
from tests.cli.driver import assert_one_sentence, call
from tests.contracts.artifacts import make_artifact, proof_distance

from packlight.checkpoint.config import spec_from_tensors
from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.packed import decode, packed_names, read_quantized, stored_tensors
from packlight.checkpoint.save import own_quantization_config
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.checkpoint.stored import stored_precision
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError, UsageError
from packlight.measure.proof import MAX_KL
from packlight.ops.grid import QuantizedTensor, quantize
from packlight.plan.allocate import stored_bytes
from packlight.plan.layout import artifact_bytes, layout_of, stored_parts, tensor_layout
from packlight.runtime.load import load_model
from packlight.spec import Grid, Precision, TensorSpec

BASE = "model.layers.0.mlp.up_proj"
WIDTHS = range(2, 9)
SHAPES: list[tuple[int | None, int | None]] = [(None, None), (32, None), (16, 4), (32, 6), (8, 8)]
"""Group sizes and the bits of their scales."""
EVERY_GRID = [Grid(b, g, symmetric, s) for b, (g, s), symmetric in itertools.product(WIDTHS, SHAPES, (True, False))]


def made(grid: Grid, rows: int = 13, cols: int = 96, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) + 0.3
    return quantize(weight, grid, dtype)


def assert_same(found: QuantizedTensor, wanted: QuantizedTensor) -> None:
    assert found.grid == wanted.grid
    assert torch.equal(found.codes, wanted.codes) and found.codes.dtype == wanted.codes.dtype
    assert torch.equal(found.scale, wanted.scale) and found.scale.dtype == wanted.scale.dtype
    for mine, theirs in (
        (found.zero_point, wanted.zero_point),
        (found.coded_scale and found.coded_scale.codes, wanted.coded_scale and wanted.coded_scale.codes),
        (found.coded_scale and found.coded_scale.unit, wanted.coded_scale and wanted.coded_scale.unit),
    ):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
def test_every_grid_comes_back_and_takes_the_bytes_that_were_claimed(grid: Grid) -> None:
    weight = made(grid)
    tensor = TensorSpec(f"{BASE}.weight", weight.shape, "float32", "linear")
    precision = Precision("bfloat16", grid)
    stored = dict(stored_tensors(BASE, weight, "packlight"))
    planned = {part.name: (part.dtype, part.shape) for part in stored_parts(tensor, precision, "packlight")}
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in stored.items()} == planned
    assert sum(part.numel() * part.element_size() for part in stored.values()) == stored_bytes(tensor, precision)
    parts = {name.removeprefix(f"{BASE}."): part for name, part in stored.items()}
    assert_same(decode(parts, grid, BASE), weight)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([1, 2, 8, 32]),
    st.booleans(),
    st.integers(4, 8),
    st.integers(1, 40),
    st.integers(1, 20),
)
def test_odd_shapes_with_quantized_scales_come_back(
    bits: int, group: int, symmetric: bool, scale_bits: int, rows: int, groups: int
) -> None:
    weight = made(Grid(bits, group, symmetric, scale_bits), rows, group * groups, torch.float16)
    parts = {name.removeprefix(f"{BASE}."): part for name, part in stored_tensors(BASE, weight, "packlight")}
    assert_same(decode(parts, weight.grid, BASE), weight)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven matrices in each of three layers, so that a third of all grids fits into one artifact."""
    return save_llama(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=3, vocab_size=320)


def options_of(model: Path, start: int) -> dict[str, Any]:
    """A grid for every matrix, the ends too, from `start` on in the list of all; one is left alone."""
    names = [tensor.name for tensor in open_checkpoint(model).spec.tensors if tensor.kind != "other"]
    grids = itertools.islice(itertools.cycle(EVERY_GRID), start, None)
    pairs = [[name, str(grid)] for name, grid in zip(names, grids, strict=False)]
    pairs[2][1] = None  # type: ignore[call-overload]
    return {"bits": 5, "group_size": 16, "symmetric": False, "scale_bits": 6, "grids": pairs}


@pytest.mark.parametrize("start", [0, 23, 46])
def test_a_grid_for_every_tensor(start: int, model: Path, tmp_path: Path) -> None:
    """The file is as large as was claimed, the config tells every grid, every tensor is what rounding gave."""
    original, options = open_checkpoint(model), options_of(model, start)
    out = make_artifact(model, tmp_path / "out", **options)
    packed = open_checkpoint(out)
    wanted = {name: None if text is None else Grid.parse(text) for name, text in options["grids"]}
    stored = packed.spec.stored
    assert stored is not None and layout_of(stored) == "packlight"
    assert {t.name: stored.grid_of(t) for t in packed.spec.tensors if t.kind != "other"} == wanted
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "packlight"
    assert (out / SINGLE_NAME).stat().st_size == artifact_bytes(original.spec, stored)
    planned = [(part.name, part.dtype, part.shape) for part in tensor_layout(original.spec, stored)]
    assert sorted(planned) == sorted((name, entry.dtype, entry.shape) for name, entry in packed.index.items())
    assert {f"{base}.weight" for base in packed_names(packed.index)} == {name for name in wanted if wanted[name]}
    for tensor in original.spec.tensors:
        exact = read_tensor(original.index[tensor.name])
        if (grid := wanted.get(tensor.name)) is None:
            assert torch.equal(read_tensor(packed.index[tensor.name]), exact.to(torch.bfloat16))
        else:
            rounded = quantize(exact, grid, torch.bfloat16)
            assert_same(read_quantized(packed, tensor.name.removesuffix(".weight")), rounded)
            claimed = stored_bytes(tensor, Precision("bfloat16", tensors=((tensor.name, grid),)))
            parts = packed_names(packed.index)[tensor.name.removesuffix(".weight")].names
            assert sum(packed.index[part].nbytes for part in parts) == claimed
    assert proof_distance(out)[0] <= MAX_KL["bfloat16"]


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_one_grid_for_all_tensors(bits: int, tiny_model_dir: Any, tmp_path: Path) -> None:
    """Tied embeddings too; loaded, it is what was in memory."""
    group, scales = SHAPES[bits % len(SHAPES)]
    grid = Grid(bits, group, bits % 2 == 0, scales)
    out = make_artifact(
        tiny_model_dir(tied=True),
        tmp_path / "out",
        "packlight",
        bits=bits,
        group_size=group,
        symmetric=grid.symmetric,
        scale_bits=scales,
        embeddings=bits,
    )
    original, packed = open_checkpoint(tiny_model_dir(tied=True)), open_checkpoint(out)
    assert packed.spec.stored == Precision("bfloat16", grid, grid)
    assert (out / SINGLE_NAME).stat().st_size == artifact_bytes(original.spec, packed.spec.stored, "packlight")
    assert proof_distance(out)[0] <= MAX_KL["bfloat16"]


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor with quantized scales and zero points, one with neither, among others."""
    grids = [
        ["model.layers.0.mlp.up_proj.weight", "int3-g16-asym-s6"],
        ["model.layers.0.mlp.down_proj.weight", "int5-g32-sym"],
    ]
    return make_artifact(model, tmp_path_factory.mktemp("made") / "out", bits=6, embeddings=8, grids=grids)


@pytest.fixture
def spoiled(artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "spoiled"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def refused(directory: Path, says: str) -> None:
    """Whoever loads it is told in one sentence; here and on the command line."""
    with pytest.raises(CheckpointError, match=says) as caught:
        load_model(open_checkpoint(directory))
    assert "\n" not in str(caught.value)
    assert_one_sentence(call("generate", directory, "-q", "--prompt", "hi"))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_refused(version: Any, spoiled: Path) -> None:
    edit_config(spoiled, version=version)
    refused(spoiled, "packlight's layout in version .* and this packlight reads 1")


@pytest.mark.parametrize("tensors", [None, [], "int4-g32-sym"])
def test_tensors_that_are_no_mapping(tensors: Any, spoiled: Path) -> None:
    edit_config(spoiled, tensors=tensors)
    refused(spoiled, "its config.json is damaged")


DAMAGED = ["", "int9-g32-sym", "int4-g0-sym", "int4-g32", "int4-g32-sym-s3", "int4-row-sym-s6"]
DAMAGED += [4, [], {}, "int4-g32-sym\n", "int4-g1234567890-sym"]


@pytest.mark.parametrize("text", DAMAGED, ids=str)
def test_a_grid_that_nobody_wrote(text: Any, spoiled: Path) -> None:
    edit_config(spoiled, linear=text)
    refused(spoiled, "quantization_config is damaged")
    edit_config(spoiled, linear="int6-g32-sym", tensors={f"{BASE}.weight": text})
    refused(spoiled, "quantization_config is damaged")


@pytest.mark.parametrize(
    "changes",
    [
        {"linear": "int5-g32-sym"},
        {"linear": "int6-g16-sym"},
        {"linear": "int6-g32-asym"},
        {"linear": "int6-g32-sym-s6"},
        {"linear": None},
        {"embedding": None},
        {"tensors": {}},
    ],
    ids=str,
)
def test_a_grid_that_is_not_the_stored_one(changes: dict[str, Any], spoiled: Path) -> None:
    edit_config(spoiled, **changes)
    refused(spoiled, "missing|has shape|does not say on which grid|divide")


def test_a_group_that_divides_no_row(spoiled: Path) -> None:
    """Said of the checkpoint, as the user has chosen no group."""
    edit_config(spoiled, linear="int6-g48-sym")
    with pytest.raises(UsageError, match="48"):
        load_model(open_checkpoint(spoiled))
    assert_one_sentence(call("generate", spoiled, "-q", "--prompt", "hi"))


@pytest.mark.parametrize(
    "part", ["packed", "scale_packed", "scale_unit", "shape", "zero_point", "scale"], ids=lambda part: f"weight_{part}"
)
def test_a_part_that_is_missing(part: str, spoiled: Path) -> None:
    module = "model.layers.0.mlp.down_proj" if part == "scale" else BASE
    tensors = load_file(spoiled / SINGLE_NAME)
    del tensors[f"{module}.weight_{part}"]
    save_file(tensors, spoiled / SINGLE_NAME, {"format": "pt"})
    refused(spoiled, module.replace(".", r"\."))


@pytest.mark.parametrize("part", ["packed", "scale_packed", "scale_unit", "zero_point"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_of_another_shape(part: str, axis: int, spoiled: Path) -> None:
    tensors = load_file(spoiled / SINGLE_NAME)
    whole = tensors[f"{BASE}.weight_{part}"]
    tensors[f"{BASE}.weight_{part}"] = torch.cat([whole, whole], dim=axis).contiguous()
    save_file(tensors, spoiled / SINGLE_NAME, {"format": "pt"})
    refused(spoiled, f"{BASE}.weight_{part} has shape")


GRIDS = st.builds(
    lambda bits, group, symmetric, scales: Grid(bits, group, symmetric, None if group is None else scales),
    st.integers(2, 8),
    st.none() | st.integers(1, 999_999_999),
    st.booleans(),
    st.none() | st.integers(4, 8),
)


@settings(deadline=None)
@given(GRIDS)
def test_a_grid_reads_what_it_writes(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"(int[0-9]{1,2}|[a-z]{0,4})-?(row|g[0-9]{0,4})?-?(sym|asym)?(-s[0-9])?-?", fullmatch=True))
def test_what_a_grid_reads_it_writes(text: str) -> None:
    """Nothing is read in two ways: a text is refused, or written again as it was, but for leading zeros."""
    try:
        grid = Grid.parse(text)
    except UsageError:
        return
    assert Grid.parse(str(grid)) == grid
    assert str(grid) == text or "-g0" in text


TENSORS = (
    TensorSpec("model.embed_tokens.weight", (100, 64), "float32", "embedding"),
    *(
        TensorSpec(f"model.layers.{layer}.{module}.weight", shape, "float32", "linear")
        for layer in range(2)
        for module, shape in (("self_attn.q_proj", (64, 64)), ("mlp.up_proj", (96, 64)), ("mlp.down_proj", (64, 96)))
    ),
    TensorSpec("model.norm.weight", (64,), "float32", "other"),
    TensorSpec("lm_head.weight", (100, 64), "float32", "head"),
)
SMALL = st.none() | st.sampled_from([Grid(4, 32), Grid(8), Grid(3, 16, False), Grid(2, 32, True, 6)])
CHOICES = st.dictionaries(st.sampled_from([t.name for t in TENSORS if t.kind != "other"]), SMALL)


@settings(deadline=None)
@given(CHOICES)
def test_a_precision_gives_back_every_grid(grids: dict[str, Grid | None]) -> None:
    precision = Precision.of("bfloat16", grids, TENSORS)
    assert {tensor.name: precision.grid_of(tensor) for tensor in TENSORS} == {
        tensor.name: grids.get(tensor.name) for tensor in TENSORS
    }
    assert set(precision.grids) == {grid for grid in grids.values() if grid is not None}
    others = [name for name, grid in precision.tensors]
    assert others == sorted(others), "equal precisions are equal whatever the order they were told in"
    assert Precision.of("bfloat16", dict(reversed(grids.items())), TENSORS) == precision


@settings(deadline=None)
@given(CHOICES)
def test_a_config_gives_back_every_grid(grids: dict[str, Grid | None]) -> None:
    precision = Precision.of("bfloat16", grids, TENSORS)
    config: dict[str, Any] = {"architectures": ["X"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 100}
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["quantization_config"] = json.loads(json.dumps(own_quantization_config(precision)))
    found = stored_precision(config, TENSORS)
    assert found == precision
    assert spec_from_tensors(config, "m", TENSORS, found).stored == precision
