"""The tiny model that other tests build on is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_model_loads_and_its_tokenizer_round_trips(tiny_model_dir, tied: bool) -> None:
    directory: Path = tiny_model_dir(tied=tied)
    assert tiny_model_dir(tied=tied) == directory
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Größe: 5 × 3, done.\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    logits = model(torch.tensor([tokens])).logits
    assert logits.shape == (1, len(tokens), 256)
    assert logits.std() > 0.1
