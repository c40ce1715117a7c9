"""Tokens over time: prefill in chunks, then one token at a time.

The loop is `prefill`, then for every token `sample` and `step`; `generate` strings them together and yields tokens as
they come, `stream_text` turns them into text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from packlight.errors import CheckpointError, UsageError
from packlight.plan.memory import PREFILL_CHUNK
from packlight.runtime import kv_cache

SAMPLED_TOGETHER = 32
"""Texts that `sample_windows` makes up at once: a step reads the weights once for all of them."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature must be 0 to 100, not {self.temperature}")
        if self.max_tokens < 1:
            raise UsageError(f"max tokens must be at least 1, not {self.max_tokens}")


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Fill the cache with a prompt; returns the last position's logits, (batch, vocab). ids: (batch, tokens)."""
    logits: torch.Tensor | None = None
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        chunk = ids[:, start : start + PREFILL_CHUNK]
        logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits is not None
    return logits[:, -1]


@torch.inference_mode()
def step(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """One token per sequence, ids (batch, 1); returns the next logits, (batch, vocab)."""
    logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits[:, -1]


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Next token ids, (batch, 1), from logits (batch, vocab)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def generate(
    model: PreTrainedModel, ids: list[int], sampling: Sampling, stop_ids: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Yield the tokens of an answer as they are made; the stop token is not yielded.

    Raises:
        UsageError: an empty prompt, or a prompt and answer longer than the model's context.
        CheckpointError: the model computes NaN.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not ids:
        raise UsageError("the prompt is empty: give at least one token")
    if limit is not None and len(ids) >= limit:
        raise UsageError(f"the prompt has {len(ids)} tokens and the model's context is {limit}: shorten the prompt")
    room = sampling.max_tokens if limit is None else min(sampling.max_tokens, limit - len(ids))
    cache = kv_cache.allocate(model.config, len(ids) + room)
    generator = torch.Generator().manual_seed(sampling.seed)
    logits = prefill(model, torch.tensor([ids]), cache)
    if bool(torch.isnan(logits).any()):
        raise CheckpointError("the model computes NaN: its weights are damaged, download it again")
    for made in range(room):
        token = sample(logits, sampling, generator)
        if int(token) in stop_ids:
            return
        yield int(token)
        if made + 1 < room:
            logits = step(model, token, cache)


def sample_windows(
    model: PreTrainedModel, windows: int, tokens: int, seed: int, tick: Callable[[], None]
) -> list[list[int]]:
    """Texts that the model makes up at temperature 1, each from a first token that is drawn evenly from its vocabulary.

    Args:
        windows: number of texts.
        tokens: length of each.
        tick: called after each of `ceil(windows / SAMPLED_TOGETHER)` batches.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    made: list[list[int]] = []
    while len(made) < windows:
        count = min(SAMPLED_TOGETHER, windows - len(made))
        ids = torch.randint(0, vocab, (count, 1), generator=generator)
        cache = kv_cache.allocate(model.config, tokens)
        for _ in range(tokens - 1):
            logits = step(model, ids[:, -1:], cache)
            ids = torch.cat([ids, sample(logits, Sampling(temperature=1.0), generator)], dim=1)
        made += ids.tolist()
        tick()
    return made


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character whose bytes are still incomplete waits for the next token.

    Each piece is the difference of two decodings that start at the same earlier token, since a tokenizer may treat
    the first token of what it decodes differently (a dropped space).
    """
    ids: list[int] = []
    start = done = 0

    def pending() -> str:
        before = tokenizer.decode(ids[start:done], skip_special_tokens=True)
        return str(tokenizer.decode(ids[start:], skip_special_tokens=True))[len(before) :]

    for token in tokens:
        ids.append(token)
        piece = pending()
        if piece and not piece.endswith("\ufffd"):
            yield piece
            start, done = done, len(ids)
    if rest := pending():
        yield rest


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A user's message through the chat template, or the plain text where the checkpoint has no template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    message = [{"role": "user", "content": prompt}]
    encoded: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-sequence ids from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
