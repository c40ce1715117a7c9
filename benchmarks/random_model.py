"""A random Llama in the shape of SmolLM2-135M with a byte tokenizer, for machines that cannot fetch a model.

    python benchmarks/random_model.py OUT

What is measured of time and memory does not depend on the values of the weights. The context is 16,384 tokens, for the
studies of long texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 16_384


def main() -> None:
    out = Path(sys.argv[1])
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tokenizer = Tokenizer(models.BPE(vocab={each: place for place, each in enumerate(_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT).save_pretrained(out)


def _characters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


if __name__ == "__main__":
    main()
