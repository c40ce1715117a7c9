"""Shapes from a config alone, held against transformers' own models on the meta device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from packlight.checkpoint.config import base_fields, classify, spec_from_config, spec_from_tensors
from packlight.checkpoint.families import KNOWN_FAMILIES
from packlight.errors import CheckpointError
from packlight.spec import TensorSpec

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_NO_KV = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
_BARE = {key: value for key, value in _NO_KV.items() if key != "intermediate_size"}
_GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
_MLA = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("mistral", SMALL),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}),
    ("qwen3", SMALL),
    ("qwen3", {**SMALL, "head_dim": 16, "attention_bias": True}),
    ("gemma", SMALL),
    ("gemma2", {**SMALL, "head_dim": 32}),
    ("gemma3_text", {**SMALL, "head_dim": 32}),
    ("phi3", {**SMALL, "pad_token_id": 0}),
    ("smollm3", {**SMALL, "pad_token_id": 0}),
    ("olmo2", SMALL),
    ("granite", {**SMALL, "mlp_bias": True}),
    ("gpt2", _GPT2),
    ("gpt2", {**_GPT2, "n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_bigcode", _GPT2),
    ("gpt_bigcode", {**_GPT2, "multi_query": False}),
    ("gpt_neox", _NO_KV),
    ("gpt_neox", {**_NO_KV, "attention_bias": False}),
    ("opt", {**_BARE, "ffn_dim": 100, "word_embed_proj_dim": 32, "max_position_embeddings": 50}),
    ("opt", {**_BARE, "ffn_dim": 100, "do_layer_norm_before": False, "enable_bias": False}),
    ("bloom", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ("falcon", {**_BARE, "multi_query": True}),
    ("falcon", {**_BARE, "multi_query": False, "bias": True, "parallel_attn": False}),
    ("falcon", {**_BARE, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100}),
    ("mpt", {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    ("mixtral", {**SMALL, "num_local_experts": 3}),
    ("qwen2_moe", {**SMALL, "num_experts": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 72}),
    ("qwen3_moe", {**SMALL, "num_experts": 3, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    ("qwen3_moe", {**SMALL, "num_experts": 3, "moe_intermediate_size": 48, "decoder_sparse_step": 2}),
    ("deepseek_v2", {**SMALL, **_MLA, "q_lora_rank": None}),
    ("deepseek_v2", {**SMALL, **_MLA, "q_lora_rank": 20}),
    ("deepseek_v3", {**SMALL, **_MLA, "q_lora_rank": 20, "n_group": 1, "topk_group": 1}),
]


def config_of(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": ["AnyForCausalLM"], "dtype": "bfloat16", **fields}


@pytest.mark.parametrize(("model_type", "fields"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_are_those_of_transformers(model_type: str, fields: dict[str, Any]) -> None:
    expected, is_tied = _built_by_transformers(model_type, fields)
    spec = spec_from_config(config_of(model_type, fields), "small")
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == expected
    assert spec.is_tied == is_tied


def test_every_known_family_is_compared() -> None:
    assert {model_type for model_type, _ in FAMILIES} == KNOWN_FAMILIES


REAL = [
    # config fields as published with the checkpoints, parameters as transformers counts them
    (
        "llama",
        {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        },
        134_515_008,  # SmolLM2-135M
    ),
    (
        "llama",
        {
            **{"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
            **{"num_attention_heads": 64, "num_key_value_heads": 8},
        },
        68_976_648_192,  # Llama-2-70b
    ),
    ("gpt2", {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, 124_439_808),
    ("bloom", {"vocab_size": 250880, "hidden_size": 14336, "n_layer": 70, "n_head": 112}, 176_247_271_424),
    (
        "gpt_bigcode",
        {
            **{"vocab_size": 49152, "n_embd": 6144, "n_inner": 24576, "n_layer": 40, "n_head": 48},
            **{"n_positions": 8192, "multi_query": True},
        },
        15_517_456_384,  # StarCoder
    ),
]


@pytest.mark.parametrize(("model_type", "fields", "num_params"), REAL, ids=lambda v: v if isinstance(v, str) else "")
def test_published_models(model_type: str, fields: dict[str, Any], num_params: int) -> None:
    assert spec_from_config(config_of(model_type, fields), "real").num_params == num_params


def test_dtype_is_read_from_old_and_new_names_and_defaults_to_float32() -> None:
    config = config_of("llama", SMALL)
    assert spec_from_config(config, "m").dtype == "bfloat16"
    del config["dtype"]
    assert spec_from_config(config, "m").dtype == "float32"
    assert spec_from_config({**config, "torch_dtype": "torch.float16"}, "m").dtype == "float16"


def test_a_nested_text_config_is_taken() -> None:
    nested = {"model_type": "gemma3", "architectures": ["X"], "text_config": {**SMALL, "model_type": "gemma3_text"}}
    spec = spec_from_config(nested, "m")
    assert (spec.model_type, spec.architecture, spec.head_dim) == ("gemma3_text", "X", 256)


def test_latent_attention_and_experts() -> None:
    spec = spec_from_config(config_of("deepseek_v2", {**SMALL, **_MLA}), "m")
    assert (spec.kv_lora_rank, spec.qk_rope_head_dim, spec.head_dim) == (16, 8, 32)
    assert (spec.num_experts, spec.experts_per_token) == (4, 2)


@pytest.mark.parametrize(
    ("model_type", "fields", "window"),
    [
        ("mistral", {"sliding_window": 4096}, (4096, 3)),
        ("mistral", {"sliding_window": None}, (None, 0)),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, (None, 0)),
        ("gemma2", {"sliding_window": 128}, (128, 2)),
        ("gemma3_text", {"sliding_window": 128, "num_hidden_layers": 12}, (128, 10)),
        ("gemma3_text", {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention", "x"]}, (128, 1)),
    ],
)
def test_sliding_windows(model_type: str, fields: dict[str, Any], window: tuple[int | None, int]) -> None:
    base = base_fields(config_of(model_type, {**SMALL, **fields}))
    assert (base.sliding_window, base.num_sliding_layers) == window


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.embed_tokens.weight", (512, 64), "embedding"),
        ("transformer.wte.weight", (512, 64), "embedding"),
        ("wte.weight", (512, 64), "embedding"),
        ("transformer.wpe.weight", (96, 64), "other"),
        ("model.decoder.embed_positions.weight", (96, 64), "other"),
        ("model.decoder.project_in.weight", (64, 32), "other"),
        ("gpt_neox.embed_in.weight", (512, 64), "embedding"),
        ("embed_out.weight", (512, 64), "head"),
        ("lm_head.weight", (512, 64), "head"),
        ("lm_head.bias", (512,), "other"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "linear"),
        ("transformer.h.0.attn.c_attn.weight", (64, 192), "linear"),
        ("h.0.attn.c_attn.weight", (64, 192), "linear"),
        ("h.0.attn.bias", (1, 1, 96, 96), "other"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "other"),
        ("model.layers.0.input_layernorm.weight", (64,), "other"),
        ("model.layers.0.mlp.gate.weight", (4, 64), "other"),
        ("model.layers.0.block_sparse_moe.gate.weight", (4, 64), "other"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "other"),
        ("model.layers.0.mlp.gate_proj.weight", (160, 64), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 64), "expert"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 96), "other"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", (48, 64), "linear"),
    ],
)
def test_classify(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert classify(name, shape) == kind


def test_headers_decide_over_the_config() -> None:
    embedding = TensorSpec("model.embed_tokens.weight", (512, 64), "float16", "embedding")
    head = TensorSpec("lm_head.weight", (512, 64), "float16", "head")
    config = config_of("llama", SMALL)
    assert spec_from_tensors(config, "m", [embedding]).is_tied
    assert not spec_from_tensors(config, "m", [embedding, head]).is_tied
    tied = spec_from_tensors({**config, "tie_word_embeddings": True}, "m", [embedding, head])
    assert (tied.is_tied, tied.num_params, tied.dtype) == (True, 512 * 64, "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"model_type": "starfish"}, "give a checkpoint with weights; its headers tell the shapes"),
        ({"model_type": None}, "give a checkpoint with weights"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2}, "attention heads"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"num_hidden_layers": 10**7}, "layers"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_config({**config_of("llama", SMALL), **change}, "bad")


def test_a_config_that_is_no_object() -> None:
    with pytest.raises(CheckpointError, match="JSON object"):
        base_fields([])  # type: ignore[arg-type]


def test_no_tensors() -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        spec_from_tensors(config_of("llama", SMALL), "m", [])


def _built_by_transformers(model_type: str, fields: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], bool]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(model_type, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    is_tied = bool(config.tie_word_embeddings)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not (is_tied and name == "lm_head.weight")}, is_tied
