"""Which inputs of a linear may go, and how those that stay make up for them.

For y = W x, x (cols,): the scores rank columns of W (rows, cols) by what y loses with them, and the repairs choose
W' (rows, kept) and a bias b (rows,) so that W' x_K + b is near W x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from packlight.errors import CheckpointError


@dataclass(frozen=True)
class InputMoments:
    """Of what enters a linear, over all tokens: the mean (cols,) and the mean of x x^T (cols, cols), both float64."""

    mean: torch.Tensor
    second: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        """Mean of (x - mean)(x - mean)^T."""
        return self.second - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> torch.Tensor:
        """Diagonal of the covariance, (cols,)."""
        return (self.second.diagonal() - self.mean.square()).clamp(min=0)


def fluctuation(weight: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """Var(x_j) ||W_:j||^2, (cols,): what y loses with column j once a bias has taken its mean (An et al., "FLAP",
    arXiv 2312.11983)."""
    return moments.variance * weight.double().square().sum(dim=0)


def input_size(weight: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """sum_i |W_ij| sqrt(E x_j^2), (cols,): Wanda's score summed over a column."""
    return weight.double().abs().sum(dim=0) * moments.second.diagonal().clamp(min=0).sqrt()


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` highest scores, ascending; of equal ones the first stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def mean_bias(weight: torch.Tensor, moments: InputMoments, kept: torch.Tensor) -> torch.Tensor:
    """sum over the columns that go of W_:j E x_j, (rows,) float64: the best b for W' = W_K where the x are
    uncorrelated."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone].double() @ moments.mean[gone]


def least_squares(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, damping: float, name: str = "weight"
) -> torch.Tensor:
    """The W' of least E ||W x - W' x_K||^2, (rows, kept) float64: W S_:K (S_KK)^-1 with S the second moments.

    Args:
        second: (cols, cols) float64; the covariance where a bias takes the means.
        damping: share of the mean diagonal of S_KK that is added to its diagonal, and pulls W' towards W_K.
        name: for the error message.

    Raises:
        CheckpointError: S_KK cannot be inverted.
    """
    inner = second[kept][:, kept]
    ridge = damping * inner.diagonal().mean().clamp(min=1e-30)
    inner = inner + ridge * torch.eye(len(kept), dtype=inner.dtype)
    own = weight[:, kept].double()
    # W S_:K = W_K S_KK + W_P S_PK, so the change of W_K is what the columns that go leave to those that stay.
    right = weight.double() @ second[:, kept] + ridge * own
    factor, failed = torch.linalg.cholesky_ex(inner)
    if int(failed):
        raise CheckpointError(
            f"the inputs of {name} leave no least-squares solution: raise the damping above {damping:g}"
        )
    return torch.cholesky_solve(right.T, factor).T


def repaired_error(
    weight: torch.Tensor, changed: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor, moments: InputMoments
) -> float:
    """E ||W x - W' x_K - b||^2 / E ||W x||^2; 0 where nothing enters."""
    lost = weight.double().clone()
    lost[:, kept] -= changed.double()
    error = float((lost @ moments.second * lost).sum())
    if bias is not None:
        error += float(bias.double() @ bias.double() - 2 * bias.double() @ (lost @ moments.mean))
    norm = float((weight.double() @ moments.second * weight.double()).sum())
    return max(error, 0.0) / norm if norm else 0.0
