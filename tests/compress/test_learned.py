"""Learned rounding: never worse than GPTQ on windows that were held out, and stored as it was computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.conftest import save_llama
from tests.compress.test_gptq_step import IDS, WINDOWS, first_layer, weighted, windows_of

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress import run as compress
from packlight.compress.quantize.gptq import Gptq
from packlight.compress.quantize.learned import HELD_OUT, Learned, _split
from packlight.compress.walk import Calibration, WalkResult
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import QuantizedTensor
from packlight.plan.layout import layout_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_llama(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def guided(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Windows whose tokens are weighted."""
    return weighted(checkpoint, tmp_path_factory.mktemp("guide") / "guide.safetensors")


def assert_same(found: dict[str, QuantizedTensor], wanted: dict[str, QuantizedTensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(weight.codes, wanted[name].codes) and torch.equal(weight.scale, wanted[name].scale)


def run(step: Learned, checkpoint: Checkpoint, work: Path, calibration: Calibration) -> list[Measurement]:
    return list(compress.run(step, checkpoint, work, layout_of(step.precision), IDS, calibration, WalkResult()))


@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_no_layer_is_worse_than_by_gptq(
    bits: int, is_guided: bool, checkpoint: Checkpoint, guided: Calibration, tmp_path: Path
) -> None:
    step = Learned(bits, 32, symmetric=False, guided=is_guided)
    rows = run(step, checkpoint, tmp_path / "work", guided if is_guided else Calibration(WINDOWS))
    layers = [row for row in rows if row.name == "block_loss"]
    assert [row.subject for row in layers] == ["model.layers.0", "model.layers.1"]
    for row in layers:
        assert isinstance(row.value, float) and row.predicted is not None
        assert 0 < row.value <= row.predicted


def test_it_pays_at_two_bits(checkpoint: Checkpoint) -> None:
    """Given enough text: a few hundred tokens are learned by heart, and GPTQ's result is kept."""
    row = first_layer(Learned(2, 32, symmetric=False, guided=False), checkpoint, Calibration(windows_of(64))).row
    assert isinstance(row.value, float) and row.predicted is not None
    assert row.value < 0.85 * row.predicted


@pytest.mark.parametrize("scale_bits", [None, 4, 8])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True)])
def test_what_is_stored_is_what_the_block_computes_with(
    bits: int, symmetric: bool, scale_bits: int | None, checkpoint: Checkpoint
) -> None:
    options: dict[str, Any] = {"symmetric": symmetric, "scale_bits": scale_bits, "guided": False}
    step = Learned(bits, 16, epochs=3, code_rate=0.1, scale_rate=0.02, **options)
    layer = first_layer(step, checkpoint, Calibration(WINDOWS))
    before = first_layer(Gptq(bits, 16, **options), checkpoint, Calibration(WINDOWS))
    assert len(layer.packed) == 7
    for name, weight in layer.packed.items():
        assert weight.grid == step.precision.linear
        assert weight.codes.dtype == torch.int8 and weight.scale.dtype == torch.bfloat16
        assert weight.grid.qmin <= int(weight.codes.min()) and int(weight.codes.max()) <= weight.grid.qmax
        assert torch.equal(weight.dequantize().float(), layer.tensors[name])
        assert bool(torch.isfinite(weight.scale).all()) and bool((weight.scale > 0).all())
        if not symmetric:
            assert weight.zero_point is not None and before.packed[name].zero_point is not None
            assert torch.equal(weight.zero_point, before.packed[name].zero_point)  # type: ignore[arg-type]
        assert (weight.coded_scale is None) == (scale_bits is None)
        if weight.coded_scale is not None and scale_bits is not None:
            assert torch.equal(weight.coded_scale.value(), weight.scale)
            assert int(weight.coded_scale.codes.min()) >= 1 and int(weight.coded_scale.codes.max()) < 1 << scale_bits
    if layer.row.value < layer.row.predicted:  # type: ignore[operator]
        pairs = [(weight, before.packed[name]) for name, weight in layer.packed.items()]
        assert any(not torch.equal(mine.codes, theirs.codes) for mine, theirs in pairs)
        assert any(not torch.equal(mine.scale, theirs.scale) for mine, theirs in pairs)


