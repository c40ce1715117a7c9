"""Scores and repairs of removed inputs against what they are defined as."""

from __future__ import annotations

import pytest
import torch

from packlight.errors import CheckpointError
from packlight.ops.channels import (
    InputMoments,
    fluctuation,
    highest,
    input_size,
    least_squares,
    mean_bias,
    repaired_error,
)

ROWS, COLS, TOKENS = 5, 8, 200
KEPT = torch.tensor([0, 2, 3, 6, 7])
GONE = [1, 4, 5]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    """(tokens, cols) with means that are not zero, correlated."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64)
    return torch.randn(TOKENS, COLS, generator=generator, dtype=torch.float64) @ mixing + torch.arange(COLS)


def moments_of(x: torch.Tensor) -> InputMoments:
    return InputMoments(x.mean(dim=0), x.T @ x / len(x))


def test_scores_are_those_of_the_formulas(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    moments = moments_of(inputs)
    variance = inputs.var(dim=0, unbiased=False)
    assert torch.allclose(moments.variance, variance)
    assert torch.allclose(moments.covariance, torch.cov(inputs.T, correction=0))
    squares = weight.double().square().sum(dim=0)
    assert torch.allclose(fluctuation(weight, moments), variance * squares)
    sizes = torch.linalg.vector_norm(inputs, dim=0) / TOKENS**0.5
    assert torch.allclose(input_size(weight, moments), weight.double().abs().sum(dim=0) * sizes)


def test_fluctuation_is_what_is_lost_once_a_bias_has_taken_the_mean(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    """Of one column alone, whatever the others do."""
    scores = fluctuation(weight, moments_of(inputs))
    for column in range(COLS):
        lost = weight.double()[:, column] * inputs[:, column, None]
        assert float((lost - lost.mean(dim=0)).square().sum(dim=1).mean()) == pytest.approx(float(scores[column]))


def test_constant_columns_are_made_up_for_by_the_bias(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    inputs[:, GONE] = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    moments = moments_of(inputs)
    assert torch.equal(highest(fluctuation(weight, moments), len(KEPT)), KEPT)
    made = inputs[:, KEPT] @ weight[:, KEPT].double().T + mean_bias(weight, moments, KEPT)
    assert torch.allclose(made, inputs @ weight.double().T)


def test_columns_that_follow_from_others_are_made_up_for_by_least_squares(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    inputs[:, GONE] = inputs[:, KEPT] @ torch.randn(len(KEPT), 3, dtype=torch.float64)
    changed = least_squares(weight, moments_of(inputs).second, KEPT, 1e-12)
    assert torch.allclose(inputs[:, KEPT] @ changed.T, inputs @ weight.double().T, atol=1e-6)


def test_least_squares_is_that_of_lstsq(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    changed = least_squares(weight, moments_of(inputs).second, KEPT, 1e-12)
    wanted = torch.linalg.lstsq(inputs[:, KEPT], inputs @ weight.double().T).solution.T
    assert torch.allclose(changed, wanted, atol=1e-6)


def test_damping_pulls_towards_the_columns_as_they_are(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    own, second = weight[:, KEPT].double(), moments_of(inputs).second
    distances = [float((least_squares(weight, second, KEPT, d) - own).norm()) for d in (1e-9, 0.01, 1.0, 1e9)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-6 < distances[0]


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_error_is_that_of_the_outputs(has_bias: bool, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    moments, changed = moments_of(inputs), weight[:, KEPT] * 1.1
    bias = mean_bias(weight, moments, KEPT) if has_bias else None
    whole = inputs @ weight.double().T
    made = inputs[:, KEPT] @ changed.double().T + (0 if bias is None else bias)
    wanted = float((whole - made).square().sum() / whole.square().sum())
    assert repaired_error(weight, changed, bias, KEPT, moments) == pytest.approx(wanted)


def test_of_equal_scores_the_first_stay() -> None:
    assert highest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_inputs_that_are_all_zero_are_no_error(weight: torch.Tensor) -> None:
    moments = moments_of(torch.zeros(3, COLS, dtype=torch.float64))
    changed = least_squares(weight, moments.second, KEPT, 0.01)
    assert torch.allclose(changed, weight[:, KEPT].double())
    assert repaired_error(weight, changed, None, KEPT, moments) == 0


def test_moments_that_are_none_are_named(weight: torch.Tensor) -> None:
    broken = -torch.eye(COLS, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="the inputs of it leave no least-squares solution"):
        least_squares(weight, broken, KEPT, 0.01, "it")
