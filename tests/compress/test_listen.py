"""What enters the linears of a block, beside what hooks see in a pass through the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import save_llama
from tests.runtime.architectures import save_architecture

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress.listen import Group, input_groups, inputs_of, listening
from packlight.compress.walk import Block, Calibration, WalkResult, walk
from packlight.runtime.load import empty_model, load_model

IDS = list(range(1, 20))
WINDOWS = [list(range(40, 60)), list(range(100, 120)), list(range(60, 80))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        if not (directory / name).exists():
            if name == "llama":
                save_llama(directory / name)
            else:
                save_architecture(name, directory / name)
        return directory / name

    return model


def layers(checkpoint: Checkpoint) -> Iterator[Block]:
    """The blocks between the ends, unchanged."""
    calibration = Calibration(WINDOWS, batch=2)
    blocks = walk(checkpoint, empty_model(checkpoint), IDS, calibration, lambda b: None, lambda b: False, WalkResult())
    yield from (block for block in blocks if block.kind == "layer")


def linears(block: Block) -> list[str]:
    return [name for name, spec, _ in block.matrices() if spec.kind == "linear"]


GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "qwen3": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_matrices_with_one_input_come_together_in_the_order_of_a_token(name: str, models: Any) -> None:
    for block in layers(open_checkpoint(models(name))):
        found = input_groups(block, sorted(linears(block)))
        for group, wanted in zip(found, GROUPS[name], strict=True):
            assert set(group.names) == {f"{block.name}.{module}.weight" for module in wanted}


def test_matrices_that_are_not_asked_for_are_left_out(models: Any) -> None:
    block = next(layers(open_checkpoint(models("llama"))))
    names = [f"{block.name}.{module}.weight" for module in ("mlp.down_proj", "self_attn.k_proj", "mlp.up_proj")]
    assert input_groups(block, names) == [Group((names[1],)), Group((names[2],)), Group((names[0],))]
    assert input_groups(block, []) == []


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPS)
def test_inputs_are_those_of_a_pass_through_the_whole_model(name: str, models: Any) -> None:
    checkpoint = open_checkpoint(models(name))
    whole, wanted = load_model(checkpoint), {}
    linear_names = [t.name.removesuffix(".weight") for t in checkpoint.spec.tensors if t.kind == "linear"]
    for module in linear_names:
        whole.get_submodule(module).register_forward_pre_hook(
            lambda _, args, module=module: wanted.__setitem__(f"{module}.weight", args[0])
        )
    whole(torch.tensor(WINDOWS), use_cache=False)
    checked = 0
    for block in layers(checkpoint):
        assert block.activations is not None
        for matrix in linears(block):
            for part in (slice(0, 2), slice(2, 4)):
                x = inputs_of(block, matrix, block.activations.inputs[part])
                full = wanted[matrix].reshape(len(WINDOWS), -1, wanted[matrix].shape[-1])[part]
                assert x.shape == (full.shape[0] * full.shape[1], full.shape[2]) and x.dtype == torch.float32
                torch.testing.assert_close(x, full.reshape(x.shape), rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked == 2 * len(linear_names)


@torch.no_grad()
def test_nothing_is_computed_behind_what_was_asked_for(models: Any) -> None:
    block = next(layers(open_checkpoint(models("llama"))))
    assert block.activations is not None
    ran: list[str] = []
    watched = {name: lambda name, x: ran.append(name) for name in linears(block)}
    with listening(block, watched):
        inputs_of(block, f"{block.name}.self_attn.o_proj.weight", block.activations.inputs[:1])
    assert {name.split(".")[-2] for name in ran} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@torch.no_grad()
def test_nobody_listens_afterwards(models: Any) -> None:
    block = next(layers(open_checkpoint(models("llama"))))
    assert block.activations is not None
    name = f"{block.name}.mlp.up_proj.weight"
    before = block.activations.run(block.module, block.activations.inputs)
    inputs_of(block, name, block.activations.inputs)
    input_groups(block, linears(block))
    with pytest.raises(ZeroDivisionError), listening(block, {name: lambda name, x: 1 / 0}):
        block.activations.run(block.module, block.activations.inputs)
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert torch.equal(block.activations.run(block.module, block.activations.inputs), before)
