"""How many elements attention moves between slow and fast memory, counted and as formulas.

For N queries and keys of width d in one head, and a fast memory of M elements (d <= M <= N d):

    standard            Theta(N d + N^2): scores and weights are written out and read back
    FlashAttention      Theta(N^2 d^2 / M) (Dao et al., arXiv 2205.14135, theorem 2); no exact algorithm moves
                        o(N^2 d^2 / M) for every M in that range (proposition 3)

An element that is read or written again counts again; masks, which need not be stored, do not count. The formulas are
exact for the loops that they belong to, block sizes that do not divide N included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packlight.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass
class Traffic:
    """Elements moved so far.

    Args:
        loads: elements read from slow memory.
        stores: elements written to it.
    """

    loads: int = 0
    stores: int = 0

    @property
    def total(self) -> int:
        return self.loads + self.stores

    def load(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are read."""
        self.loads += sum(tensor.numel() for tensor in tensors)

    def store(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are written."""
        self.stores += sum(tensor.numel() for tensor in tensors)


def standard_traffic(num_tokens: int, head_dim: int) -> Traffic:
    """Of one head of attention that writes S = Q K^T and P = softmax(S) out (algorithm 0 of the paper)."""
    matrix, scores = num_tokens * head_dim, num_tokens**2
    return Traffic(loads=3 * matrix + 2 * scores, stores=2 * scores + matrix)


def tiled_traffic(num_tokens: int, head_dim: int, block_q: int, block_k: int, is_causal: bool = False) -> Traffic:
    """Of one head of `attention.tiled_attention`: every query once, keys and values once for each block of queries.

    Without a mask that is 2 N d + N + 2 N d ceil(N / block_q); a causal mask halves the last term, since a block of
    queries stops at the last block of keys that it sees.
    """
    keys_and_values = 0
    for start in range(0, num_tokens, block_q):
        seen = min(start + block_q, num_tokens) if is_causal else num_tokens
        keys_and_values += 2 * head_dim * min(math.ceil(seen / block_k) * block_k, num_tokens)
    matrix = num_tokens * head_dim
    return Traffic(loads=matrix + keys_and_values, stores=matrix + num_tokens)


def flash1_blocks(head_dim: int, sram: int) -> tuple[int, int]:
    """(block_q, block_k) of FlashAttention for a fast memory of `sram` elements (algorithm 1, line 1).

    The paper rounds M / 4d up; here it is rounded down, so that the blocks fit.

    Raises:
        UsageError: a fast memory that does not hold one row of queries, keys, values and outputs.
    """
    if sram < 4 * head_dim:
        raise UsageError(f"{sram} elements of fast memory hold no rows of width {head_dim}: give at least 4 * head_dim")
    block_k = sram // (4 * head_dim)
    return min(block_k, head_dim), block_k


def flash1_traffic(num_tokens: int, head_dim: int, sram: int) -> Traffic:
    """Of one head of FlashAttention in the paper's order: keys and values once, in the outer loop, and for each of
    their blocks all queries, outputs, maxima and sums, of which the last three are written back (algorithm 1)."""
    _, block_k = flash1_blocks(head_dim, sram)
    matrix, passes = num_tokens * head_dim, math.ceil(num_tokens / block_k)
    return Traffic(
        loads=2 * matrix + passes * (2 * matrix + 2 * num_tokens),
        stores=passes * (matrix + 2 * num_tokens),
    )


def tiled_blocks(head_dim: int, sram: int) -> tuple[int, int]:
    """(block_q, block_k) of `attention.tiled_attention` for a fast memory of `sram` elements, both the same.

    B rows of queries, outputs, keys and values and B x B scores must fit: B = sqrt(4 d^2 + sram) - 2 d.

    Raises:
        UsageError: a fast memory that does not hold one row of each.
    """
    block = math.isqrt(4 * head_dim**2 + sram) - 2 * head_dim
    if block < 1:
        raise UsageError(
            f"{sram} elements of fast memory hold no block of width {head_dim}: give at least 4 * head_dim + 1"
        )
    return block, block
