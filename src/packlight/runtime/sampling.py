"""How the next token is chosen from logits: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from packlight.errors import UsageError

MAX_LOGPROBS = 20
"""Alternatives that may be reported for each token, the limit of OpenAI's interface."""


@dataclass(frozen=True)
class Sampling:
    """What an answer may be. Temperature 0 is greedy.

    Args:
        temperature: divides the logits.
        max_tokens: tokens of an answer, at most.
        seed: of each sequence's own generator, so that what is drawn does not depend on the rest of a batch.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities add up to p (nucleus sampling, arXiv 1904.09751).
        min_p: keep tokens with at least this share of the likeliest one's probability (arXiv 2407.01082).
        repetition_penalty: divides positive logits of tokens that occurred, and multiplies negative ones
            (CTRL, arXiv 1909.05858, section 4.1); 1 changes nothing.
        stop: an answer ends before the first of these strings.
        logprobs: how many alternatives to report with each token and its log-probability; None reports nothing.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    max_tokens: int = 128
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature must be 0 to 100, not {self.temperature}")
        if self.max_tokens < 1:
            raise UsageError(f"max tokens must be at least 1, not {self.max_tokens}")
        if self.top_k < 0:
            raise UsageError(f"top-k must be at least 1, or 0 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(f"the repetition penalty must be above 0, not {self.repetition_penalty}")
        if "" in self.stop:
            raise UsageError("a stop string is empty: give some text")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UsageError(f"logprobs must be 0 to {MAX_LOGPROBS}, not {self.logprobs}")


@dataclass(frozen=True)
class Token:
    """One token of an answer, with its log-probability under the model's own distribution where that was asked for.

    `top` holds (id, log-probability) of the likeliest tokens at that place. Neither temperature nor any other choice of
    `Sampling` is in these numbers.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Next token ids, (batch, 1), from logits (batch, vocab)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(torch.softmax(restrict(logits, sampling), dim=-1), 1, generator=generator)


def restrict(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (batch, vocab) over the temperature, in float32, -inf where a token may not be drawn.

    The temperature is above 0.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1)
        # From the least likely up: what adds up to no more than 1 - p goes. The likeliest stays, whatever the rounding.
        below = torch.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        below[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(below).scatter(1, places, below), -math.inf)
    if sampling.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -math.inf)
    return logits


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (batch, vocab) with those of tokens that occurred, `seen` (batch, vocab) bool, made smaller."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def describe(logits: torch.Tensor, chosen: int, count: int | None) -> Token:
    """The token `chosen` from one row of logits, (vocab,), with `count` alternatives; None leaves the numbers out."""
    if count is None:
        return Token(chosen)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(count)
    return Token(chosen, float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
