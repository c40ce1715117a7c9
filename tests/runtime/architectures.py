"""Small random models of other architectures than Llama, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.conftest import save_byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from packlight.runtime.kv_cache import argument_name

_SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}
_LLAMA_LIKE = {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.1}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 8}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE),  # biases on queries, keys and values
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE, head_dim=16),  # norms on queries and keys
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, sliding_window=8),
    # a window, soft caps and scaled embeddings
    "gemma2": lambda: Gemma2Config(**_GEMMA, query_pre_attn_scalar=16, final_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": lambda: Phi3Config(**_LLAMA_LIKE, sliding_window=None, original_max_position_embeddings=128),  # fused qkv
    # positions are learned, norms have biases, drop-out is on in training
    "opt": lambda: OPTConfig(**_SMALL, ffn_dim=128, word_embed_proj_dim=64, init_std=0.1),
}
RENAMED: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL, intermediate_size=128, initializer_range=0.1),
}
"""transformers stores their tensors under other names than it gives its modules."""
CONV1D: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
        dtype="float32",
    ),
}
"""Their matrices lie the other way round."""

ALL = {**CONFIGS, **RENAMED, **CONV1D}


def save_architecture(name: str, directory: Path) -> None:
    """A random float32 model with a byte tokenizer; norms and biases are random too, so that a lost one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ALL[name](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(directory)
    save_byte_tokenizer(directory)


def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, **options: Any) -> torch.Tensor:
    """Logits of new tokens behind those in the cache."""
    logits: torch.Tensor = model(ids, use_cache=True, **{argument_name(model): cache}, **options).logits
    return logits
