"""llama2.c files (version 0: float32, 28-byte header) as Hugging Face Llama checkpoints. No torch.

Format: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), a negative vocab_size for
a head of its own, then the weights (https://github.com/karpathy/llama2.c, run.c, `memory_map_weights`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.checkpoint.ggml import Array
from packlight.checkpoint.rotary import half_split_rows
from packlight.checkpoint.shards import write_shards
from packlight.checkpoint.tokenizer import write_llama2c_tokenizer
from packlight.errors import CheckpointError

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever the same file would convert to other bytes."""

_HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
# (Hugging Face name, field of Llama2cHeader.blocks) of one block, in the order in which a block is used.
_BLOCK = (
    ("self_attn.q_proj.weight", "wq"),
    ("self_attn.k_proj.weight", "wk"),
    ("self_attn.v_proj.weight", "wv"),
    ("self_attn.o_proj.weight", "wo"),
    ("mlp.gate_proj.weight", "w1"),
    ("mlp.up_proj.weight", "w3"),
    ("mlp.down_proj.weight", "w2"),
    ("input_layernorm.weight", "rms_att"),
    ("post_attention_layernorm.weight", "rms_ffn"),
)


@dataclass(frozen=True)
class Llama2cHeader:
    """The numbers of a llama2.c file and what follows from them."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    is_tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def sections(self) -> dict[str, tuple[int, ...]]:
        """Shape of every part of the file in its order; those of blocks hold all layers, (layers, ...)."""
        layers, dim, inner, kv_dim = self.n_layers, self.dim, self.hidden_dim, self.n_kv_heads * self.head_dim
        sections: dict[str, tuple[int, ...]] = {
            "token_embedding": (self.vocab_size, dim),
            "rms_att": (layers, dim),
            "wq": (layers, dim, dim),
            "wk": (layers, kv_dim, dim),
            "wv": (layers, kv_dim, dim),
            "wo": (layers, dim, dim),
            "rms_ffn": (layers, dim),
            "w1": (layers, inner, dim),
            "w2": (layers, dim, inner),
            "w3": (layers, inner, dim),
            "rms_final": (dim,),
            "freq_cis": (2, self.seq_len, self.head_dim // 2),
        }
        return sections if self.is_tied else {**sections, "wcls": (self.vocab_size, dim)}


def read_llama2c(path: Path) -> Llama2cHeader:
    """The header of a llama2.c version 0 file.

    Raises:
        CheckpointError: pickled weights, numbers that make no model, or another size than they imply.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            raw = stream.read(_HEADER.size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if len(raw) < _HEADER.size:
        raise CheckpointError(
            f"{path} is truncated: a llama2.c file has at least {_HEADER.size} bytes, this has {size}"
        )
    numbers = dict(zip(_FIELDS, _HEADER.unpack(raw), strict=True))
    is_tied, numbers["vocab_size"] = numbers["vocab_size"] > 0, abs(numbers["vocab_size"])
    header = Llama2cHeader(**numbers, is_tied=is_tied)
    _check_numbers(path, header, numbers)
    expected = _HEADER.size + 4 * sum(int(np.prod(shape, dtype=object)) for shape in header.sections.values())
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, but its llama2.c header describes {expected}: "
            f"it is {'truncated' if size < expected else 'too long or another version'}; download it again"
        )
    return header


def convert_llama2c(path: Path, directory: Path) -> None:
    """Write a llama2.c file, and the tokenizer beside it, as a float32 checkpoint directory.

    Raises:
        CheckpointError: damaged, or no tokenizer of its size lies beside it.
        TargetError: the directory cannot be written.
    """
    header = read_llama2c(path)
    tokenizer = find_tokenizer(path)
    places = _places(header)
    layout = [(name, "float32", shape) for name, (_, shape) in places.items()]
    write_shards(directory, layout, lambda name: _weights(path, header, name, *places[name]))
    config = json.dumps(llama2c_config(header), indent=2) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
    write_llama2c_tokenizer(tokenizer, header.vocab_size, directory)


def llama2c_config(header: Llama2cHeader) -> dict[str, Any]:
    """The `config.json` of a llama2.c model; epsilon and theta are constants of run.c."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.vocab_size,
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "head_dim": header.head_dim,
        "max_position_embeddings": header.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": header.is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def find_tokenizer(path: Path) -> Path:
    """The vocabulary beside a model: `tokenizer.bin`, else the only `tok*.bin`.

    Raises:
        CheckpointError: none, or several.
    """
    usual = path.parent / "tokenizer.bin"
    if usual.is_file():
        return usual
    found = sorted(other for other in path.parent.glob("tok*.bin") if other != path)
    if len(found) != 1:
        raise CheckpointError(f"{path} has {len(found) or 'no'} tok*.bin beside it; put its tokenizer.bin there")
    return found[0]


def _check_numbers(path: Path, header: Llama2cHeader, numbers: Mapping[str, int]) -> None:
    if min(numbers.values()) < 1:
        raise CheckpointError(f"{path} is not a llama2.c version 0 file: its header holds {tuple(numbers.values())}")
    if header.dim % header.n_heads or header.n_heads % header.n_kv_heads or header.head_dim % 2:
        raise CheckpointError(
            f"{path} has {header.n_heads} heads, {header.n_kv_heads} KV heads and width {header.dim}: they do not fit"
        )
    if header.vocab_size < 259:  # three special tokens and one for each byte
        raise CheckpointError(f"{path} has {header.vocab_size} tokens; llama2.c vocabularies have at least 259")


def _places(header: Llama2cHeader) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Hugging Face name to (offset in bytes, shape)."""
    starts, at = {}, _HEADER.size
    for section, shape in header.sections.items():
        starts[section] = at
        at += 4 * int(np.prod(shape))
    sections = header.sections
    places = {"model.embed_tokens.weight": (starts["token_embedding"], sections["token_embedding"])}
    for layer in range(header.n_layers):
        for name, section in _BLOCK:
            shape = sections[section][1:]
            places[f"model.layers.{layer}.{name}"] = (starts[section] + 4 * layer * int(np.prod(shape)), shape)
    places["model.norm.weight"] = (starts["rms_final"], sections["rms_final"])
    if not header.is_tied:
        places["lm_head.weight"] = (starts["wcls"], sections["wcls"])
    return places


def _weights(path: Path, header: Llama2cHeader, name: str, offset: int, shape: tuple[int, ...]) -> Array:
    values = np.fromfile(path, dtype="<f4", count=int(np.prod(shape)), offset=offset).reshape(shape)
    if name.endswith("q_proj.weight"):
        return half_split_rows(values, header.n_heads)
    if name.endswith("k_proj.weight"):
        return half_split_rows(values, header.n_kv_heads)
    return values
