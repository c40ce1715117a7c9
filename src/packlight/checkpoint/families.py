"""The tensors of the known model families, by name and shape, as transformers 5 names them.

Each family is one function from its numbers to `(name, shape, dtype or None)`; the tests build every family with
transformers on the meta device and compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packlight.errors import CheckpointError

LARGEST_FIELD = 10**8

Tensor = tuple[str, tuple[int, ...], str | None]

# What transformers fills in where a config.json leaves a field out.
_GEMMA = {"tied": 1, "head_dim": 256}
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "gemma": {**_GEMMA, "num_kv_heads": 16},
    "gemma2": {**_GEMMA, "num_kv_heads": 4},
    "gemma3_text": {**_GEMMA, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 262_208},
    "mistral": {"num_kv_heads": 8},
    "mixtral": {"num_kv_heads": 8},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_kv_heads": 4},
    "smollm3": {"tied": 1, "num_kv_heads": 4},
    "gpt2": {"tied": 1},
    "gpt_bigcode": {"tied": 1},
    "opt": {"tied": 1},
    "bloom": {"tied": 1},
    "falcon": {"tied": 1},
    "mpt": {"tied": 1},
    "deepseek_v2": {"kv_lora_rank": 512},
    "deepseek_v3": {"kv_lora_rank": 512},
}


@dataclass(frozen=True)
class Fields:
    """The numbers of one config, under one set of names; `text` is the config itself for what only one family has."""

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    is_tied: bool
    num_experts: int
    text: Mapping[str, Any]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.text.get(key)
        return default if value is None else bool(value)

    def size(self, key: str, default: int) -> int:
        value = self.text.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or not 0 <= value <= LARGEST_FIELD:
            raise CheckpointError(f"the config's {key} is {value!r}; a whole number up to {LARGEST_FIELD} is needed")
        return value


def family_tensors(f: Fields) -> list[Tensor]:
    """Every tensor of a dense checkpoint of `f.model_type`, which is one of `KNOWN_FAMILIES`."""
    tensors = list(_FAMILIES[f.model_type](f))
    if not f.is_tied:
        tensors.append(("lm_head.weight", (f.vocab, f.size("word_embed_proj_dim", f.hidden)), None))
    return tensors


def _linear(name: str, out: int, in_: int, bias: bool = False) -> Iterator[Tensor]:
    yield f"{name}.weight", (out, in_), None
    if bias:
        yield f"{name}.bias", (out,), None


def _norm(name: str, width: int, bias: bool = False) -> Iterator[Tensor]:
    yield f"{name}.weight", (width,), None
    if bias:
        yield f"{name}.bias", (width,), None


def _llama_like(f: Fields) -> Iterator[Tensor]:
    """Llama and the families that differ from it in biases, norms, fused matrices or a mixture."""
    yield "model.embed_tokens.weight", (f.vocab, f.hidden), None
    for layer in range(f.layers):
        block = f"model.layers.{layer}"
        yield from _latent_attention(f, block) if f.model_type in _LATENT else _attention(f, block)
        yield from _mixture(f, block) if _is_mixture(f, layer) else _gated_mlp(f, f"{block}.mlp", f.inner)
        for norm in _BLOCK_NORMS.get(f.model_type, ("input_layernorm", "post_attention_layernorm")):
            yield from _norm(f"{block}.{norm}", f.hidden)
    yield from _norm("model.norm", f.hidden)


_LATENT = ("deepseek_v2", "deepseek_v3")
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_BLOCK_NORMS = {
    "gemma2": _FOUR_NORMS,
    "gemma3_text": _FOUR_NORMS,
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_BIAS_BY_CONFIG = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite", "qwen3_moe")


def _attention(f: Fields, block: str) -> Iterator[Tensor]:
    attention, queries, keys = f"{block}.self_attn", f.heads * f.head_dim, f.kv_heads * f.head_dim
    out_bias = f.model_type in _BIAS_BY_CONFIG and f.flag("attention_bias")
    bias = out_bias or f.model_type == "qwen2" or (f.model_type == "qwen2_moe" and f.flag("qkv_bias", True))
    if f.model_type == "phi3":
        yield from _linear(f"{attention}.qkv_proj", queries + 2 * keys, f.hidden)
    else:
        yield from _linear(f"{attention}.q_proj", queries, f.hidden, bias)
        yield from _linear(f"{attention}.k_proj", keys, f.hidden, bias)
        yield from _linear(f"{attention}.v_proj", keys, f.hidden, bias)
    yield from _linear(f"{attention}.o_proj", f.hidden, queries, out_bias)
    if f.model_type in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"):
        is_per_head = f.model_type != "olmo2"
        yield from _norm(f"{attention}.q_norm", f.head_dim if is_per_head else queries)
        yield from _norm(f"{attention}.k_norm", f.head_dim if is_per_head else keys)


def _latent_attention(f: Fields, block: str) -> Iterator[Tensor]:
    """DeepSeek-V2, arXiv 2405.04434, section 2.1: keys and values go through one latent, queries may."""
    attention, bias = f"{block}.self_attn", f.flag("attention_bias")
    latent, rope = f.size("kv_lora_rank", 512), f.size("qk_rope_head_dim", 64)
    nope, value = f.size("qk_nope_head_dim", 128), f.size("v_head_dim", 128)
    # An explicit null means no query latent; an absent field means transformers' 1536.
    query_latent = f.size("q_lora_rank", 0 if "q_lora_rank" in f.text else 1536)
    if not query_latent:
        yield from _linear(f"{attention}.q_proj", f.heads * (nope + rope), f.hidden)
    else:
        yield from _linear(f"{attention}.q_a_proj", query_latent, f.hidden, bias)
        yield from _norm(f"{attention}.q_a_layernorm", query_latent)
        yield from _linear(f"{attention}.q_b_proj", f.heads * (nope + rope), query_latent)
    yield from _linear(f"{attention}.kv_a_proj_with_mqa", latent + rope, f.hidden, bias)
    yield from _norm(f"{attention}.kv_a_layernorm", latent)
    yield from _linear(f"{attention}.kv_b_proj", f.heads * (nope + value), latent)
    yield from _linear(f"{attention}.o_proj", f.hidden, f.heads * value, bias)


def _gated_mlp(f: Fields, mlp: str, inner: int) -> Iterator[Tensor]:
    bias = f.model_type in ("llama", "granite", "smollm3", "deepseek_v2") and f.flag("mlp_bias")
    if f.model_type == "phi3":
        yield from _linear(f"{mlp}.gate_up_proj", 2 * inner, f.hidden)
    else:
        yield from _linear(f"{mlp}.gate_proj", inner, f.hidden, bias)
        yield from _linear(f"{mlp}.up_proj", inner, f.hidden, bias)
    yield from _linear(f"{mlp}.down_proj", f.hidden, inner, bias)


def _is_mixture(f: Fields, layer: int) -> bool:
    if f.model_type == "mixtral":
        return True
    if f.model_type in _LATENT:
        return layer >= f.size("first_k_dense_replace", 0 if f.model_type == "deepseek_v2" else 3)
    if f.model_type in ("qwen2_moe", "qwen3_moe"):
        named = f.text.get("mlp_only_layers")
        dense = named if isinstance(named, list) else []
        return f.num_experts > 0 and layer not in dense and (layer + 1) % max(1, f.size("decoder_sparse_step", 1)) == 0
    return False


def _mixture(f: Fields, block: str) -> Iterator[Tensor]:
    mlp, inner = f"{block}.mlp", f.inner
    if f.model_type != "mixtral":
        inner = f.size("moe_intermediate_size", f.inner)
    yield from _linear(f"{mlp}.gate", f.num_experts, f.hidden)
    if f.model_type == "deepseek_v3":
        yield f"{mlp}.gate.e_score_correction_bias", (f.num_experts,), "float32"
    yield f"{mlp}.experts.gate_up_proj", (f.num_experts, 2 * inner, f.hidden), None
    yield f"{mlp}.experts.down_proj", (f.num_experts, f.hidden, inner), None
    if f.model_type == "qwen2_moe":
        yield from _gated_mlp(f, f"{mlp}.shared_expert", f.size("shared_expert_intermediate_size", 5632))
        yield from _linear(f"{mlp}.shared_expert_gate", 1, f.hidden)
    if f.model_type in _LATENT:
        shared = f.size("n_shared_experts", 2 if f.model_type == "deepseek_v2" else 1)
        yield from _gated_mlp(f, f"{mlp}.shared_experts", shared * inner)


def _gpt2(f: Fields) -> Iterator[Tensor]:
    """GPT-2, whose Conv1D matrices lie (in, out), and GPT-BigCode (StarCoder), whose linears lie (out, in)."""
    is_conv = f.model_type == "gpt2"

    def matrix(name: str, out: int, in_: int) -> Iterator[Tensor]:
        yield f"{name}.weight", (in_, out) if is_conv else (out, in_), None
        yield f"{name}.bias", (out,), None

    yield "transformer.wte.weight", (f.vocab, f.hidden), None
    yield "transformer.wpe.weight", (f.positions, f.hidden), None
    for layer in range(f.layers):
        block = f"transformer.h.{layer}"
        yield from _norm(f"{block}.ln_1", f.hidden, bias=True)
        yield from matrix(f"{block}.attn.c_attn", f.hidden + 2 * f.kv_heads * f.head_dim, f.hidden)
        yield from matrix(f"{block}.attn.c_proj", f.hidden, f.hidden)
        yield from _norm(f"{block}.ln_2", f.hidden, bias=True)
        yield from matrix(f"{block}.mlp.c_fc", f.inner, f.hidden)
        yield from matrix(f"{block}.mlp.c_proj", f.hidden, f.inner)
    yield from _norm("transformer.ln_f", f.hidden, bias=True)


def _gpt_neox(f: Fields) -> Iterator[Tensor]:
    bias = f.flag("attention_bias", True)
    yield "gpt_neox.embed_in.weight", (f.vocab, f.hidden), None
    for layer in range(f.layers):
        block = f"gpt_neox.layers.{layer}"
        yield from _norm(f"{block}.input_layernorm", f.hidden, bias=True)
        yield from _norm(f"{block}.post_attention_layernorm", f.hidden, bias=True)
        yield from _linear(f"{block}.attention.query_key_value", 3 * f.hidden, f.hidden, bias)
        yield from _linear(f"{block}.attention.dense", f.hidden, f.hidden, bias)
        yield from _linear(f"{block}.mlp.dense_h_to_4h", f.inner, f.hidden, True)
        yield from _linear(f"{block}.mlp.dense_4h_to_h", f.hidden, f.inner, True)
    yield from _norm("gpt_neox.final_layer_norm", f.hidden, bias=True)


def _opt(f: Fields) -> Iterator[Tensor]:
    decoder, bias = "model.decoder", f.flag("enable_bias", True)
    has_affine, width = f.flag("layer_norm_elementwise_affine", True), f.size("word_embed_proj_dim", f.hidden)
    yield f"{decoder}.embed_tokens.weight", (f.vocab, width), None
    yield f"{decoder}.embed_positions.weight", (f.positions + 2, f.hidden), None  # the first two are never used
    if width != f.hidden:
        yield from _linear(f"{decoder}.project_out", width, f.hidden)
        yield from _linear(f"{decoder}.project_in", f.hidden, width)
    for layer in range(f.layers):
        block = f"{decoder}.layers.{layer}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{block}.self_attn.{projection}", f.hidden, f.hidden, bias)
        yield from _linear(f"{block}.fc1", f.inner, f.hidden, bias)
        yield from _linear(f"{block}.fc2", f.hidden, f.inner, bias)
        if has_affine:
            yield from _norm(f"{block}.self_attn_layer_norm", f.hidden, bias=True)
            yield from _norm(f"{block}.final_layer_norm", f.hidden, bias=True)
    if has_affine and f.flag("do_layer_norm_before", True) and not f.flag("_remove_final_layer_norm"):
        yield from _norm(f"{decoder}.final_layer_norm", f.hidden, bias=True)


def _bloom(f: Fields) -> Iterator[Tensor]:
    yield "transformer.word_embeddings.weight", (f.vocab, f.hidden), None
    yield from _norm("transformer.word_embeddings_layernorm", f.hidden, bias=True)
    for layer in range(f.layers):
        block = f"transformer.h.{layer}"
        yield from _norm(f"{block}.input_layernorm", f.hidden, bias=True)
        yield from _norm(f"{block}.post_attention_layernorm", f.hidden, bias=True)
        yield from _linear(f"{block}.self_attention.query_key_value", 3 * f.hidden, f.hidden, True)
        yield from _linear(f"{block}.self_attention.dense", f.hidden, f.hidden, True)
        yield from _linear(f"{block}.mlp.dense_h_to_4h", 4 * f.hidden, f.hidden, True)
        yield from _linear(f"{block}.mlp.dense_4h_to_h", f.hidden, 4 * f.hidden, True)
    yield from _norm("transformer.ln_f", f.hidden, bias=True)


def _falcon(f: Fields) -> Iterator[Tensor]:
    bias, is_new = f.flag("bias"), f.flag("new_decoder_architecture")
    kv_heads = f.size("num_kv_heads", f.heads) if is_new else f.kv_heads
    yield "transformer.word_embeddings.weight", (f.vocab, f.hidden), None
    for layer in range(f.layers):
        block = f"transformer.h.{layer}"
        out = (f.heads + 2 * kv_heads) * f.head_dim
        yield from _linear(f"{block}.self_attention.query_key_value", out, f.hidden, bias)
        yield from _linear(f"{block}.self_attention.dense", f.hidden, f.hidden, bias)
        yield from _linear(f"{block}.mlp.dense_h_to_4h", f.inner, f.hidden, bias)
        yield from _linear(f"{block}.mlp.dense_4h_to_h", f.hidden, f.inner, bias)
        for norm in _falcon_norms(f, is_new):
            yield from _norm(f"{block}.{norm}", f.hidden, bias=True)
    yield from _norm("transformer.ln_f", f.hidden, bias=True)


def _falcon_norms(f: Fields, is_new: bool) -> tuple[str, ...]:
    if not f.flag("parallel_attn", True):
        return "input_layernorm", "post_attention_layernorm"
    return ("ln_attn", "ln_mlp") if f.size("num_ln_in_parallel_attn", 2 if is_new else 1) == 2 else ("input_layernorm",)


def _mpt(f: Fields) -> Iterator[Tensor]:
    yield "transformer.wte.weight", (f.vocab, f.hidden), None
    for layer in range(f.layers):
        block = f"transformer.blocks.{layer}"
        yield from _norm(f"{block}.norm_1", f.hidden)
        yield from _linear(f"{block}.attn.Wqkv", 3 * f.hidden, f.hidden)
        yield from _linear(f"{block}.attn.out_proj", f.hidden, f.hidden)
        yield from _norm(f"{block}.norm_2", f.hidden)
        yield from _linear(f"{block}.ffn.up_proj", 4 * f.hidden, f.hidden)
        yield from _linear(f"{block}.ffn.down_proj", f.hidden, 4 * f.hidden)
    yield from _norm("transformer.norm_f", f.hidden)


_LLAMA_LIKE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
)
_FAMILIES: Mapping[str, Callable[[Fields], Iterator[Tensor]]] = {
    **dict.fromkeys(_LLAMA_LIKE, _llama_like),
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": _mpt,
}
KNOWN_FAMILIES = frozenset(_FAMILIES)
