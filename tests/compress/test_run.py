"""The walk and what drives it: every block sees what it sees in the whole model, and damage is named."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.artifacts import make_artifact
from torch import nn

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.compress import run as compress
from packlight.compress.cast import Cast
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.step import Step
from packlight.compress.walk import Calibration, WalkResult, find_layers, walk
from packlight.errors import CheckpointError
from packlight.runtime.load import empty_model, load_model

IDS = list(range(1, 31))
WINDOWS = [list(range(40, 80)), list(range(100, 140)), list(range(60, 100))]

CALIBRATION = Calibration(WINDOWS, batch=2)


def drive(step: Step, checkpoint: Checkpoint, work: Path) -> WalkResult:
    result = WalkResult()
    list(compress.run(step, checkpoint, work, "pack-quantized", IDS, None, result))
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_an_unchanged_model_walks_as_it_runs(tiny_model_dir: Callable[..., Path], tied: bool) -> None:
    """Every block gets the hidden states that transformers reports, and the logits at the end are the model's own."""
    checkpoint = open_checkpoint(tiny_model_dir(tied=tied))
    whole = load_model(checkpoint)
    with torch.inference_mode():
        wanted = [
            whole(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states for ids in WINDOWS
        ]
        logits = whole(torch.tensor([IDS]), use_cache=False).logits[0]
    result, kinds = WalkResult(), []
    blocks = walk(
        checkpoint, empty_model(checkpoint), IDS, CALIBRATION, lambda block: None, lambda block: False, result
    )
    for block in blocks:
        kinds.append((block.index, block.kind, block.name))
        assert not any(block.tensor(name).is_meta for name in block.tensors)
        assert (block.activations is not None) is (block.kind == "layer")
        if block.activations is not None:
            now = block.activations
            for place, states in enumerate(wanted):
                torch.testing.assert_close(now.inputs[place], states[block.index - 1][0])
                torch.testing.assert_close(now.exact[place], states[block.index - 1][0])
                if block.index < checkpoint.spec.num_layers:  # transformers reports the last one after the final norm
                    torch.testing.assert_close(now.targets[place], states[block.index][0])
    assert kinds == [
        (0, "embedding", "embedding"),
        (1, "layer", "model.layers.0"),
        (2, "layer", "model.layers.1"),
        (3, "head", "head"),
    ]
    assert result.proof_logits is not None
    torch.testing.assert_close(result.proof_logits, logits)


def test_every_tensor_belongs_to_one_block(tiny_model_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=False))
    seen: list[str] = []
    blocks = walk(checkpoint, empty_model(checkpoint), IDS, None, lambda block: None, lambda block: False, WalkResult())
    for block in blocks:
        seen += block.tensors
        assert set(block.specs) == set(block.tensors)
    assert sorted(seen) == sorted(checkpoint.index)


def test_only_one_layer_is_in_memory_at_a_time(tiny_model_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=True))
    model = empty_model(checkpoint)
    blocks = walk(checkpoint, model, IDS, None, lambda block: None, lambda block: False, WalkResult())
    for block in blocks:
        real = {
            place for place, layer in enumerate(model.model.layers) if not any(p.is_meta for p in layer.parameters())
        }
        assert real == ({block.index - 1} if block.kind == "layer" else set())


def test_a_later_block_sees_what_the_earlier_ones_became(tiny_model_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=True))
    inputs: dict[bool, torch.Tensor] = {}
    exact: dict[bool, torch.Tensor] = {}
    for is_changed in (False, True):
        blocks = walk(
            checkpoint, empty_model(checkpoint), IDS, CALIBRATION, lambda block: None, lambda block: False, WalkResult()
        )
        for block in blocks:
            if is_changed and block.index == 1:
                block.tensor("model.layers.0.mlp.down_proj.weight").zero_()
            if block.index == 2:
                assert block.activations is not None
                inputs[is_changed] = block.activations.inputs.clone()
                exact[is_changed] = block.activations.exact.clone()
    assert not torch.allclose(inputs[False], inputs[True], atol=0.01)
    assert torch.equal(exact[False], exact[True]), "the exact stream does not hear of any change"


def test_an_unchanged_block_is_stored_as_it_was(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """A float32 checkpoint cast to float32 is itself, file by file."""
    original = tiny_model_dir(tied=True)
    drive(Cast("float32"), open_checkpoint(original), tmp_path)
    stored: dict[str, torch.Tensor] = {}
    for path in compress.block_files(tmp_path):
        stored |= load_file(path)
    wanted = load_file(original / SINGLE_NAME)
    assert set(stored) == set(wanted)
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


def test_half_a_block_file_is_not_taken_for_a_block(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=True))
    drive(Rtn(), checkpoint, tmp_path / "whole")
    work = tmp_path / "work"
    started = compress.run(Rtn(), checkpoint, work, "pack-quantized", IDS, None, WalkResult())
    list(itertools.islice(started, 3))
    started.close()
    (work / "0002.part").write_bytes(b"\0" * 100)
    result = drive(Rtn(), checkpoint, work)
    assert result.proof_logits is not None
    for mine, theirs in zip(compress.block_files(work), compress.block_files(tmp_path / "whole"), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"method": "cast"}], ids=lambda options: options["method"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_stays(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, options: dict[str, Any], value: float, name: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir(tied=True), source)
    tensors = load_file(source / SINGLE_NAME)
    tensors[name].view(-1)[5] = value
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN or an infinity"):
        make_artifact(source, tmp_path / "a" / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_value_too_large_for_the_dtype_is_named(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir(tied=True), source)
    tensors = load_file(source / SINGLE_NAME)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds values that are not finite in float16"):
        drive(Cast("float16"), open_checkpoint(source), tmp_path / "work")


def test_a_missing_tensor_is_named(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir(tied=True), source)
    tensors = load_file(source / SINGLE_NAME)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* the first is model.layers.1.mlp.up_proj.weight"):
        drive(Rtn(), open_checkpoint(source), tmp_path / "work")


def test_blocks_in_no_list(tiny_model_dir: Callable[..., Path]) -> None:
    model = empty_model(open_checkpoint(tiny_model_dir(tied=True)))
    assert find_layers(model) is model.model.layers
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM keeps its 2 blocks in no list"):
        find_layers(model)
