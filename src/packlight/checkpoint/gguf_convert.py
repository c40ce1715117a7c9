"""A GGUF file as a Hugging Face checkpoint: its config, its tensors' names and shapes, its weights. No torch.

Quantized tensors are de-quantized exactly, in float32; a file without any keeps its types. The key names of the
metadata are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.checkpoint.ggml import Array, dequantize
from packlight.checkpoint.gguf import GgufHeader, GgufTensor, read_gguf
from packlight.checkpoint.rotary import half_split_rows, rope_parameters
from packlight.checkpoint.shards import write_shards
from packlight.checkpoint.tokenizer import write_gguf_tokenizer
from packlight.errors import CheckpointError

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever the same file would convert to other bytes."""


@dataclass(frozen=True)
class _Family:
    """How a GGUF architecture maps to a transformers class."""

    model_type: str
    class_name: str
    interleaved_rope: bool
    """Whether the rows of q and k are stored in interleaved rotary order and must be put back."""
    qkv_bias: bool
    qk_norm: bool
    default_theta: float


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("llama", "LlamaForCausalLM", True, False, False, 10000.0),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", False, True, False, 10000.0),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", False, False, True, 10000.0),
}


def convert_gguf(path: Path, directory: Path) -> None:
    """Write a GGUF file as a checkpoint directory: weights, config, tokenizer, generation config.

    Raises:
        CheckpointError: damaged, or of an architecture or with a feature that packlight does not convert.
        TargetError: the directory cannot be written.
    """
    header = read_gguf(path)
    config = gguf_config(header)
    tensors = gguf_tensors(header, config)
    layout = gguf_layout(tensors)
    dtypes = {name: dtype for name, dtype, _ in layout}
    write_shards(directory, layout, lambda name: _weights(header, tensors[name], dtypes[name], config))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_gguf_tokenizer(header, directory)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file, from its header alone.

    Raises:
        CheckpointError: an architecture that is not converted, an unknown feature, or sizes that disagree.
    """
    family = _family(header)
    sizes = _sizes(header)
    arch = header.architecture
    theta = shortest(header.get(f"{arch}.rope.freq_base", float, family.default_theta))
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": shortest(header.get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_parameters": rope_parameters(header, theta, sizes["head_dim"]),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": family.model_type == "llama" and "blk.0.attn_q.bias" in header.tensors,
        "dtype": _config_dtype(header),
        **_token_ids(header),
    }
    if family.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    else:
        config["use_sliding_window"] = False
    return config


def gguf_tensors(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """Every tensor by its Hugging Face name, in the file's order of layers.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config implies, or has no place.
    """
    expected = _expected(_family(header), config)
    unknown = set(header.tensors) - {gguf_name for gguf_name, _ in expected.values()} - {"rope_freqs.weight"}
    if unknown:
        raise CheckpointError(
            f"{header.path} holds the tensor {min(unknown)}, which a {header.architecture} model does not have; "
            f"give the original checkpoint directory"
        )
    found = {}
    for name, (gguf_name, shape) in expected.items():
        tensor = header.tensors.get(gguf_name)
        if tensor is None or tensor.shape != shape:
            state = "lacks" if tensor is None else f"gives shape {tensor.shape} to"
            raise CheckpointError(f"{header.path} {state} the tensor {gguf_name}, which must have shape {shape}")
        found[name] = tensor
    return found


def gguf_layout(tensors: Mapping[str, GgufTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the converted tensors: float32 where any is quantized, else the file's own types.

    A float32 norm among float16 matrices keeps its type: exact is better than uniform.
    """
    quantized = any(tensor.type.plain_dtype is None for tensor in tensors.values())
    return [
        (name, "float32" if quantized else tensor.type.plain_dtype or "float32", tensor.shape)
        for name, tensor in tensors.items()
    ]


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))


def _family(header: GgufHeader) -> _Family:
    family = _FAMILIES.get(header.architecture)
    if family is None:
        raise CheckpointError(
            f"{header.path} has the architecture {header.architecture!r}; packlight converts GGUF files of "
            f"{', '.join(_FAMILIES)}: give the original checkpoint directory"
        )
    if header.metadata.get(f"{header.architecture}.expert_count"):
        raise CheckpointError(f"{header.path} is a mixture of experts; give the original checkpoint directory")
    return family


