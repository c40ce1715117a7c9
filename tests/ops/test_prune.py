"""Masks: exactly as many entries as asked for, ties to the first, N:M in every group; and their bits in bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.ops.prune import (
    kept_mask,
    lowest,
    lowest_in_rows,
    lowest_of_groups,
    pack_bits,
    prune_mask,
    unpack_bits,
)
from packlight.spec import Sparsity, TensorSpec

SCOPES = ("layer", "row", "2:4", "1:4", "3:4", "4:8")


def spec_of(rows: int, cols: int) -> TensorSpec:
    return TensorSpec("model.layers.0.mlp.up_proj.weight", (rows, cols), "float32", "linear")


@given(
    st.integers(1, 9), st.integers(1, 5), st.floats(0, 1, exclude_max=True), st.sampled_from(SCOPES), st.integers(1, 4)
)
@settings(max_examples=200, deadline=None)
def test_the_count_is_exact_whatever_the_ties(
    rows: int, eighths: int, share: float, scope: str, num_levels: int
) -> None:
    sparsity = Sparsity.of(None if ":" in scope else share, scope)
    scores = torch.randint(num_levels, (rows, 8 * eighths), generator=torch.Generator().manual_seed(0)).float()
    wanted = sparsity.num_zeros(spec_of(*scores.shape))
    mask = prune_mask(scores, sparsity, wanted)
    assert mask.shape == scores.shape and int(mask.sum()) == wanted
    if scope == "row":
        assert mask.sum(dim=1).unique().numel() == 1
    if sparsity.pattern is not None:
        keep, group = sparsity.pattern
        assert bool(((~mask).reshape(-1, group).sum(dim=1) == keep).all())


@given(st.integers(0, 40))
def test_the_lowest_go(count: int) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(count))
    mask = lowest(scores, count)
    gone, stay = scores[mask], scores[~mask]
    assert not len(gone) or not len(stay) or gone.max() < stay.min()


def test_of_equal_scores_the_first_go() -> None:
    same = torch.ones(2, 4)
    assert lowest(same, 5).tolist() == [[True] * 4, [True, False, False, False]]
    assert lowest_in_rows(same, 3).tolist() == [[True, True, True, False]] * 2
    assert lowest_of_groups(same, 1, 2).tolist() == [[True, False, True, False]] * 2


def test_rows_and_groups_are_looked_at_one_by_one() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 40.0, 30.0, 20.0]])
    assert lowest_in_rows(scores, 2).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert lowest_of_groups(scores, 1, 2).tolist() == [[True, False, True, False], [False, True, False, True]]


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 16, 31])
def test_bits_come_back(cols: int) -> None:
    mask = torch.rand(3, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-cols // 8))
    assert torch.equal(unpack_bits(packed, cols), mask)


def test_the_order_of_the_bits() -> None:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[0, 9] = True
    assert pack_bits(mask).tolist() == [[0b1001, 0b10]]


def test_more_zeros_than_asked_for_are_stored_and_so_is_a_negative_one() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0], [0.0, 2.0, 0.0]])
    assert kept_mask(weight, 2).tolist() == [[True, True, True], [False, True, False]]
    assert kept_mask(weight, 3).tolist() == [[False, True, True], [False, True, False]]
    assert bool(kept_mask(weight, 0).all())
    with pytest.raises(AssertionError):
        kept_mask(weight, 4)


@pytest.mark.parametrize("share", [1, 1.0, -0.1, 2, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="sparsity is a share from 0 to below 1"):
        Sparsity(share)


@pytest.mark.parametrize("scope", ["rows", "", "4:2", "4:4", "0:4", "2:0", "2:4:8", "2 : 4", "x:y"])
def test_an_unknown_scope_is_refused(scope: str) -> None:
    with pytest.raises(UsageError, match=r"scope is layer, row, global or N:M such as 2:4"):
        Sparsity(0.5, scope)


def test_a_share_that_n_of_m_does_not_have_is_refused() -> None:
    assert Sparsity.of(None, "1:4").share == 0.75
    assert Sparsity.of(0.75, "1:4") == Sparsity.of(None, "1:4")
    with pytest.raises(UsageError, match=r"1:4 is a sparsity of 0\.75, not 0\.5: leave the sparsity out"):
        Sparsity.of(0.5, "1:4")


def test_groups_that_divide_no_row_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2:4 does not divide a row of 6"):
        Sparsity.of(None, "2:4").num_zeros(spec_of(3, 6))


def test_a_number_that_is_not_whole_is_rounded() -> None:
    assert Sparsity(0.5, "layer").num_zeros(spec_of(3, 5)) == 8
    assert Sparsity(0.5, "row").num_zeros(spec_of(3, 5)) == 9
    assert Sparsity(0.7, "row").num_zeros(spec_of(3, 10)) == 21


@pytest.mark.parametrize("kind", ["embedding", "head", "other", "expert"])
def test_only_matrices_inside_the_blocks_are_asked(kind: str) -> None:
    tensor = TensorSpec("x", (4, 4), "float32", kind)  # type: ignore[arg-type]
    assert Sparsity(0.5).num_zeros(tensor) == 0
