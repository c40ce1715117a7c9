"""SparseGPT: set weights to zero column by column, and let the columns that are still free make up for them.

It is GPTQ's walk over the columns with zero in the place of the nearest grid point. With U the upper Cholesky factor of
H^-1, removing w_j costs (w_j / U_jj)^2 / 2 once the columns before j are settled, and the best answer of the later ones
is `W[:, j:] -= w_j / U_jj * U[j, j:]` (Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, sections 3.2 and 3.3).
Which weights go is decided for a block of columns at a time, when all before it are settled: late enough to know what
the weights have become, early enough that a cheap column can be chosen among many.
"""

from __future__ import annotations

import torch

from packlight.ops.gptq import BLOCK_SIZE, DAMPING, inverse_factor
from packlight.ops.prune import lowest, lowest_in_rows, lowest_of_groups
from packlight.spec import Sparsity


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: Sparsity,
    num_zeros: int,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    name: str = "weight",
) -> torch.Tensor:
    """`weight` with `num_zeros` zeros and the other weights changed so that its output changes little.

    Args:
        weight: floating point (rows, cols).
        hessian: sum of x x^T, (cols, cols); any positive multiple of it gives the same result.
        sparsity: whether zeros are counted in each row, in each group of M columns, or in the whole matrix.
        num_zeros: of the whole matrix, as `Sparsity.num_zeros` has it; every block of columns takes its even share.
        damping: share of the mean diagonal that is added to the diagonal.
        block_size: columns whose zeros are chosen together; with N:M the M of a group are, whatever this is.
        name: for error messages.

    Returns:
        (rows, cols) in the dtype of `hessian`. Columns that no token ever reached go first: they cost nothing.

    Raises:
        CheckpointError: `hessian` is not finite.
    """
    rows, cols = weight.shape
    u = inverse_factor(hessian, damping, name)
    price = u.diagonal().square().reciprocal()
    price[hessian.diagonal() <= 0] = 0
    w = weight.to(hessian.dtype).clone()
    pattern = sparsity.pattern
    step = block_size if pattern is None else max(block_size // pattern[1], 1) * pattern[1]
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        if pattern is None:
            mask = _cheapest(w[:, start:stop].square() * price[start:stop], sparsity, num_zeros, start, stop, cols)
        else:
            mask = torch.zeros(rows, stop - start, dtype=torch.bool)  # filled group by group
        error = torch.empty(rows, stop - start, dtype=w.dtype)
        for j in range(start, stop):
            if pattern is not None and (j - start) % pattern[1] == 0:
                end = j + pattern[1]
                mask[:, j - start : end - start] = lowest_of_groups(w[:, j:end].square() * price[j:end], *pattern)
            gone = mask[:, j - start]
            error[:, j - start] = torch.where(gone, w[:, j], 0.0) / u[j, j]
            w[:, j].masked_fill_(gone, 0.0)
            w[:, j + 1 : stop] -= torch.outer(error[:, j - start], u[j, j + 1 : stop])
        w[:, stop:] -= error @ u[start:stop, stop:]
    return w


def _cheapest(
    scores: torch.Tensor, sparsity: Sparsity, num_zeros: int, start: int, stop: int, cols: int
) -> torch.Tensor:
    """Which weights of the columns [start, stop) go: the even share of those columns, over all blocks `num_zeros`."""

    def share(count: int) -> int:
        return count * stop // cols - count * start // cols

    if sparsity.scope == "row":
        return lowest_in_rows(scores, share(num_zeros // len(scores)))
    return lowest(scores, share(num_zeros))
