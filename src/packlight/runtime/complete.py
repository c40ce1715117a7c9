"""Answers of a loaded model as bare tokens: one answer, and texts that it makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from packlight.errors import UsageError
from packlight.runtime import kv_cache
from packlight.runtime.generate import generate
from packlight.runtime.model_decoder import CachedDecoder, context_of, step
from packlight.runtime.sampling import Sampling, sample

SAMPLED_TOGETHER = 32
"""Texts that `sample_windows` makes up at once: a step reads the weights once for all of them."""


def complete(
    model: PreTrainedModel, ids: list[int], sampling: Sampling, stop_ids: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Yield the tokens of one answer, with a KV cache of just its size.

    Raises:
        UsageError: an empty prompt, or a prompt that does not fit the model's context.
    """
    decoder = CachedDecoder(model, capacity_for(model.config, [ids], sampling))
    for tokens in generate(decoder, [ids], sampling, stop_ids):
        assert tokens[0] is not None
        yield tokens[0].id


def capacity_for(config: PreTrainedConfig, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """Tokens per sequence that the prompts and their answers take, no more than the model's context.

    Raises:
        UsageError: a prompt does not fit the model's context.
    """
    limit = context_of(config)
    longest = max(map(len, prompts), default=0)
    if limit is None:
        return longest + sampling.max_tokens
    if longest >= limit:
        raise UsageError(f"the prompt has {longest} tokens and the model's context is {limit}: shorten the prompt")
    return min(limit, longest + sampling.max_tokens)


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
