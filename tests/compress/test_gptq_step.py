"""GPTQ as a step on small models: less output error than rounding to nearest, on any grid and architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import save_llama
from tests.contracts.artifacts import make_artifact
from tests.runtime.architectures import save_architecture

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.checkpoint.packed import read_quantized
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.checkpoint.tensors import read_tensor
from packlight.compress import run as compress
from packlight.compress.quantize import gptq as under_test
from packlight.compress.quantize.gptq import Gptq
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.step import Step
from packlight.compress.sweep import guide, read_guide
from packlight.compress.walk import Activations, Block, Calibration, WalkResult, walk
from packlight.evidence import Measurement
from packlight.measure.text import calibration_text
from packlight.ops.gptq import output_error
from packlight.ops.grid import QuantizedTensor, quantize
from packlight.plan.layout import layout_of
from packlight.runtime.load import empty_model, load_model
from packlight.spec import Grid

IDS = list(range(1, 40))
PLAIN: dict[str, Any] = {"guided": False, "true_sequential": False, "dtype": "float32"}


def windows_of(count: int, tokens: int = 48) -> list[list[int]]:
    """Windows of English, a token for each byte."""
    text = calibration_text().content.encode("ascii", "ignore")
    return [list(text[start : start + tokens]) for start in range(0, count * tokens, tokens)]


WINDOWS = windows_of(8)


@dataclass(frozen=True)
class Layer:
    """The first layer after a step: its row, what was packed, and what it computes with."""

    row: Measurement
    packed: dict[str, QuantizedTensor]
    tensors: dict[str, torch.Tensor]


def first_layer(step: Step, checkpoint: Checkpoint, calibration: Calibration, place: int = 0) -> Layer:
    """Apply a step up to the layer `place`; -1 is the embedding."""
    current: list[Block] = []

    def tracked(blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            current.append(block)
            yield block

    model = empty_model(checkpoint, step.precision.dtype)
    blocks = walk(checkpoint, model, IDS, calibration, lambda b: None, lambda b: False, WalkResult())
    for row in step.apply_(tracked(blocks)):
        block = current[-1]
        if block.index == place + 1:
            return Layer(row, dict(block.packed), {name: block.tensor(name).clone() for name in block.tensors})
    raise AssertionError("the model has no such layer")


@torch.no_grad()
def moments_of(checkpoint: Checkpoint, windows: list[list[int]] = WINDOWS) -> dict[str, torch.Tensor]:
    """Sum of x x^T at every matrix inside the blocks of the unchanged model, (cols, cols) float64."""
    model, found = load_model(checkpoint).float(), {}

    def hook(name: str) -> Any:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            found[name] = found.get(name, 0) + x.T @ x

        return add

    for tensor in checkpoint.spec.quantizable:
        model.get_submodule(tensor.name.removesuffix(".weight")).register_forward_pre_hook(hook(tensor.name))
    model(torch.tensor(windows), use_cache=False)
    return found


def errors(checkpoint: Checkpoint, layer: Layer, moments: dict[str, torch.Tensor]) -> dict[str, float]:
    """||(W - W') X||^2 of every matrix of the layer, on the inputs of the original model."""
    return {
        name: output_error(read_tensor(checkpoint.index[name]).double(), weight.dequantize(), moments[name])
        for name, weight in layer.packed.items()
    }


def rounded(checkpoint: Checkpoint, step: Gptq, layer: Layer, clip: Any = "minmax") -> Layer:
    """The same matrices rounded to nearest."""
    found = {
        name: quantize(read_tensor(checkpoint.index[name]), weight.grid, step.scale_dtype, clip=clip)
        for name, weight in layer.packed.items()
    }
    return replace(layer, packed=found)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_llama(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_llama(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def moments(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return moments_of(checkpoint)


@pytest.fixture(scope="module")
def guided(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Windows whose tokens are weighted."""
    return weighted(checkpoint, tmp_path_factory.mktemp("guide") / "guide.safetensors")


def weighted(checkpoint: Checkpoint, file: Path, batch: int = 4) -> Calibration:
    calibration = Calibration(WINDOWS, batch)
    guide(checkpoint, calibration, file, lambda: None)
    return replace(calibration, guide=read_guide(file))


@pytest.mark.parametrize("group", [None, 32, 64], ids=["row", "g32", "g64"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_matrix_errs_less_than_rounding_to_nearest(
    bits: int, group: int | None, checkpoint: Checkpoint, moments: dict[str, torch.Tensor]
) -> None:
    step = Gptq(bits, group, symmetric=bits % 2 == 0, **PLAIN)
    layer = first_layer(step, checkpoint, Calibration(WINDOWS))
    mine = errors(checkpoint, layer, moments)
    assert len(mine) == 7
    for clip in ("minmax", "mse"):
        theirs = errors(checkpoint, rounded(checkpoint, step, layer, clip), moments)
        assert all(mine[name] < theirs[name] for name in mine), clip
        assert sum(mine.values()) < 0.6 * sum(theirs.values())


def test_a_row_is_the_output_error_on_the_text(checkpoint: Checkpoint, moments: dict[str, torch.Tensor]) -> None:
    layer = first_layer(Gptq(4, **PLAIN), checkpoint, Calibration(WINDOWS))
    norm = sum(
        float(((w := read_tensor(checkpoint.index[name]).double()) @ moments[name] * w).sum()) for name in layer.packed
    )
    assert layer.row.name == "relative_output_error"
    assert layer.row.value == pytest.approx(sum(errors(checkpoint, layer, moments).values()) / norm, rel=1e-3)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"act_order": False}),
        ({"act_order": False}, {"static_groups": False}),
        ({}, {"true_sequential": False}),
        ({}, {"guided": False}),
        ({}, {"asymmetry": 0.25}),
        ({"asymmetry": 0.25}, {"asymmetry": 1.0}),
        ({}, {"damping": 0.1}),
        ({}, {"clip": "minmax"}),
        ({}, {"scale_bits": 6}),
    ],
    ids=str,
)
def test_every_option_runs_and_matters(
    base: dict[str, Any],
    change: dict[str, Any],
    checkpoint: Checkpoint,
    guided: Calibration,
    moments: dict[str, torch.Tensor],
) -> None:
    layers = []
    for options in (base, base | change):
        step = Gptq(3, symmetric=False, **options)
        layer = first_layer(step, checkpoint, guided if step.reading.weighs_tokens else Calibration(WINDOWS))
        layers.append(layer)
        for name, weight in layer.packed.items():
            assert torch.equal(weight.dequantize().float(), layer.tensors[name])
            assert step.precision.linear == weight.grid
            assert weight.grid.qmin <= int(weight.codes.min()) and int(weight.codes.max()) <= weight.grid.qmax
        mine = sum(errors(checkpoint, layer, moments).values())
        assert mine < sum(errors(checkpoint, rounded(checkpoint, step, layer), moments).values())
    first, second = layers
    assert any(not torch.equal(first.packed[name].codes, second.packed[name].codes) for name in first.packed)


@pytest.mark.parametrize(("options", "gathering"), [({}, 4), ({"true_sequential": False}, 1)], ids=str)
def test_passes_through_a_block(
    options: dict[str, Any], gathering: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each group of matrices that share an input, or one for all; and one window to find the groups."""
    passed: list[int] = []
    run = Activations.run

    def counted(self: Activations, module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        passed.append(len(hidden))
        return run(self, module, hidden)

    monkeypatch.setattr(Activations, "run", counted)
    first_layer(Gptq(4, guided=False, **options), checkpoint, Calibration(WINDOWS, batch=4, keeps_targets=False))
    assert passed == [1] + gathering * [4, 4]


def test_asymmetry_brings_a_later_layer_nearer_to_the_original(checkpoint: Checkpoint) -> None:
    """What it is for: after 2 bits in the layers before, the outputs of the second layer are nearer to what they were
    where half of the difference in its inputs is made up for."""
    found = []
    for asymmetry in (0.0, 0.5):
        step, left = Gptq(2, guided=False, asymmetry=asymmetry), []
        model = empty_model(checkpoint, "bfloat16")

        def keep(block: Block, left: list[float] = left) -> None:
            if block.activations is not None:
                now = block.activations
                out = now.run(block.module, now.inputs)
                left.append(float((out - now.targets).square().sum()))

        blocks = walk(checkpoint, model, IDS, Calibration(WINDOWS), keep, lambda b: False, WalkResult())
        list(step.apply_(blocks))
        found.append(left[1])
    assert found[1] < found[0]


@pytest.mark.parametrize("options", [{"asymmetry": 0.5}, {"true_sequential": False}], ids=str)
def test_the_batch_changes_no_more_than_rounding(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    values = []
    for batch in (1, 3, 8):
        layer = first_layer(Gptq(3, guided=False, **options), checkpoint, Calibration(WINDOWS, batch), place=1)
        values.append(float(layer.row.value or 0))
    assert values == pytest.approx([values[0]] * 3, rel=0.02)


def test_the_batch_of_weighted_tokens_changes_no_more_than_rounding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    values = []
    for batch in (1, 5):
        calibration = weighted(checkpoint, tmp_path / f"{batch}.safetensors", batch)
        values.append(float(first_layer(Gptq(3), checkpoint, calibration).row.value or 0))
    assert values[0] == pytest.approx(values[1], rel=0.02)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "phi3", "opt"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Biases, norms inside the attention, windows and fused matrices."""
    save_architecture(name, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    step = Gptq(3, 32, **PLAIN)
    layer = first_layer(step, checkpoint, Calibration(WINDOWS))
    moments = moments_of(checkpoint)
    mine = errors(checkpoint, layer, moments)
    theirs = errors(checkpoint, rounded(checkpoint, step, layer), moments)
    assert all(mine[matrix] < theirs[matrix] for matrix in mine)
    assert layer.packed.keys() == {t.name for t in checkpoint.spec.quantizable if ".layers.0." in t.name}
    for tensor, value in layer.tensors.items():
        if tensor not in layer.packed:
            assert torch.equal(value, read_tensor(checkpoint.index[tensor])), "norms and biases stay as they are"


def drive(step: Step, checkpoint: Checkpoint, work: Path, calibration: Calibration | None) -> dict[str, torch.Tensor]:
    """Every stored tensor of a whole job."""
    list(compress.run(step, checkpoint, work, layout_of(step.precision), IDS, calibration, WalkResult()))
    stored: dict[str, torch.Tensor] = {}
    for path in compress.block_files(work):
        stored |= load_file(path)
    return stored


@pytest.mark.parametrize("bits", [8, 4])
def test_the_ends_of_an_untied_model_are_rounded_to_nearest(bits: int, untied: Checkpoint, tmp_path: Path) -> None:
    """Without a guide nothing is known of what passes there: they are as `rtn` with the same clipping leaves them."""
    calibration = Calibration(WINDOWS)
    step = Gptq(4, 32, symmetric=False, embeddings=bits, guided=False)
    stored = drive(step, untied, tmp_path / "gptq", calibration)
    nearest = drive(Rtn(4, 32, symmetric=False, embeddings=bits, clip="mse"), untied, tmp_path / "rtn", None)
    assert stored.keys() == nearest.keys()
    ends = [name for name in stored if name.startswith(("model.embed_tokens.", "lm_head."))]
    assert len(ends) == 8
    assert all(torch.equal(stored[name], nearest[name]) for name in ends)
    inner = [name for name in stored if name.endswith("proj.weight_packed")]
    assert inner and all(not torch.equal(stored[name], nearest[name]) for name in inner)


def test_the_ends_err_less_in_the_moments_of_a_guide(
    untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are rounded at once."""
    calibration = weighted(untied, tmp_path / "guide.safetensors")
    assert calibration.guide is not None
    found = []
    for rows in (8192, 100):
        monkeypatch.setattr(under_test, "END_ROWS", rows)
        layer = first_layer(Gptq(3, 32, symmetric=False, embeddings=3), untied, calibration, place=-1)
        found.append(layer.packed["model.embed_tokens.weight"])
    assert torch.equal(found[0].codes, found[1].codes)
    weight = read_tensor(untied.index["model.embed_tokens.weight"])
    moment = calibration.guide.ends["model.embed_tokens.weight"]
    nearest = quantize(weight, found[0].grid, torch.bfloat16, clip="mse")
    mine, theirs = (output_error(weight, made.dequantize(), moment) for made in (found[0], nearest))
    assert mine < 0.8 * theirs


def test_a_matrix_that_is_left_alone_is_stored_as_it_was(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    layer = first_layer(Gptq(4, guided=False, grids=((name, None),)), checkpoint, Calibration(WINDOWS))
    assert name not in layer.packed and len(layer.packed) == 6
    assert torch.equal(layer.tensors[name], read_tensor(checkpoint.index[name]))
    alone = tuple((t.name, None) for t in checkpoint.spec.quantizable if ".layers.0." in t.name)
    layer = first_layer(Gptq(4, guided=False, grids=alone), checkpoint, Calibration(WINDOWS))
    assert (layer.packed, layer.row.value) == ({}, 0.0)


def spoiled(checkpoint: Checkpoint, directory: Path, **rows: Any) -> Checkpoint:
    """A copy in which some rows of some tensors are zero."""
    directory.mkdir()
    for path in checkpoint.path.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / SINGLE_NAME)
    for name, where in rows.items():
        tensors[name][where] = 0
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})
    return open_checkpoint(directory)


def test_columns_that_no_token_reaches_are_rounded_to_nearest(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A norm with zeros, and a row of the gate that is zero: what follows is never reached there."""
    dead = [3, 40]
    damaged = spoiled(
        checkpoint,
        tmp_path / "model",
        **{"model.layers.0.input_layernorm.weight": dead, "model.layers.0.mlp.gate_proj.weight": dead},
    )
    step = Gptq(3, 32, symmetric=False, **PLAIN)
    layer = first_layer(step, damaged, Calibration(WINDOWS))
    moments = moments_of(damaged)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}.weight"
        assert bool((moments[name][dead] == 0).all())
        weight, made = read_tensor(damaged.index[name]), layer.packed[name]
        scale = made.scale.repeat_interleave(32, dim=1)[:, dead]
        assert made.zero_point is not None
        zero = made.zero_point.repeat_interleave(32, dim=1)[:, dead]
        nearest = ((weight[:, dead] / scale).round() + zero).clamp(made.grid.qmin, made.grid.qmax)
        assert torch.equal(made.codes[:, dead].float(), nearest)
    mine = errors(damaged, layer, moments)
    theirs = errors(damaged, rounded(damaged, step, layer), moments)
    assert all(mine[name] < theirs[name] for name in mine)


@pytest.mark.parametrize("guided", [False, True])
def test_a_layer_that_nothing_reaches(guided: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its norms are zero, so that all its inputs are: nothing is lost, and nothing is not finite."""
    norms = ("input_layernorm", "post_attention_layernorm")
    damaged = spoiled(checkpoint, tmp_path / "model", **{f"model.layers.0.{n}.weight": slice(None) for n in norms})
    calibration = weighted(damaged, tmp_path / "guide.safetensors") if guided else Calibration(WINDOWS)
    layer = first_layer(Gptq(4, 32, guided=guided), damaged, calibration)
    assert layer.row.value == 0.0
    for name, weight in layer.packed.items():
        assert bool(torch.isfinite(weight.dequantize()).all())
        nearest = quantize(read_tensor(damaged.index[name]), Grid(4, 32), torch.bfloat16, clip="mse")
        assert torch.equal(weight.codes, nearest.codes)


def test_one_window_of_two_tokens_is_enough(checkpoint: Checkpoint) -> None:
    layer = first_layer(Gptq(4, guided=False), checkpoint, Calibration([[1, 2]]))
    assert all(bool(torch.isfinite(weight.dequantize()).all()) for weight in layer.packed.values())


def test_what_is_read_back_is_what_was_packed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Quantized scales and zero points and all, through a whole artifact."""
    options = {"bits": 3, "group_size": 16, "symmetric": False, "scale_bits": 6, "guided": False}
    out = open_checkpoint(make_artifact(checkpoint.path, tmp_path / "out", method="gptq", **options))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = read_quantized(out, name)
        assert weight.grid == Grid(3, 16, False, 6) and weight.coded_scale is not None
        exact = read_tensor(checkpoint.index[f"{name}.weight"])
        assert float((weight.dequantize().float() - exact).norm() / exact.norm()) < 0.4
