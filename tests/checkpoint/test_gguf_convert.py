"""A converted GGUF file is the model that the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize as reference
from tests.checkpoint.gguf_bytes import TYPE_F32, TYPE_Q4_0, model, write

from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.gguf import read_gguf
from packlight.checkpoint.gguf_convert import convert_gguf, gguf_config, shortest
from packlight.checkpoint.rotary import half_split_rows
from packlight.checkpoint.shards import read_index
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError


def converted(tmp_path: Path, *parts: Any) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(write(tmp_path / "m.gguf", *parts), out)
    return out


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k on the way in."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_half_split_undoes_interleaving() -> None:
    rows = np.arange(32 * 3).reshape(32, 3)
    np.testing.assert_array_equal(half_split_rows(interleaved(rows, 4), 4), rows)
    assert half_split_rows(np.arange(8), 1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_transformers_loads_the_directory_with_the_files_weights(tmp_path: Path, arch: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    metadata, tensors = model(arch, dtype)
    out = converted(tmp_path, metadata, tensors)
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == {"f4": torch.float32, "f2": torch.float16}[dtype]
    raw = {name: np.frombuffer(data, "<f4" if kind == 0 else "<f2").reshape(s) for name, s, kind, data in tensors}
    layer = loaded.model.layers[0]
    queries, keys = raw["blk.0.attn_q.weight"], raw["blk.0.attn_k.weight"]
    if arch == "llama":
        queries, keys = half_split_rows(queries, 4), half_split_rows(keys, 2)
    np.testing.assert_array_equal(layer.self_attn.q_proj.weight.detach(), queries)
    np.testing.assert_array_equal(layer.self_attn.k_proj.weight.detach(), keys)
    np.testing.assert_array_equal(layer.mlp.down_proj.weight.detach(), raw["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(loaded.lm_head.weight.detach(), raw["token_embd.weight"])
    if arch == "qwen2":
        bias = layer.self_attn.q_proj.bias.detach().float()
        np.testing.assert_allclose(bias, raw["blk.0.attn_q.bias"], rtol=1e-3)


def test_a_file_with_one_quantized_tensor_becomes_float32(tmp_path: Path) -> None:
    metadata, tensors = model(dtype="f2")
    block = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.full(16, 0x9A, np.uint8)]).tobytes()
    place = next(i for i, tensor in enumerate(tensors) if tensor[0] == "blk.0.ffn_up.weight")
    tensors[place] = ("blk.0.ffn_up.weight", (64, 32), TYPE_Q4_0, block * 64)
    out = converted(tmp_path, metadata, tensors)
    index = read_index(out)
    assert {entry.dtype for entry in index.values()} == {"float32"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    values = read_tensor(index["model.layers.0.mlp.up_proj.weight"])
    assert values[0].tolist() == [(0xA - 8) * 0.5] * 16 + [(9 - 8) * 0.5] * 16


def test_a_plain_file_keeps_each_type(tmp_path: Path) -> None:
    index = read_index(converted(tmp_path, *model(dtype="f2")))
    assert index["model.embed_tokens.weight"].dtype == "float16"
    assert index["model.norm.weight"].dtype == "float32"


def test_a_stored_head_is_not_tied(tmp_path: Path) -> None:
    metadata, tensors = model()
    head = np.ones((263, 32), "<f4")
    out = converted(tmp_path, metadata, [*tensors, ("output.weight", (263, 32), TYPE_F32, head.tobytes())])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert read_tensor(read_index(out)["lm_head.weight"]).sum() == head.size


def test_the_config_is_whole_and_its_floats_are_short(tmp_path: Path) -> None:
    config = json.loads((converted(tmp_path, *model(llama__rope__freq_base=5e5)) / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 500000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert (config["bos_token_id"], config["eos_token_id"], config["head_dim"]) == (1, 2, 8)
    assert shortest(9.999999747378752e-06) == 1e-05


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}, {"rope_type": "linear"}),
        ({"llama__rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__original_context_length": 16,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rotary_scaling_is_kept(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = gguf_config(read_gguf(write(tmp_path / "m.gguf", *model(**changes))))
    assert expected.items() <= config["rope_parameters"].items()


def test_llama3_factors_become_its_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters=dict(wanted))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    metadata, tensors = model(llama__rope__freq_base=5e5)
    factors = (plain / scaled).numpy().astype("<f4")
    path = write(tmp_path / "m.gguf", metadata, [*tensors, ("rope_freqs.weight", (4,), TYPE_F32, factors.tobytes())])
    assert gguf_config(read_gguf(path))["rope_parameters"] == pytest.approx(wanted)
    strange = (factors * np.array([1, 2, 3, 1], "<f4")).tobytes()
    path = write(tmp_path / "s.gguf", metadata, [*tensors, ("rope_freqs.weight", (4,), TYPE_F32, strange)])
    with pytest.raises(CheckpointError, match="Llama 3's formula"):
        gguf_config(read_gguf(path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general__architecture": "gemma2"}, "'gemma2'; packlight converts GGUF files of llama, qwen2, qwen3"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope'"),
        ({"llama__rope__dimension_count": 4}, "must be equal"),
        ({"llama__attention__head_count_kv": 3}, "do not fit"),
        ({"llama__attention__head_count": [4, 4]}, "an integer is expected"),
        ({"llama__block_count": 2}, "lacks the tensor blk.1"),
        ({"llama__block_count": 2**31}, "claims 2147483648 blocks"),
        ({"llama__block_count": 0}, "positive"),
        ({"llama__feed_forward_length": 128}, "must have shape"),
    ],
)
def test_what_is_not_converted_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        converted(tmp_path, *model(**changes))


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    metadata, tensors = model()
    with pytest.raises(CheckpointError, match=r"holds the tensor blk.0.strange"):
        converted(tmp_path, metadata, [*tensors, ("blk.0.strange", (1,), TYPE_F32, b"\0" * 4)])


@pytest.mark.demo
def test_the_demos_weights_are_the_files(demo_dir: Path) -> None:
    index = read_index(demo_dir)
    reader = GGUFReader(demo_file())
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        expected = reference(stored[name].data, stored[name].tensor_type)
        np.testing.assert_array_equal(read_tensor(index[ours]).numpy(), expected)
    queries = reference(stored["blk.3.attn_q.weight"].data, stored["blk.3.attn_q.weight"].tensor_type)
    ours_q = read_tensor(index["model.layers.3.self_attn.q_proj.weight"]).numpy()
    np.testing.assert_array_equal(interleaved(ours_q, 9), queries)


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_demos_logits_are_those_of_transformers_own_reader(demo_dir: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights with accelerate alone")
    from transformers import AutoModelForCausalLM

    file = demo_file()
    ids = torch.tensor([[1, 4093, 198, 19556, 28, 638, 359, 346, 47, 2]])
    ours = AutoModelForCausalLM.from_pretrained(demo_dir)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
