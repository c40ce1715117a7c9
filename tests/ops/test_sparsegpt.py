"""SparseGPT's arithmetic: one weight is removed as the exact solution says, and many cost less than by other scores."""

from __future__ import annotations

import pytest
import torch

from packlight.errors import CheckpointError
from packlight.ops.gptq import output_error
from packlight.ops.prune import prune_mask
from packlight.ops.sparsegpt import sparsegpt
from packlight.spec import Sparsity, TensorSpec

TINY = 1e-9
"""A damping that is not seen in float64."""


def inputs(cols: int, tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Correlated inputs of different sizes, (tokens, cols)."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, cols, generator=made, dtype=dtype) @ torch.randn(
        cols, cols, generator=made, dtype=dtype
    )
    return mixed * torch.logspace(-0.5, 0.5, cols, dtype=dtype)[torch.randperm(cols, generator=made)]


def case(rows: int = 24, cols: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, cols) and a Hessian (cols, cols)."""
    x = inputs(cols, 4 * cols, seed)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 100), dtype=x.dtype)
    return weight, x.T @ x


def asked(share: float | None, scope: str, weight: torch.Tensor) -> tuple[Sparsity, int]:
    sparsity = Sparsity.of(share, scope)
    return sparsity, sparsity.num_zeros(TensorSpec("w", tuple(weight.shape), "float64", "linear"))


def exact_removal(row: torch.Tensor, x: torch.Tensor, removed: int, first: int) -> torch.Tensor:
    """The row without weight `removed` that comes closest to x @ row, if only columns from `first` on may change:
    the least-squares solution itself, from which nothing is left out."""
    free = [j for j in range(first, len(row)) if j != removed]
    target = x[:, first:] @ row[first:]
    answer = row.clone()
    answer[removed] = 0.0
    answer[free] = torch.linalg.lstsq(x[:, free], target[:, None]).solution[:, 0]
    return answer


@pytest.mark.parametrize("removed", [0, 3, 6])
def test_one_weight_is_removed_exactly(removed: int) -> None:
    """Settled columns stay: the columns from the removed one on make up for it."""
    x = inputs(7, 40, 1)
    row = torch.randn(1, 7, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    row[0, removed] = 1e-6  # so that it is the cheapest
    found = sparsegpt(row, x.T @ x, Sparsity(1 / 7), 1, damping=TINY)
    wanted = exact_removal(row[0], x, removed, removed)
    assert torch.allclose(found[0], wanted, rtol=1e-6, atol=1e-12)
    assert found[0, removed] == 0


def test_the_first_weight_is_removed_as_optimal_brain_surgeon_says() -> None:
    """With all other columns free: w - w_0 / (H^-1)_00 H^-1[:, 0], at a cost of w_0^2 / (H^-1)_00."""
    x = inputs(6, 30, 3)
    hessian = x.T @ x
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    row[0, 0] = 1e-6
    inverse = torch.linalg.inv(hessian)
    wanted = row - row[0, 0] / inverse[0, 0] * inverse[0]
    found = sparsegpt(row, hessian, Sparsity(1 / 6), 1, damping=TINY)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-12)
    cost = float(row[0, 0] ** 2 / inverse[0, 0])
    assert output_error(row, found, hessian) == pytest.approx(cost, rel=1e-4)
    assert torch.allclose(found[0], exact_removal(row[0], x, 0, 0), rtol=1e-6, atol=1e-12)


def test_the_cheapest_weight_goes() -> None:
    """Every weight of a row removed by itself, exactly: the one that is chosen costs least among the settled costs."""
    x = inputs(8, 40, 5)
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
    errors = [float((x @ (row[0] - exact_removal(row[0], x, j, j))).square().sum()) for j in range(8)]
    found = sparsegpt(row, x.T @ x, Sparsity(1 / 8), 1, damping=TINY)
    assert (found[0] == 0).nonzero().flatten().tolist() == [min(range(8), key=errors.__getitem__)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("share", "scope"), [(0.5, "layer"), (0.5, "row"), (None, "2:4"), (0.2, "layer")])
def test_its_error_is_not_above_that_of_simpler_scores(share: float | None, scope: str, seed: int) -> None:
    """No theorem: the zeros of each block of columns are an even share, settled columns stay as they are, and so at
    80 % or with inputs that are a hundred times apart it does come out above. Where it is used it does not."""
    weight, hessian = case(seed=seed)
    sparsity, zeros = asked(share, scope, weight)
    found = sparsegpt(weight, hessian, sparsity, zeros, block_size=16)
    mine = output_error(weight, found, hessian)
    for scores in (weight.abs(), weight.abs() * hessian.diagonal().sqrt()):
        other = weight.masked_fill(prune_mask(scores, sparsity, zeros), 0.0)
        assert int((other == 0).sum()) == int((found == 0).sum()) == zeros
        assert mine <= output_error(weight, other, hessian)


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
@pytest.mark.parametrize(
    ("share", "scope"), [(0.3, "layer"), (0.3, "row"), (None, "2:4"), (None, "1:8"), (0.97, "layer")]
)
def test_the_count_is_exact(share: float | None, scope: str, block_size: int) -> None:
    weight, hessian = case()
    sparsity, zeros = asked(share, scope, weight)
    gone = sparsegpt(weight, hessian, sparsity, zeros, block_size=block_size) == 0
    assert int(gone.sum()) == zeros
    if scope == "row":
        assert gone.sum(dim=1).unique().numel() == 1
    if sparsity.pattern is not None:
        keep, group = sparsity.pattern
        assert bool(((~gone).reshape(-1, group).sum(dim=1) == keep).all())


def test_groups_come_out_the_same_whatever_the_block() -> None:
    weight, hessian = case()
    sparsity, zeros = asked(None, "2:4", weight)
    found = [sparsegpt(weight, hessian, sparsity, zeros, block_size=size) for size in (1, 4, 10, 128)]
    assert all(torch.allclose(other, found[0], rtol=1e-9) for other in found[1:])


def test_nothing_asked_is_nothing_done() -> None:
    weight, hessian = case()
    assert torch.equal(sparsegpt(weight, hessian, Sparsity(0.0), 0), weight)


def test_where_inputs_are_alike_and_apart_it_is_magnitude() -> None:
    weight, _ = case()
    sparsity, zeros = asked(0.4, "layer", weight)
    found = sparsegpt(weight, torch.eye(48, dtype=torch.float64), sparsity, zeros, block_size=48)
    assert torch.allclose(found, weight.masked_fill(prune_mask(weight.abs(), sparsity, zeros), 0.0))


def test_columns_that_nothing_reaches_go_first_and_constant_rows_do_no_harm() -> None:
    weight, hessian = case()
    weight[3] = 0.25
    hessian[:, 5] = 0
    hessian[5] = 0
    sparsity, zeros = asked(0.1, "row", weight)
    found = sparsegpt(weight, hessian, sparsity, zeros)
    assert bool((found[:, 5] == 0).all()) and bool(torch.isfinite(found).all())
    assert int((found == 0).sum()) == zeros


def test_inputs_that_overflow_are_named() -> None:
    weight, hessian = case()
    hessian[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"the inputs of layer\.o_proj overflow"):
        sparsegpt(weight, hessian, Sparsity(0.5), 10, name="layer.o_proj")
