"""Tokens over time, in one loop: prefill, then for every token choose and step.

`generate` is the loop, for any number of prompts at once and with any `Decoder`: with a KV cache of any kind, without
one, compiled, or a package. Imports no model code, so that a package starts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from packlight.errors import CheckpointError, UsageError
from packlight.runtime.decoder import Decoder
from packlight.runtime.prompts import pad
from packlight.runtime.sampling import Sampling, Token, describe, penalize, sample

Until = Callable[[int, int], bool]
"""Asked with a row and its new token: whether that token is the row's last."""


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    until: Until | None = None,
) -> Iterator[list[Token | None]]:
    """Yield one token per prompt and step, None where an answer is over; a stop token is not yielded.

    An iterator that is closed or interrupted frees the decoder's memory.

    Raises:
        UsageError: an empty prompt, or one that leaves no room for an answer.
        CheckpointError: the model computes NaN.
    """
    room = _room(prompts, decoder.capacity, sampling.max_tokens)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    ids, mask = pad(prompts)
    is_live = [True] * len(prompts)
    try:
        logits = decoder.prefill(ids, mask if int(mask.min()) == 0 else None).cpu()
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        for made in range(room):
            if made == 0 and bool(torch.isnan(logits).any()):
                raise CheckpointError("the model computes NaN: its weights are damaged, download it again")
            weighed = penalize(logits, seen, sampling.repetition_penalty)
            chosen = torch.cat([sample(weighed[row : row + 1], sampling, each) for row, each in enumerate(generators)])
            tokens: list[Token | None] = []
            for row, token in enumerate(chosen[:, 0].tolist()):
                is_live[row] &= token not in stop_ids
                tokens.append(describe(logits[row], token, sampling.logprobs) if is_live[row] else None)
                is_live[row] &= not (is_live[row] and until is not None and until(row, token))
            if any(tokens):
                yield tokens
            if made + 1 == room or not any(is_live):
                return
            seen.scatter_(1, chosen, True)
            logits = decoder.step(chosen).cpu()
    except (GeneratorExit, KeyboardInterrupt):
        decoder.free()
        raise


def _room(prompts: Sequence[Sequence[int]], capacity: int | None, max_tokens: int) -> int:
    """Tokens that the answers may have. A batch is as long as its longest prompt: padding takes room too."""
    if not prompts or not all(map(len, prompts)):
        raise UsageError("the prompt is empty: give at least one token")
    longest = max(map(len, prompts))
    if capacity is None:
        return max_tokens
    if longest >= capacity:
        raise UsageError(
            f"the prompt has {longest} tokens and there is room for {capacity}, answer included: shorten the prompt"
        )
    return min(max_tokens, capacity - longest)
