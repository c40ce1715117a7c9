"""SparseGPT: second-order pruning, in which the weights that stay make up for those that go.

    cost of w_j = w_j^2 / (H^-1)_jj,   H = sum over calibration tokens of x x^T

with H^-1 of the columns that are still free (Frantar and Alistarh, arXiv 2301.00774); `ops/sparsegpt.py` has the
arithmetic, which is GPTQ's. Its limits: it minimizes each layer's error on its own, and the more it fits the
calibration text, the less it need fit another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.prune.options import CalibratedPruning
from packlight.errors import UsageError
from packlight.ops.gptq import BLOCK_SIZE, DAMPING
from packlight.ops.sparsegpt import sparsegpt


@dataclass(frozen=True)
class SparseGpt(CalibratedPruning):
    """Prune and make up for it; see `PruneOptions` for the other hyper-parameters.

    Args:
        damping: share of the mean diagonal of H that is added to its diagonal.
        block_size: columns whose zeros are chosen together.
    """

    damping: float = DAMPING
    block_size: int = BLOCK_SIZE

    name: ClassVar[str] = "sparsegpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is above 0 and at most 1, not {self.damping}")
        if self.block_size < 1:
            raise UsageError(f"a block has at least one column, not {self.block_size}")

    def pruned(self, name: str, weight: torch.Tensor, hessian: torch.Tensor, num_zeros: int) -> torch.Tensor:
        """Zeros chosen by what they cost, the rest changed."""
        return sparsegpt(weight, hessian, self.zeros, num_zeros, self.damping, self.block_size, name)
