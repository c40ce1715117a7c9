"""Narrower MLPs: the right channels go, what they did is made up for, and any transformers loads the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import save_byte_tokenizer
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import save_architecture
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from packlight.checkpoint.open import open_checkpoint, read_spec
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.compress.prune.flap import Flap
from packlight.errors import UsageError
from packlight.evidence import LEDGER_NAME, read
from packlight.measure.size import disk_size
from packlight.plan.layout import artifact_bytes

REPAIRS = ("bias", "least-squares", "affine", "none")
DEAD = (1, 5, 6, 40, 77, 100, 101, 127)


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    """A random Llama whose MLPs have biases, 128 channels of which `DEAD` contribute nothing."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        mlp_bias=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                torch.nn.init.normal_(linear.bias, std=0.1)
    model.save_pretrained(directory := tmp_path / "biased")
    save_byte_tokenizer(directory)
    kill(directory)
    return directory


def kill(directory: Path) -> None:
    tensors = load_file(directory / SINGLE_NAME)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensor[:, list(DEAD)] = 0
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


@pytest.mark.parametrize("score", ["fluctuation", "wanda"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_channels_without_effect_go_and_the_model_stays_the_same(
    score: str, repair: str, biased: Path, tmp_path: Path
) -> None:
    options = {"sparsity": len(DEAD) / 128, "score": score, "repair": repair, "dtype": "float32", "damping": 1e-6}
    out = make_artifact(biased, tmp_path / "out", method="flap", **options)
    made, original = load_file(out / SINGLE_NAME), load_file(biased / SINGLE_NAME)
    alive = [place for place in range(128) if place not in DEAD]
    for part in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
        name = f"model.layers.1.mlp.{part}"
        assert torch.equal(made[name], original[name][alive])
    ids = torch.arange(1, 41)[None]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(biased)(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_the_result_is_narrower_and_as_large_as_planned(
    repair: Any, dtype: str, tiny_model_dir: Any, tmp_path: Path
) -> None:
    directory = tiny_model_dir(tied=True)
    step, spec = Flap(sparsity=0.25, repair=repair, dtype=dtype), read_spec(directory)
    out = make_artifact(directory, tmp_path / "out", **step.to_dict())
    checkpoint = open_checkpoint(out)
    assert disk_size(checkpoint) == artifact_bytes(step.reshaped(spec), step.precision)
    assert checkpoint.spec.intermediate_size == 96
    assert checkpoint.index["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    config = json.loads((out / "config.json").read_text())
    has_bias = repair in ("bias", "affine")
    assert config["intermediate_size"] == 96 and config["mlp_bias"] is has_bias
    assert ("model.layers.0.mlp.gate_proj.bias" in checkpoint.index) is has_bias
    assert proof_distance(out)[0] < (1e-6 if dtype == "float32" else 5e-3)
    make_artifact(out, tmp_path / "again", method="rtn")


def test_repairs_leave_less_error_the_more_they_may_change(tiny_model_dir: Any, tmp_path: Path) -> None:
    found = {}
    for repair in REPAIRS:
        options = {"sparsity": 0.5, "repair": repair, "dtype": "float32", "damping": 1e-6}
        out = make_artifact(tiny_model_dir(tied=True), tmp_path / repair, method="flap", **options)
        rows = [row for row in read(out / LEDGER_NAME) if row.subject == "model.layers.0"]
        (found[repair],) = (row.value for row in rows if row.name == "relative_output_error")
    assert found["affine"] <= found["least-squares"] < found["none"] < 1
    assert found["affine"] < found["bias"] < found["none"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "mistral"])
def test_other_families_are_repaired_without_a_bias(name: str, tmp_path: Path) -> None:
    save_architecture(name, original := tmp_path / "original")
    with pytest.raises(UsageError, match="has no place for biases in its MLPs"):
        make_artifact(original, tmp_path / "refused", method="flap")
    out = make_artifact(original, tmp_path / "out", method="flap", repair="least-squares", dtype="float32")
    assert read_spec(out).intermediate_size == 104
    assert proof_distance(out)[0] < 1e-6
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3"])
def test_other_mlps_are_refused(name: str, tmp_path: Path) -> None:
    save_architecture(name, original := tmp_path / "original")
    with pytest.raises(UsageError, match="has gate_proj, up_proj and down_proj"):
        make_artifact(original, tmp_path / "out", method="flap")
    assert not (tmp_path / "out").exists()


def test_mlps_of_other_widths_than_the_config_names_are_refused(tiny_model_dir: Any) -> None:
    spec = replace(read_spec(tiny_model_dir(tied=True)), intermediate_size=256)
    with pytest.raises(UsageError, match="the width that its config names"):
        Flap().plan(spec)


@pytest.mark.parametrize(
    ("inner", "sparsity", "multiple", "width"),
    [
        (11008, 0.2, None, 8704),  # 34 x 256
        (1536, 0.2, None, 1216),  # 19 x 64
        (768, 0.2, None, 608),  # 19 x 32
        (128, 0.2, None, 104),
        (100, 0.2, None, 80),
        (1536, 0.2, 256, 1280),
        (1536, 0.0, 256, 1536),
    ],
)
def test_the_width_is_a_multiple_that_engines_like(
    inner: int, sparsity: float, multiple: int | None, width: int
) -> None:
    assert Flap(sparsity=sparsity, multiple=multiple).width(inner, "it") == width
