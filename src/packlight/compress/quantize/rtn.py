"""Round to nearest: every weight goes to the closest point of a min-max grid.

    scale = (max - min) / (2^bits - 1),   code = round(w / scale) + zero_point

per row or per group of input columns; a symmetric grid centres the range on zero and needs no zero point. It needs no
data and is the baseline that every other method has to beat. Its limit: one outlier widens the step of its whole group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.compress.step import Claim, check_claim, claim
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import quantize, squared_error, squared_norm
from packlight.spec import Grid, ModelSpec, Precision


@dataclass(frozen=True)
class Rtn:
    """Round to nearest.

    Args:
        bits: width of a code, 8 or 4.
        group_size: input columns that share a scale; None for a whole row.
        symmetric: no zero points.
        embeddings: bits of the input embedding and the LM head; None leaves them alone.
        dtype: of scales and of the tensors left alone; also the compute dtype of the result.

    Raises:
        UsageError: a value outside these.
    """

    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    embeddings: int | None = None
    dtype: str = "bfloat16"

    name: ClassVar[str] = "rtn"
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    breaks: ClassVar[frozenset[str]] = frozenset({"dense"})
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.embeddings not in (4, 8, None):
            wrong = self.embeddings if self.bits in (4, 8) else self.bits
            raise UsageError(f"rtn rounds to 8 or 4 bits, not {wrong}")
        _ = self.precision  # checks the group size and the dtype

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        linear = Grid(self.bits, self.group_size, self.symmetric)
        return Precision(self.dtype, linear, embedding_grid(linear, self.embeddings))

    def plan(self, spec: ModelSpec) -> Claim:
        """Bytes, peak and minutes from shapes alone. Raises UsageError where a group divides no row of the model."""
        return claim(spec, self.precision)

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Round every matrix of every block; one row per block: ||W - W'||^2 / ||W||^2 over its matrices."""
        for block in blocks:
            yield Measurement("relative_error", self._round(block), "1", block.name)

    def _round(self, block: Block) -> float:
        error = norm = 0.0
        for name, kind, weight in block.matrices():
            grid = self.precision.grid_of(kind)
            if grid is None:
                continue
            block.pack_(name, quantize(weight, grid, getattr(torch, self.dtype), name))
            error += squared_error(weight, block.tensor(name))
            norm += squared_norm(weight)
        return error / norm if norm else 0.0

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones."""
        yield from check_claim(self.plan(spec), artifact)

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them."""
        return {"method": self.name, **asdict(self)}


def embedding_grid(linear: Grid, bits: int | None) -> Grid | None:
    """The grid of embedding and head: the linears' own at equal bits (the one mix that a tied model loads with in
    stock transformers), 8 bits per row otherwise, as one kernel serves lookup and head there."""
    if bits is None:
        return None
    if bits == linear.bits:
        return linear
    return Grid(bits, None if bits == 8 else linear.group_size, linear.symmetric)
