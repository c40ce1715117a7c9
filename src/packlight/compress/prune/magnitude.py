"""Magnitude pruning: the smallest weights go.

    score_ij = |W_ij|

It reads no text and is the baseline that every other method has to beat; that a network keeps working without its
small weights was found long ago (Han et al., arXiv 1506.02626, with retraining, which is left out here). Its limit: a
small weight on a large input matters, and language models have a few inputs that are far larger than the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from packlight.compress.prune.options import PruneOptions
from packlight.compress.walk import Block
from packlight.evidence import Measurement
from packlight.ops.grid import squared_error, squared_norm
from packlight.ops.prune import prune_mask


@dataclass(frozen=True)
class Magnitude(PruneOptions):
    """Prune by magnitude; see `PruneOptions` for the hyper-parameters."""

    name: ClassVar[str] = "magnitude"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row", "global")

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """One row per block: ||W - W'||^2 / ||W||^2 over its pruned matrices."""
        for block in blocks:
            error = norm = 0.0
            for name, zeros, weight in self.matrices(block):
                changed = weight.masked_fill(prune_mask(weight.abs(), self.zeros, zeros), 0.0)
                error += squared_error(weight, changed)
                norm += squared_norm(weight)
                block.put_(name, changed)
            yield Measurement("relative_error", error / norm if norm else 0.0, "1", block.name)