def _sizes(header: GgufHeader) -> dict[str, int]:
    arch = header.architecture
    if "token_embd.weight" not in header.tensors or len(header.tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{header.path} lacks the matrix token_embd.weight; it is not a whole language model")
    hidden = _positive(header, f"{arch}.embedding_length")
    heads = _positive(header, f"{arch}.attention.head_count")
    head_dim = _positive(header, f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (other := _positive(header, key, head_dim)) != head_dim:
            raise CheckpointError(f"{header.path} has {key} {other} with heads {head_dim} wide; they must be equal")
    kv_heads = _positive(header, f"{arch}.attention.head_count_kv", heads)
    if head_dim % 2 or heads % kv_heads:
        raise CheckpointError(f"{header.path} has {heads} heads, {kv_heads} KV heads, {head_dim} wide: they do not fit")
    return {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _positive(header, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _layers(header),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _positive(header, f"{arch}.context_length"),
    }


def _layers(header: GgufHeader) -> int:
    layers = _positive(header, f"{header.architecture}.block_count")
    if layers > len(header.tensors):
        raise CheckpointError(f"{header.path} claims {layers} blocks, but holds only {len(header.tensors)} tensors")
    return layers


def _positive(header: GgufHeader, key: str, default: int | None = None) -> int:
    value: int = header.get(key, int, default)
    if value < 1:
        raise CheckpointError(f"{header.path} gives {key} the value {value}; a positive number is expected")
    return value


def _config_dtype(header: GgufHeader) -> str:
    """The type of the matrices where they agree and none is quantized, else float32."""
    dtypes = {tensor.type.plain_dtype for tensor in header.tensors.values() if len(tensor.shape) > 1}
    only = dtypes.pop() if len(dtypes) == 1 else None
    return only or "float32"


def _token_ids(header: GgufHeader) -> dict[str, int]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    stored = {name: header.metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: value for name, value in stored.items() if type(value) is int}


def _expected(family: _Family, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face name to (GGUF name, shape)."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (vocab, hidden))
    }
    for layer in range(config["num_hidden_layers"]):
        for name, (gguf_name, shape) in _block(family, config).items():
            expected[f"model.layers.{layer}.{name}"] = (f"blk.{layer}.{gguf_name}", shape)
    expected["model.norm.weight"] = ("output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = ("output.weight", (vocab, hidden))
    return expected


def _block(family: _Family, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    matrices = {
        "self_attn.q_proj": ("attn_q", queries, hidden),
        "self_attn.k_proj": ("attn_k", keys, hidden),
        "self_attn.v_proj": ("attn_v", keys, hidden),
        "self_attn.o_proj": ("attn_output", hidden, queries),
        "mlp.gate_proj": ("ffn_gate", inner, hidden),
        "mlp.up_proj": ("ffn_up", inner, hidden),
        "mlp.down_proj": ("ffn_down", hidden, inner),
    }
    block: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (gguf_name, rows, cols) in matrices.items():
        block[f"{name}.weight"] = (f"{gguf_name}.weight", (rows, cols))
        if _has_bias(family, config, name):
            block[f"{name}.bias"] = (f"{gguf_name}.bias", (rows,))
    block["input_layernorm.weight"] = ("attn_norm.weight", (hidden,))
    block["post_attention_layernorm.weight"] = ("ffn_norm.weight", (hidden,))
    if family.qk_norm:
        block["self_attn.q_norm.weight"] = ("attn_q_norm.weight", (head,))
        block["self_attn.k_norm.weight"] = ("attn_k_norm.weight", (head,))
    return block


def _has_bias(family: _Family, config: Mapping[str, Any], name: str) -> bool:
    if name.startswith("mlp"):
        return bool(config.get("mlp_bias"))
    return bool(config["attention_bias"]) or (family.qkv_bias and not name.endswith("o_proj"))


def _weights(header: GgufHeader, tensor: GgufTensor, dtype: str, config: Mapping[str, Any]) -> Array:
    """The bytes to store: float32, or the file's own where its type is kept; rotary rows in half-split order."""
    data = header.read(tensor)
    if tensor.type.plain_dtype == dtype:
        # Numpy has no bfloat16, and moving rows needs only the width of an element.
        values = data.view(np.dtype(f"u{tensor.type.block_bytes}"))
    else:
        values = dequantize(data, tensor.type)
    values = values.reshape(tensor.shape)
    if not _FAMILIES[header.architecture].interleaved_rope:
        return values
    if ".attn_q." in tensor.name:
        return half_split_rows(values, config["num_attention_heads"])
    if ".attn_k." in tensor.name:
        return half_split_rows(values, config["num_key_value_heads"])
    return values
