"""Another floating-point type for every weight: bfloat16 takes half the bytes of float32 and loses hardly anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.compress.step import Claim, check_claim, claim
from packlight.compress.walk import Block
from packlight.errors import CheckpointError
from packlight.evidence import Measurement
from packlight.ops.grid import squared_error, squared_norm
from packlight.plan.memory import CalibrationSize
from packlight.spec import ModelSpec, Precision


@dataclass(frozen=True)
class Cast:
    """Store every weight in `dtype`.

    Raises:
        UsageError: not float32, bfloat16 or float16.
    """

    dtype: str = "bfloat16"

    name: ClassVar[str] = "cast"
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    breaks: ClassVar[frozenset[str]] = frozenset()
    needs_inputs: ClassVar[bool] = False
    loss_share: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        Precision(self.dtype)  # checks the name

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        return Precision(self.dtype)

    @property
    def needs_guide(self) -> bool:
        """No token is looked at."""
        return False

    @property
    def passes(self) -> float:
        """None."""
        return 0.0

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone."""
        return claim(spec, self.precision, calibration)

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Round every tensor to `dtype`; one row per block: ||W - W'||^2 / ||W||^2.

        Raises:
            CheckpointError: a weight is not finite, or does not fit into `dtype`.
        """
        for block in blocks:
            yield Measurement("relative_error", self._error(block), "1", block.name)

    def _error(self, block: Block) -> float:
        error = norm = 0.0
        for name in block.tensors:
            exact = block.tensor(name)
            rounded = exact.to(getattr(torch, self.dtype))
            if not all(map(math.isfinite, map(float, rounded.aminmax()))):  # isfinite() would take as much again
                raise CheckpointError(f"{name} holds values that are not finite in {self.dtype}")
            error += squared_error(exact, rounded)
            norm += squared_norm(exact)
        return error / norm if norm else 0.0

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones."""
        yield from check_claim(self.plan(spec), artifact)

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them."""
        return {"method": self.name, **asdict(self)}
