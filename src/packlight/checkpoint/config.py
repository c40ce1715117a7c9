"""A model's shape from its `config.json` alone: no weights, no torch, no transformers.

`spec_from_config` writes down every tensor of the families in `families.py`; for any other family the shapes come
from a checkpoint's headers through `spec_from_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packlight.checkpoint.families import DEFAULTS, KNOWN_FAMILIES, LARGEST_FIELD, Fields, family_tensors
from packlight.errors import CheckpointError
from packlight.spec import DTYPE_BYTES, ModelSpec, Precision, TensorKind, TensorSpec

DEFAULT_DTYPE = "float32"
"""What transformers loads and saves where a config names no dtype."""
DEFAULT_CONTEXT = 2048
"""For models without position embeddings (ALiBi) whose config names no length."""

_MOST_LAYERS = 10_000

# The names that families give to one thing, most common first.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    "vocab_size": ("vocab_size",),
    "max_context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}


@dataclass(frozen=True)
class BaseFields:
    """The numbers that every causal language model has, whatever its family calls them."""

    architecture: str
    model_type: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    is_tied: bool
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    sliding_window: int | None
    num_sliding_layers: int
    num_experts: int | None
    experts_per_token: int | None


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """A spec with every tensor of a dense checkpoint, under transformers' names.

    Tensors take the config's `dtype` (`torch_dtype` in older files), float32 where it has none. A tied head is left
    out, as it is in the file. Mixtures list fused expert stacks, as transformers 5 holds them.

    Raises:
        CheckpointError: no `architectures`, an unknown family, or a number that is missing or out of range.
    """
    base, text = base_fields(config), _text_config(config)
    if base.model_type not in KNOWN_FAMILIES:
        raise CheckpointError(
            f"{name}: the shapes of model_type {base.model_type!r} cannot be told from a config alone: "
            "give a checkpoint with weights; its headers tell the shapes"
        )
    shapes = family_tensors(_fields(base, text))
    tensors = [TensorSpec(t, shape, dtype or base.dtype, classify(t, shape)) for t, shape, dtype in shapes]
    return spec_from_tensors(config, name, tensors)


def spec_from_tensors(
    config: Mapping[str, Any], name: str, tensors: Sequence[TensorSpec], stored: Precision | None = None
) -> ModelSpec:
    """A spec from a config and the logical, dense tensors that a checkpoint's headers list.

    A checkpoint that stores no head is tied, whatever its config says; one that stores both a head and an embedding
    of the same shape while its config ties them counts the head once.

    Raises:
        CheckpointError: no `architectures`, no tensors, or a number that is missing or out of range.
    """
    if not tensors:
        raise CheckpointError(f"{name} holds no tensors: give a checkpoint with weights")
    base = base_fields(config)
    kept = _without_tied_head(tensors) if base.is_tied else list(tensors)
    is_tied = not any(tensor.kind == "head" for tensor in kept)
    fields = {key: value for key, value in vars(base).items() if key != "is_tied"}
    spec = ModelSpec(name=name, tensors=tuple(kept), is_tied=is_tied, stored=stored, **fields)
    return replace(spec, dtype=_main_dtype(kept) or spec.dtype)


def base_fields(config: Mapping[str, Any]) -> BaseFields:
    """The numbers of any family's config; a `text_config` inside a multimodal one is taken.

    Raises:
        CheckpointError: no `architectures`, or a number that is missing or out of range.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError("a config is a JSON object: give the model's config.json")
    architecture, text = _architecture(config), _text_config(config)
    model_type = str(text.get("model_type") or "")
    defaults = DEFAULTS.get(model_type, {})
    hidden, heads = _number(text, "hidden_size"), _number(text, "num_heads")
    layers = _number(text, "num_layers")
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"the config's number of layers is {layers}; at most {_MOST_LAYERS} are read")
    window, num_sliding = _sliding(text, model_type, layers)
    latent = _optional(text, "kv_lora_rank") or defaults.get("kv_lora_rank")
    return BaseFields(
        architecture=architecture,
        model_type=model_type,
        dtype=_dtype(config, text),
        hidden_size=hidden,
        intermediate_size=_intermediate(text, hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(text, model_type, heads),
        head_dim=_head_dim(text, defaults, hidden, heads, latent is not None),
        vocab_size=_number(text, "vocab_size"),
        max_context=_optional(text, *_ALIASES["max_context"]) or DEFAULT_CONTEXT,
        is_tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", defaults.get("tied", False)))),
        kv_lora_rank=latent,
        qk_rope_head_dim=(_optional(text, "qk_rope_head_dim") or 64) if latent else None,
        sliding_window=window,
        num_sliding_layers=num_sliding,
        num_experts=_optional(text, *_ALIASES["num_experts"]),
        experts_per_token=_optional(text, "num_experts_per_tok"),
    )


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values, in the `text_config` of a multimodal one.

    Args:
        changes: by transformers' name of the field, or by that of `BaseFields`: then under each of the family's names
            for it that the config has.
    """
    nested = config.get("text_config")
    text = dict(nested if isinstance(nested, Mapping) else config)
    for field, value in changes.items():
        names = _ALIASES.get(field, (field,))
        text.update(dict.fromkeys([name for name in names if text.get(name) is not None] or names[:1], value))
    return {**config, "text_config": text} if isinstance(nested, Mapping) else text


def classify(name: str, shape: tuple[int, ...]) -> TensorKind:
    """What a tensor is to a quantizer, from its name in a checkpoint and its shape.

    Matrices outside the blocks that are neither embedding nor head (position embeddings, OPT's projections), router
    gates, norms, biases and buffers are `other`: they stay as they are.
    """
    parts = name.removesuffix(".weight").split(".")
    is_in_block = any(part.isdigit() for part in parts[:-1])
    if len(shape) == 3 and "experts" in parts and "bias" not in parts[-1]:
        return "expert"
    if len(shape) != 2 or _LEFT_ALONE.search(parts[-1]):
        return "other"
    if not is_in_block:
        return _outside_blocks(parts[-1])
    return "other" if _is_router(parts) else "linear"


_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding", "embeddings"}
_HEADS = {"lm_head", "embed_out", "output"}
_LEFT_ALONE = re.compile(r"bias|norm|^ln_|inv_freq|(^|_)(wpe|pos|position|positions)(_|$)")
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def _outside_blocks(last: str) -> TensorKind:
    if last in _EMBEDDINGS:
        return "embedding"
    return "head" if last in _HEADS else "other"


def _is_router(parts: Sequence[str]) -> bool:
    return parts[-1] in _ROUTERS or "router" in parts


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise CheckpointError("the config names no `architectures`: give a causal language model's config.json")
    return named[0]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    found = next((c[key] for c in (text, config) for key in ("dtype", "torch_dtype") if c.get(key)), DEFAULT_DTYPE)
    dtype = str(found).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"the config's dtype is {found!r}; known are {', '.join(DTYPE_BYTES)}")
    return dtype


def _optional(text: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that is set, as a positive number; zero is how some configs say 'none'."""
    for key in keys:
        value = text.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_FIELD:
            raise CheckpointError(f"the config's {key} is {value!r}; a whole number up to {LARGEST_FIELD} is needed")
        return value or None
    return None


def _number(text: Mapping[str, Any], field: str) -> int:
    keys = _ALIASES[field]
    value = _optional(text, *keys)
    if value is None:
        value = DEFAULTS.get(str(text.get("model_type")), {}).get(field)
    if value is None:
        raise CheckpointError(f"the config gives no {' or '.join(keys)}: give the model's whole config.json")
    return value


def _intermediate(text: Mapping[str, Any], hidden: int) -> int:
    return _optional(text, *_ALIASES["intermediate_size"]) or 4 * hidden


def _kv_heads(text: Mapping[str, Any], model_type: str, heads: int) -> int:
    """Heads that are cached. Falcon's new architecture broadcasts its keys to all heads before it caches them."""
    if model_type == "falcon":
        return 1 if text.get("multi_query", True) and not text.get("new_decoder_architecture") else heads
    if model_type == "gpt_bigcode":
        return 1 if text.get("multi_query", True) else heads
    keys = _ALIASES["num_kv_heads"]
    is_left_out = not any(key in text for key in keys)  # an explicit null means as many as there are queries
    default = DEFAULTS.get(model_type, {}).get("num_kv_heads", heads)
    return _optional(text, *keys) or (default if is_left_out else heads)


def _head_dim(text: Mapping[str, Any], defaults: Mapping[str, int], hidden: int, heads: int, is_latent: bool) -> int:
    if is_latent:
        return (_optional(text, "qk_nope_head_dim") or 128) + (_optional(text, "qk_rope_head_dim") or 64)
    head_dim = _optional(text, "head_dim") or defaults.get("head_dim") or hidden // heads
    if head_dim < 1:
        raise CheckpointError(f"the config has {heads} attention heads for a hidden size of {hidden}")
    return head_dim


def _sliding(text: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, int]:
    """The window and how many layers have one, as transformers reads the family's config."""
    window = _optional(text, "sliding_window") if text.get("use_sliding_window", True) else None
    if window is None or ("use_sliding_window" not in text and model_type in _WINDOW_ON_REQUEST):
        return None, 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        num_sliding = kinds.count("sliding_attention")
    elif model_type == "gemma2":
        num_sliding = (layers + 1) // 2
    elif model_type == "gemma3_text":
        num_sliding = layers - layers // (_optional(text, "sliding_window_pattern") or 6)
    elif model_type in _WINDOW_ON_REQUEST:
        num_sliding = max(0, layers - (_optional(text, "max_window_layers") or 0))
    else:
        num_sliding = layers
    return (window, num_sliding) if num_sliding else (None, 0)


_WINDOW_ON_REQUEST = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")


def _fields(base: BaseFields, text: Mapping[str, Any]) -> Fields:
    return Fields(
        model_type=base.model_type,
        hidden=base.hidden_size,
        inner=base.intermediate_size,
        layers=base.num_layers,
        heads=base.num_heads,
        kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        vocab=base.vocab_size,
        positions=base.max_context,
        is_tied=base.is_tied,
        num_experts=base.num_experts or 0,
        text=text,
    )


def _without_tied_head(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    embeddings = {tensor.shape for tensor in tensors if tensor.kind == "embedding"}
    return [tensor for tensor in tensors if tensor.kind != "head" or tensor.shape not in embeddings]


def _main_dtype(tensors: Sequence[TensorSpec]) -> str | None:
    """The float dtype of most parameters: headers know better than a config."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype.startswith(("float", "bfloat")):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)
