"""From a model's name and prompts to text, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.tensors import check_architecture
from packlight.errors import UsageError
from packlight.plan.kv_cache import KVCacheKind
from packlight.runtime.bitsandbytes import check_loader, load_with, split_loader
from packlight.runtime.complete import capacity_for
from packlight.runtime.decoder import Decoder
from packlight.runtime.generate import generate
from packlight.runtime.kv_cache import held_bytes
from packlight.runtime.model_decoder import CachedDecoder, UncachedDecoder
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.text import TextStream
from packlight.runtime.tokenizer import load_tokenizer, prompt_ids, raw_ids, stop_ids


@dataclass(frozen=True)
class Remembering:
    """What is kept of earlier tokens.

    Args:
        kind: of the KV cache; None computes every token again at each step.
        window: tokens that a sliding cache keeps.

    Raises:
        UsageError: a window without a sliding cache.
    """

    kind: KVCacheKind | None = "static"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.kind != "sliding":
            raise UsageError("a window belongs to the sliding KV cache: choose that kind, or leave the window out")


@dataclass
class Answer:
    """One answer while it is made.

    `finish_reason` is `stop` where the model ended its turn or a stop string came, and `length` where the limit did.
    """

    prompt_ids: list[int]
    limit: int
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    is_stopped: bool = False

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finish_reason(self) -> str:
        return "length" if len(self.tokens) >= self.limit and not self.is_stopped else "stop"


class Conversation:
    """A model, its tokenizer and a decoder, which answers prompts one batch after the other.

    The decoder is kept from one batch to the next, so that what their prompts begin with in common is computed once.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], sampling: Sampling
    ) -> None:
        self.decoder, self.tokenizer, self.stops, self.sampling = decoder, tokenizer, stops, sampling
        self.answers: list[Answer] = []

    def ask(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text) as they are made; `answers` fills at the same time.

        Raises:
            UsageError: a prompt that does not fit.
        """
        streams = [TextStream(self.tokenizer, self.sampling.stop) for _ in prompts]
        self.answers = [Answer(list(prompt), self.sampling.max_tokens) for prompt in prompts]
        pieces: list[str] = [""] * len(prompts)

        def until(row: int, token: int) -> bool:
            pieces[row] = streams[row].push(token)
            return streams[row].is_stopped

        for tokens in generate(self.decoder, prompts, self.sampling, self.stops, until):
            for row, token in enumerate(tokens):
                if token is not None:
                    self.answers[row].tokens.append(token)
                    yield from self._give(row, pieces[row])
        for row, stream in enumerate(streams):
            yield from self._give(row, stream.finish())
            self.answers[row].is_stopped = stream.is_stopped

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that the KV cache holds now; None where there is none."""
        cache = self.decoder.cache if isinstance(self.decoder, CachedDecoder) else None
        return None if cache is None else held_bytes(cache)

    def _give(self, row: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self.answers[row].text += piece
            yield row, piece


def converse(
    model: str,
    prompts: Sequence[str],
    sampling: Sampling,
    is_raw: bool = False,
    system: str | None = None,
    remembering: Remembering | None = None,
    threads: int | None = None,
) -> tuple[Conversation, list[list[int]]]:
    """Open a model for some prompts; returns the conversation and the prompts as tokens, to be asked with `ask`.

    Args:
        model: anything `open_checkpoint` takes, with or without a loader behind it (`demo@bnb-nf4`).
        is_raw: continue the prompts as they are, without the chat template.
        system: what the model is told before each prompt.
        threads: threads to compute with; None leaves torch's choice.

    Raises:
        UsageError: bad input, or a prompt that does not fit the model's context.
        MissingExtraError: the loader's library is absent.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    source, loader = split_loader(model)
    checkpoint = open_checkpoint(source)
    check_architecture(checkpoint.config)
    check_loader(checkpoint, loader)
    tokenizer = load_tokenizer(checkpoint)
    encode = raw_ids if is_raw else prompt_ids
    ids = [encode(tokenizer, prompt, system) for prompt in prompts]
    loaded = load_with(checkpoint, loader)
    decoder = decoder_for(loaded, ids, sampling, remembering or Remembering())
    return Conversation(decoder, tokenizer, stop_ids(loaded, tokenizer), sampling), ids


def decoder_for(
    model: PreTrainedModel, prompts: Sequence[list[int]], sampling: Sampling, remembering: Remembering
) -> Decoder:
    """A decoder with room for these prompts and their answers.

    Raises:
        UsageError: a prompt does not fit the model's context, or the kind of cache does not fit the model.
    """
    capacity = capacity_for(model.config, prompts, sampling)
    if remembering.kind is None:
        return UncachedDecoder(model)
    return CachedDecoder(model, capacity, remembering.kind, remembering.window)
