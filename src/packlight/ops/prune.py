"""Which weights go: masks of exactly as many entries as are asked for, and their bits in bytes.

A tie goes to the entry that comes first, row after row, so that a constant row loses its first columns and the same
scores always give the same mask.
"""

from __future__ import annotations

import torch

from packlight.spec import Sparsity

_BITS = tuple(1 << place for place in range(8))


def prune_mask(scores: torch.Tensor, sparsity: Sparsity, num_zeros: int) -> torch.Tensor:
    """True, (rows, cols), at the `num_zeros` weights of a matrix with the lowest scores.

    Args:
        scores: (rows, cols), without NaN.
        sparsity: whether they are counted in each row, in each group of M columns, or in the whole matrix.
        num_zeros: of the whole matrix, as `Sparsity.num_zeros` has it.
    """
    if sparsity.pattern is not None:
        return lowest_of_groups(scores, *sparsity.pattern)
    if sparsity.scope == "row":
        return lowest_in_rows(scores, num_zeros // len(scores))
    return lowest(scores, num_zeros)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest entries of a tensor of any shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.reshape(scores.shape)


def lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest entries of each row of (.., cols)."""
    places = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, places, True)


def lowest_of_groups(scores: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """True at all but the `keep` highest of every `group` consecutive columns, which must divide the row."""
    rows, cols = scores.shape
    grouped = scores.reshape(rows, cols // group, group)
    return lowest_in_rows(grouped, group - keep).reshape(rows, cols)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool (rows, cols) -> uint8 (rows, ceil(cols / 8)): column 8j + i is bit i of byte j, the rest is 0."""
    rows, cols = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -cols % 8))
    return (padded.reshape(rows, -1, 8) * torch.tensor(_BITS, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Undo `pack_bits`; bits beyond `cols` are passed over."""
    rows = len(packed)
    bits = packed.unsqueeze(-1).bitwise_and(torch.tensor(_BITS, dtype=torch.uint8)) != 0
    return bits.reshape(rows, -1)[:, :cols]


def kept_mask(weight: torch.Tensor, num_zeros: int) -> torch.Tensor:
    """True at the entries of a pruned matrix that are to be stored, all but exactly `num_zeros`.

    Left out are zeros: the last ones where there are more than asked for. A negative zero is stored like any number,
    so that what is read back is the same bit for bit.
    """
    is_zero = (weight == 0) & ~torch.signbit(weight)
    places = is_zero.flatten().nonzero().flatten()
    assert len(places) >= num_zeros, "a pruned matrix has the zeros that were asked for"
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[places[len(places) - num_zeros :]] = False
    return kept.reshape(weight.shape)
