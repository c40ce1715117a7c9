"""The hyper-parameters that every weight quantizer shares: on which grid each tensor goes.

Their defaults are the grid whose result loads in stock transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.compress.step import Claim, KeepsShapes, check_claim, claim
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import Clip, QuantizedTensor, quantize, squared_error, squared_norm
from packlight.plan.memory import CalibrationSize, Reading
from packlight.spec import Grid, ModelSpec, Precision


@dataclass(frozen=True)
class GridOptions(KeepsShapes):
    """Grids by kind of tensor, and what follows from them.

    Args:
        bits: width of a code, 2 to 8.
        group_size: input columns that share a scale; None for a whole row.
        symmetric: no zero points.
        embeddings: bits of the input embedding and the LM head; None leaves them alone.
        scale_bits: 4 to 8, scales that are themselves quantized; None for floats.
        clip: 'minmax' spans the whole range of a group, 'mse' searches the range with the least squared error.
        dtype: of scales and of the tensors left alone; also the compute dtype of the result.
        grids: (full tensor name, grid as text such as 'int3-g64-asym', or None) of tensors with a grid of their own.

    Raises:
        UsageError: a value outside these.
    """

    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    embeddings: int | None = None
    scale_bits: int | None = None
    clip: Clip = "minmax"
    dtype: str = "bfloat16"
    grids: tuple[tuple[str, str | None], ...] = ()

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    breaks: ClassVar[frozenset[str]] = frozenset({"dense"})

    def __post_init__(self) -> None:
        if self.clip not in get_args(Clip):
            raise UsageError(f"clip is {' or '.join(get_args(Clip))}, not {self.clip!r}")
        # A recipe file holds lists.
        try:
            pairs = tuple((str(name), text) for name, text in self.grids)
        except (TypeError, ValueError):
            raise UsageError(f"grids are pairs of a tensor's name and a grid, not {self.grids!r}") from None
        object.__setattr__(self, "grids", pairs)
        _ = self.precision  # checks the rest

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        linear = Grid(self.bits, self.group_size, self.symmetric, self.scale_bits)
        single = tuple(sorted((name, None if text is None else Grid.parse(text)) for name, text in self.grids))
        return Precision(self.dtype, linear, embedding_grid(linear, self.embeddings), single)

    @property
    def scale_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def reading(self) -> Reading | None:
        """No text is read."""
        return None

    def loss_share(self, is_end: bool) -> float:
        """All of it."""
        return 1.0

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone. Raises UsageError where a group divides no row of the model, and
        where a tensor that has a grid of its own is not in the model."""
        names = {tensor.name for tensor in spec.tensors}
        if unknown := next((name for name, _ in self.grids if name not in names), None):
            raise UsageError(f"the recipe gives {unknown} a grid of its own, and {spec.name} has no such tensor")
        return claim(spec, self.precision, calibration)

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones."""
        yield from check_claim(self.plan(spec), artifact)

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them."""
        return {"method": self.name, **asdict(self), "grids": [list(pair) for pair in self.grids]}

    def round_(self, block: Block, names: set[str] | None = None, importance: torch.Tensor | None = None) -> None:
        """Round matrices of a block to nearest, by default all that have a grid and are not packed yet."""
        for name, grid, weight in self.matrices(block):
            if name not in block.packed and (names is None or name in names):
                block.pack_(name, self.round(name, grid, weight, importance))

    def round(
        self, name: str, grid: Grid, weight: torch.Tensor, importance: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """One matrix rounded to nearest."""
        return quantize(weight, grid, self.scale_dtype, name, self.clip, importance)

    def matrices(self, block: Block) -> Iterator[tuple[str, Grid, torch.Tensor]]:
        """(name, grid, weight) of the matrices of a block that are to be put on a grid."""
        precision = self.precision
        for name, spec, weight in block.matrices():
            grid = precision.grid_of(spec)
            if grid is not None:
                yield name, grid, weight


def relative_error(block: Block, originals: dict[str, torch.Tensor]) -> Measurement:
    """The row of a finished block: ||W - W'||^2 / ||W||^2 over the matrices that were changed."""
    error = sum(squared_error(weight, block.tensor(name)) for name, weight in originals.items())
    norm = sum(squared_norm(weight) for weight in originals.values())
    return Measurement("relative_error", error / norm if norm else 0.0, "1", block.name)


def embedding_grid(linear: Grid, bits: int | None) -> Grid | None:
    """The grid of embedding and head: the linears' own at equal bits (the one mix that a tied model loads with in
    stock transformers), 8 bits per row otherwise, as one kernel serves lookup and head there."""
    if bits is None:
        return None
    if bits == linear.bits:
        return linear
    if bits == 8:
        return Grid(8, None, linear.symmetric)
    return Grid(bits, linear.group_size, linear.symmetric, linear.scale_bits)
