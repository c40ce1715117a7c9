"""What a compressed-tensors checkpoint stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from packlight.checkpoint.shards import SINGLE_NAME, TensorEntry, read_index
from packlight.checkpoint.stored import logical_tensors, stored_precision
from packlight.errors import CheckpointError
from packlight.spec import Grid, Precision, TensorSpec

LINEAR = "model.layers.0.mlp.up_proj"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def group(targets: list[str], bits: int = 4, size: int | None = 32, **more: Any) -> dict[str, Any]:
    strategy = "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size}
    return {"targets": targets, "weights": weights | more, "input_activations": None}


def quantized(*groups: dict[str, Any], layout: str = "pack-quantized", ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    named = {f"group_{number}": item for number, item in enumerate(groups)}
    method = {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, "ignore": list(ignore)}
    return CONFIG | {"quantization_config": method}


@pytest.fixture
def packed(tmp_path: Path) -> dict[str, TensorEntry]:
    tensors = {
        f"{LINEAR}.weight_packed": torch.zeros(96, 8, dtype=torch.int32),
        f"{LINEAR}.weight_scale": torch.zeros(96, 2, dtype=torch.bfloat16),
        f"{LINEAR}.weight_shape": torch.tensor([96, 64]),
        f"{LINEAR}.weight_zero_point": torch.zeros(12, 2, dtype=torch.int32),
        f"{LINEAR}.bias": torch.zeros(96, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64, dtype=torch.int8),
        "model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(64, 1, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.zeros(100, 64, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(64),
    }
    save_file(tensors, tmp_path / SINGLE_NAME)
    return read_index(tmp_path)


def test_parts_become_one_dense_matrix(packed: dict[str, TensorEntry]) -> None:
    found = {tensor.name: tensor for tensor in logical_tensors(quantized(group(["Linear"])), packed)}
    assert len(found) == 5
    assert found[f"{LINEAR}.weight"] == TensorSpec(f"{LINEAR}.weight", (96, 64), "bfloat16", "linear")
    assert found[f"{LINEAR}.bias"].kind == "other"
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == "bfloat16"
    assert found["model.norm.weight"].dtype == "float32"


def test_a_packed_matrix_needs_its_shape(packed: dict[str, TensorEntry]) -> None:
    index = {name: entry for name, entry in packed.items() if not name.endswith("weight_shape")}
    with pytest.raises(CheckpointError, match="without a weight_shape"):
        logical_tensors(quantized(group(["Linear"])), index)


TENSORS = (
    TensorSpec("model.embed_tokens.weight", (100, 64), "bfloat16", "embedding"),
    TensorSpec("model.layers.0.mlp.up_proj.weight", (96, 64), "bfloat16", "linear"),
    TensorSpec("model.layers.0.self_attn.q_proj.weight", (64, 64), "bfloat16", "linear"),
    TensorSpec("model.norm.weight", (64,), "bfloat16", "other"),
    TensorSpec("lm_head.weight", (100, 64), "bfloat16", "head"),
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, None),
        (quantized(group(["Linear"]), ignore=("lm_head",)), Precision("bfloat16", Grid(4, 32))),
        (
            quantized(group(["Linear"], 8, None, symmetric=False), ignore=("lm_head",)),
            Precision("bfloat16", Grid(8, None, False)),
        ),
        (
            quantized(group(["Linear"]), group(["re:.*embed_tokens$", "lm_head"], 8, None)),
            Precision("bfloat16", Grid(4, 32), Grid(8)),
        ),
        (
            quantized(group(["Embedding"], 8, None)),
            Precision("bfloat16", None, Grid(8), (("lm_head.weight", None),)),
        ),
        # Two grids inside the blocks: the larger share stands for them, the other is named.
        (
            quantized(group(["Linear"], 8), group(["re:.*up_proj"], 3, 64), ignore=("lm_head",)),
            Precision("bfloat16", Grid(3, 64), None, (("model.layers.0.self_attn.q_proj.weight", Grid(8, 32)),)),
        ),
        (quantized(group(["Linear"]), ignore=("re:.*",)), Precision("bfloat16")),
    ],
)
def test_groups_become_a_precision(config: dict[str, Any], expected: Precision | None) -> None:
    assert stored_precision(config, TENSORS) == expected


def test_what_is_stored_says_what_is_quantized(packed: dict[str, TensorEntry]) -> None:
    config = quantized(group(["Linear", "Embedding"]))
    found = stored_precision(config, logical_tensors(config, packed), packed)
    assert found == Precision("bfloat16", Grid(4, 32), None)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (CONFIG | {"quantization_config": {"quant_method": "gptq"}}, "'gptq'; packlight reads compressed-tensors"),
        (CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        (CONFIG | {"quantization_config": []}, "not an object"),
        (CONFIG | {"quantization_config": {"quant_method": "compressed-tensors"}}, "no config_groups"),
        (quantized(group(["Linear"]), layout="float-quantized"), "'float-quantized'"),
        (quantized(group(["Linear"], type="float")), "of type 'float'"),
        (quantized(group(["Linear"], strategy="tensor")), "strategy 'tensor'"),
        (quantized(group(["Linear"]) | {"input_activations": {"num_bits": 8}}), "quantizes activations too"),
        (quantized(group(["re:("])), "not a regular expression"),
        (quantized({"targets": ["Linear"]}), "lacks weights or targets"),
        (quantized(group(["Linear"])) | {"dtype": "float64"}, "dtype is float64"),
        (quantized(group(["Linear"], 4, 48)), "64 columns, on int4-g48-sym, whose group does not divide"),
    ],
)
def test_other_kinds_are_refused_by_name(config: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        stored_precision(config, TENSORS)
