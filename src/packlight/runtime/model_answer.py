"""A model by name, with its tokenizer, and a decoder for it as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.tensors import check_architecture
from packlight.plan.attention import AUTO
from packlight.runtime.answer import Engine
from packlight.runtime.attention import set_backend
from packlight.runtime.bitsandbytes import check_loader, load_with
from packlight.runtime.compiled import CompiledDecoder
from packlight.runtime.complete import capacity_for
from packlight.runtime.decoder import Decoder
from packlight.runtime.fixed_shapes import Shapes
from packlight.runtime.loader import split_loader
from packlight.runtime.model_decoder import CachedDecoder, UncachedDecoder
from packlight.runtime.sampling import Sampling
from packlight.runtime.tokenizer import load_tokenizer, stop_ids

COMPILED_CHUNK = 128
"""Tokens of a prompt that a compiled model computes at once."""


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model, its tokenizer, and the tokens that end an answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]

    def decoder(self, prompts: Sequence[list[int]], sampling: Sampling, engine: Engine) -> Decoder:
        """A decoder with room for these prompts and their answers.

        Raises:
            UsageError: a prompt does not fit the model's context, or a choice does not fit the model.
            MissingExtraError: the package of the attention backend is absent.
        """
        capacity = capacity_for(self.model.config, prompts, sampling)
        if engine.is_compiled:
            return CompiledDecoder(self.model, Shapes(len(prompts), capacity, min(COMPILED_CHUNK, capacity)))
        if engine.attention != AUTO:
            set_backend(self.model, engine.attention)
        if engine.kv_cache is None:
            return UncachedDecoder(self.model)
        return CachedDecoder(self.model, capacity, engine.kv_cache, engine.window)


def open_model(name: str, device: str = "cpu") -> OpenedModel:
    """Anything `open_checkpoint` takes, with or without a loader behind it (`demo@bnb-nf4`).

    Raises:
        UsageError: bad input.
        MissingExtraError: the loader's library is absent.
    """
    source, loader = split_loader(name)
    checkpoint = open_checkpoint(source)
    check_architecture(checkpoint.config)
    check_loader(checkpoint, loader)
    tokenizer = load_tokenizer(checkpoint)
    model = load_with(checkpoint, loader, device=device)
    return OpenedModel(model, tokenizer, stop_ids(model, tokenizer))
