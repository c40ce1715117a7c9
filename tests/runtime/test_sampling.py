"""What may be drawn: as transformers' own processors would have it, and in the ranges that are promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from packlight.errors import UsageError
from packlight.runtime.sampling import Sampling, describe, penalize, restrict, sample


def logits(rows: int = 3, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def by_transformers(scores: torch.Tensor, warpers: list[LogitsProcessor]) -> torch.Tensor:
    ids = torch.zeros(len(scores), 1, dtype=torch.int64)
    for warper in warpers:
        scores = warper(ids, scores)
    return scores


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=str,
)
def test_what_is_left_is_what_transformers_leaves(options: dict[str, Any], warpers: list[LogitsProcessor]) -> None:
    found = restrict(logits(), Sampling(**{"temperature": 1.0, **options}))
    torch.testing.assert_close(found, by_transformers(logits(), warpers))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0, 60))
def test_the_likeliest_token_is_always_left(seed: int, top_p: float, min_p: float, top_k: int) -> None:
    scores = logits(seed=seed)
    left = restrict(scores, Sampling(1.0, top_p=top_p, min_p=min_p, top_k=top_k))
    assert torch.isfinite(left.gather(1, scores.argmax(1, keepdim=True))).all()


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    scores, ids = logits(), torch.tensor([[1, 2, 2], [0, 49, 3], [7, 7, 7]])
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    torch.testing.assert_close(penalize(scores, seen, 1.3), wanted)
    assert penalize(scores, seen, 1.0) is scores


def test_frequencies_follow_the_temperature() -> None:
    """Odds of e^(1/T) to one: the share of 20,000 draws lies within five standard errors."""
    two = torch.tensor([[1.0, 0.0]]).expand(20_000, 2)
    for temperature in (0.5, 1.0, 4.0):
        drawn = sample(two, Sampling(temperature), torch.Generator().manual_seed(0))
        wanted = float(torch.sigmoid(torch.tensor(1 / temperature)))
        error = (wanted * (1 - wanted) / 20_000) ** 0.5
        assert abs(float((drawn == 0).float().mean()) - wanted) < 5 * error


def test_greedy_takes_the_largest() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(scores, Sampling(), torch.Generator()).tolist() == [[1], [0]]


def test_log_probabilities_are_those_of_the_model() -> None:
    row = logits()[0]
    wanted = torch.log_softmax(row, 0)
    token = describe(row, 7, 3)
    assert token.id == 7 and token.logprob == float(wanted[7])
    assert [each for each, _ in token.top] == wanted.topk(3).indices.tolist()
    assert [value for _, value in token.top] == wanted.topk(3).values.tolist()
    assert describe(row, 7, 0).top == () and describe(row, 7, 0).logprob == token.logprob
    assert describe(row, 7, None).logprob is None


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_a_sampling_outside_its_range(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Sampling(**bad)


def test_an_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        Sampling(stop=("a", ""))
