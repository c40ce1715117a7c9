"""Whole blocks removed: the right ones, with everything that a config says about each layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import save_architecture
from transformers import AutoModelForCausalLM

from packlight.checkpoint.config import changed_config
from packlight.checkpoint.open import open_checkpoint, read_spec
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.compress.influence import influences, known_influences
from packlight.compress.prune.blocks import Blocks, per_layer
from packlight.compress.walk import Calibration
from packlight.errors import UsageError
from packlight.evidence import LEDGER_NAME, read
from packlight.measure.size import disk_size
from packlight.plan.layout import artifact_bytes
from packlight.plan.reshape import without_blocks
from packlight.spec import TensorSpec

ARCHITECTURES = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt2")
WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj")
"""Linears that add to the residual stream."""
WINDOWS = [list(b"of the Buonapartes. But I warn y"), list(b"if you don't tell me that this m")]


def silence(directory: Path, place: int) -> None:
    """Let one block add nothing to what passes through it."""
    tensors = load_file(directory / SINGLE_NAME)
    for name, tensor in tensors.items():
        if f".{place}." in name and any(f".{writer}." in name for writer in WRITERS):
            tensor.zero_()
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_that_does_nothing_goes_and_the_model_stays_the_same(name: str, place: int, tmp_path: Path) -> None:
    """Also where layers differ by a list or a rule: what stays keeps its window and its kind of positions."""
    save_architecture(name, original := tmp_path / "original")
    silence(original, place)
    out = make_artifact(original, tmp_path / "out", method="blocks", sparsity=0.5, dtype="float32")
    assert read_spec(out).num_layers == 1
    rows = [row for row in read(out / LEDGER_NAME) if row.name == "block_influence"]
    assert [row.note for row in rows if row.subject.endswith(f".{place}")] == ["removed"]
    ids = torch.arange(1, 41)[None]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(original)(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    assert proof_distance(out)[0] < 1e-6


def test_influences_are_those_of_hidden_states(tiny_model_dir: Any) -> None:
    directory = tiny_model_dir(tied=True)
    found = influences(open_checkpoint(directory), Calibration(WINDOWS, batch=1), lambda: None)
    model = AutoModelForCausalLM.from_pretrained(directory)
    wanted: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, out: wanted.append(1 - float(torch.cosine_similarity(args[0], out, dim=-1).mean()))
        )
    with torch.inference_mode():
        model(torch.tensor(WINDOWS))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert all(0 < value < 2 for value in found)


def test_influences_that_were_found_are_not_found_again(
    tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, file = open_checkpoint(tiny_model_dir(tied=True)), tmp_path / "found.json"
    stages: list[int] = []

    def start(total: int) -> Any:
        stages.append(total)
        return lambda: None

    first = known_influences(checkpoint, Calibration(WINDOWS), file, start)
    assert stages == [2] and len(first) == 2
    monkeypatch.setattr("packlight.compress.influence.influences", None)
    assert known_influences(checkpoint, Calibration(WINDOWS), file, start) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_blocks_that_stay_are_numbered_anew(dtype: str, tiny_model_dir: Any, tmp_path: Path) -> None:
    directory = tiny_model_dir(tied=False)
    out = make_artifact(directory, tmp_path / "out", method="blocks", sparsity=0.5, dtype=dtype)
    gone = next(row.subject for row in read(out / LEDGER_NAME) if row.note == "removed")
    stays = "model.layers.1." if gone.endswith(".0") else "model.layers.0."
    original, made = load_file(directory / SINGLE_NAME), load_file(out / SINGLE_NAME)
    for name, tensor in original.items():
        if name.startswith(f"{gone}."):
            continue
        kept = made.pop(name.replace(stays, "model.layers.0."))
        assert torch.equal(kept, tensor.to(kept.dtype))
    assert not made
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and "quantization_config" not in config
    step, spec = Blocks(sparsity=0.5, dtype=dtype), read_spec(directory)
    assert disk_size(open_checkpoint(out)) == artifact_bytes(step.reshaped(spec), step.precision)


def test_a_result_is_a_start_for_other_methods(tiny_model_dir: Any, tmp_path: Path) -> None:
    smaller = make_artifact(tiny_model_dir(tied=True), tmp_path / "smaller", method="blocks")
    make_artifact(smaller, tmp_path / "smallest", method="rtn")
    assert proof_distance(tmp_path / "smallest")[0] < 1e-3


def test_no_sparsity_is_no_change(tiny_model_dir: Any, tmp_path: Path) -> None:
    directory = tiny_model_dir(tied=True)
    out = make_artifact(directory, tmp_path / "out", method="blocks", sparsity=0, dtype="float32")
    original, made = load_file(directory / SINGLE_NAME), load_file(out / SINGLE_NAME)
    assert original.keys() == made.keys() and all(torch.equal(original[name], made[name]) for name in original)


def test_lists_and_numbers_of_a_config() -> None:
    config = {"n_layer": 3, "eos_token_id": [1, 2, 3], "layer_types": ["a", "b", "c"], "mlp_only_layers": []}
    assert per_layer(config, 3) == {"layer_types": ["a", "b", "c"]}
    changed = changed_config(config, {"num_layers": 2, "layer_types": ["a", "c"]})
    assert changed == {**config, "n_layer": 2, "layer_types": ["a", "c"]}
    assert changed_config({"text_config": config}, {"num_layers": 1})["text_config"]["n_layer"] == 1
    assert changed_config({}, {"num_layers": 1}) == {"num_hidden_layers": 1}
    assert config["n_layer"] == 3


def test_blocks_that_differ_and_experts_are_refused(tiny_model_dir: Any) -> None:
    spec = read_spec(tiny_model_dir(tied=True))
    narrow = replace(spec.tensors[-2], shape=(1,))
    assert ".layers." in narrow.name
    differing = replace(spec, tensors=(*spec.tensors[:-2], narrow, spec.tensors[-1]))
    with pytest.raises(UsageError, match="differ in their shapes"):
        without_blocks(differing, 1)
    experts = TensorSpec("model.layers.0.mlp.experts.down_proj", (2, 4, 4), "float32", "expert")
    with pytest.raises(UsageError, match="holds stacks of experts"):
        Blocks().plan(replace(spec, tensors=(*spec.tensors, experts)))


def test_windows_of_layers_are_counted_as_far_as_they_can_stay(tiny_model_dir: Any) -> None:
    spec = replace(read_spec(tiny_model_dir(tied=True)), sliding_window=8, num_sliding_layers=2)
    assert without_blocks(spec, 1).num_sliding_layers == 1
    assert without_blocks(spec, 0) == spec
