"""Tokens over time, in one loop: prefill, then for every token choose and step.

`generate` is the loop, for any number of prompts at once and with any `Decoder`: with a KV cache of any kind, without
one, compiled, or a package. `complete` is the loop for one prompt and nothing but its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from packlight.errors import CheckpointError, UsageError
from packlight.runtime import kv_cache
from packlight.runtime.decoder import CachedDecoder, Decoder, context_of, pad, step
from packlight.runtime.sampling import Sampling, Token, describe, penalize, sample

SAMPLED_TOGETHER = 32
"""Texts that `sample_windows` makes up at once: a step reads the weights once for all of them."""

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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> list[int]:
    """A user's message through the chat template, or the plain text where the checkpoint has no template.

    Args:
        system: what the model is told before; without a template it stands before the prompt on lines of its own.
    """
    if tokenizer.chat_template is None:
        return raw_ids(tokenizer, prompt, system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def raw_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> list[int]:
    """The text as it is, behind `system` and an empty line where that is given."""
    text = prompt if system is None else f"{system}\n\n{prompt}"
    return list(tokenizer(text, verbose=False)["input_ids"])


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-sequence ids from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


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
