"""Wanda: the weights go whose product with the size of their input is smallest.

    score_ij = |W_ij| * ||X_j||_2,   compared within each output row

X_j is input j over all tokens of the calibration text, as it comes through the blocks that are pruned already (Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695). The score is the change of
the output when one weight goes alone and nothing makes up for it. Its limit: weights do not go alone, and the others
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.prune.options import CalibratedPruning
from packlight.ops.prune import prune_mask


@dataclass(frozen=True)
class Wanda(CalibratedPruning):
    """Prune by weight and input; see `PruneOptions` for the hyper-parameters. By row unless another scope is given."""

    scope: str = "row"

    name: ClassVar[str] = "wanda"

    def pruned(self, name: str, weight: torch.Tensor, hessian: torch.Tensor, num_zeros: int) -> torch.Tensor:
        """The lowest scores to zero; ||X_j|| is the root of the Hessian's diagonal."""
        scores = weight.abs() * hessian.diagonal().clamp(min=0).sqrt()
        return weight.masked_fill(prune_mask(scores, self.zeros, num_zeros), 0.0)