@pytest.mark.parametrize(
    "rates",
    [{"code_rate": 0.999, "scale_rate": 0.9}, {"code_rate": 0.001, "scale_rate": 0.999, "epochs": 12}],
    ids=["codes", "scales"],
)
@pytest.mark.parametrize("scale_bits", [None, 6])
def test_a_training_that_makes_it_worse_leaves_gptqs_result(
    rates: dict[str, Any], scale_bits: int | None, checkpoint: Checkpoint
) -> None:
    calibration, options = Calibration(WINDOWS, batch=1), {"guided": False, "scale_bits": scale_bits}
    layer = first_layer(Learned(8, **options, **rates), checkpoint, calibration)
    assert_same(layer.packed, first_layer(Gptq(8, **options), checkpoint, calibration).packed)
    assert layer.row.value == layer.row.predicted
    assert all(torch.equal(weight.dequantize().float(), layer.tensors[n]) for n, weight in layer.packed.items())


def test_it_starts_from_gptqs_result(checkpoint: Checkpoint, guided: Calibration) -> None:
    """With steps too small to move a code, nothing but scales can change, by less than their dtype shows."""
    step = Learned(3, dtype="float32", code_rate=1e-9, scale_rate=1e-9, epochs=1)
    layer = first_layer(step, checkpoint, guided)
    wanted = first_layer(Gptq(3, dtype="float32"), checkpoint, guided)
    for name, weight in layer.packed.items():
        assert torch.equal(weight.codes, wanted.packed[name].codes)
        torch.testing.assert_close(weight.scale, wanted.packed[name].scale, rtol=1e-6, atol=0)


def test_it_is_the_same_every_time(checkpoint: Checkpoint, guided: Calibration, tmp_path: Path) -> None:
    """Whatever the state of torch's own generator, which it leaves as it was."""
    step, files = Learned(2, scale_bits=6, epochs=2), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run(step, checkpoint, tmp_path / str(seed), guided)
        assert torch.equal(torch.get_rng_state(), before)
        files.append([path.read_bytes() for path in compress.block_files(tmp_path / str(seed))])
    assert files[0] == files[1]


def test_the_modules_are_left_as_they_were(checkpoint: Checkpoint, guided: Calibration, tmp_path: Path) -> None:
    """No parametrization stays, and what is left alone is stored as it was."""
    run(Learned(3, epochs=1), checkpoint, tmp_path / "work", guided)
    stored, original = {}, load_file(checkpoint.path / "model.safetensors")
    for path in compress.block_files(tmp_path / "work"):
        stored |= load_file(path)
    assert not [name for name in stored if "parametrizations" in name or "original" in name]
    alone = [name for name in original if name in stored]
    assert len(alone) == 2 + 2 * checkpoint.spec.num_layers  # embedding, norms
    assert all(torch.equal(stored[name], original[name].to(torch.bfloat16)) for name in alone)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_windows(count: int, checkpoint: Checkpoint) -> None:
    row = first_layer(Learned(2, guided=False, epochs=1), checkpoint, Calibration(WINDOWS[:count])).row
    assert 0 < row.value <= row.predicted  # type: ignore[operator]


def test_windows_are_trained_on_or_held_out() -> None:
    assert _split(1) == ([0], [0])
    for count in (2, 3, HELD_OUT, HELD_OUT + 1, 40):
        train, held_out = _split(count)
        assert sorted(train + held_out) == list(range(count))
        assert len(held_out) == -(-count // HELD_OUT) and train


def test_a_matrix_that_is_left_alone(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    layer = first_layer(Learned(3, guided=False, epochs=1, grids=((name, None),)), checkpoint, Calibration(WINDOWS))
    assert name not in layer.packed and len(layer.packed) == 6


def test_a_layer_that_is_left_alone(checkpoint: Checkpoint) -> None:
    alone = tuple((t.name, None) for t in checkpoint.spec.quantizable if ".layers.0." in t.name)
    layer = first_layer(Learned(3, guided=False, grids=alone), checkpoint, Calibration(WINDOWS))
    assert layer.packed == {}
    assert layer.row.value == 0.0


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"epochs": 1.5}, {"code_rate": 0}, {"code_rate": 1}, {"scale_rate": -0.1}, {"scale_rate": 1}]
)
def test_ranges(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Learned(**bad)


def test_every_epoch_is_a_forward_and_a_backward_pass() -> None:
    assert Learned(epochs=5).reading.passes - Gptq().reading.passes == 16
