"""Round to nearest: every weight goes to the closest point of its grid.

    scale = (max - min) / (2^bits - 1),   code = round(w / scale) + zero_point

per row or per group of input columns; a symmetric grid centres the range on zero and needs no zero point. It needs no
data and is the baseline that every other method has to beat. Its limit: one outlier widens the step of its whole group,
unless `clip` searches a narrower range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from packlight.compress.quantize.options import GridOptions, relative_error
from packlight.compress.walk import Block
from packlight.evidence import Measurement


@dataclass(frozen=True)
class Rtn(GridOptions):
    """Round to nearest; see `GridOptions` for the hyper-parameters."""

    name: ClassVar[str] = "rtn"

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Round every matrix of every block; one row per block: ||W - W'||^2 / ||W||^2 over its matrices."""
        for block in blocks:
            originals = {name: weight for name, _, weight in self.matrices(block)}
            self.round_(block)
            yield relative_error(block, originals)
