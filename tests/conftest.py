"""What all tests share: the real data, the demo model and a tiny random one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Tests must not depend on what a hub answers; the tokenizers' threads do not survive a fork, and say so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data, for tests marked `data`; they are skipped where it is absent."""
    directory = Path(os.environ.get("PACKLIGHT_DATA", ROOT.parent / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip(f"no real data in {directory}: set PACKLIGHT_DATA to a directory that has it")
    return directory


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The demo model as a Hugging Face directory, fetched and converted once into the cache."""
    from packlight.checkpoint.open import resolve

    return Path(resolve("demo"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model_dir(tied=True)`: a random Llama of two layers in float32 with a byte-level tokenizer.

    The same directory is handed out to every test that asks: copy it before changing a file.
    """
    made: dict[bool, Path] = {}

    def make(*, tied: bool = False) -> Path:
        if tied not in made:
            made[tied] = tmp_path_factory.mktemp("tied" if tied else "untied") / "tiny"
            save_tiny_model(made[tied], tied=tied)
        return made[tied]

    return make


def save_tiny_model(directory: Path, *, tied: bool) -> None:
    """Write the tiny model: hidden 64, 2 layers, 4 heads over 2 key-value heads, 256 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # large enough that the logits of different tokens differ clearly
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    save_byte_tokenizer(directory)


def save_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token per byte; the zero byte begins, ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [byte_character(byte) for byte in range(256)]
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    zero = characters[0]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=zero, eos_token=zero, pad_token=zero, model_max_length=256
    ).save_pretrained(directory)


def byte_character(byte: int) -> str:
    """The printable character that byte-level tokenizers since GPT-2 write for a byte."""
    if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
        return chr(byte)
    unprintable = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + unprintable.index(byte))
