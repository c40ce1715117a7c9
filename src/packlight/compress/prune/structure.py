"""What every method shares that takes whole structures out of a model: the result is a smaller model of the same
architecture, dense, and a plain directory that stock transformers loads."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from packlight.checkpoint.open import Checkpoint
from packlight.compress.step import Claim, DenseStep
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.plan.layout import artifact_bytes
from packlight.plan.memory import CalibrationSize
from packlight.spec import ModelSpec


@dataclass(frozen=True)
class StructuredPruning(DenseStep):
    """How much of the structures goes.

    Args:
        sparsity: share of them, from 0 to below 1.
        dtype: of every floating-point tensor of the result.

    Raises:
        UsageError: a value outside these.
    """

    sparsity: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.sparsity, int | float) and 0 <= self.sparsity < 1):
            raise UsageError(f"sparsity is a share from 0 to below 1, not {self.sparsity}")

    @abstractmethod
    def reshaped(self, spec: ModelSpec) -> ModelSpec:
        """The shapes of the result.

        Raises:
            UsageError: nothing would go although something was asked to, or nothing would stay, or the model is of a
                kind that the method does not know.
        """

    @abstractmethod
    def in_words(self, spec: ModelSpec) -> str:
        """What goes, such as '6 of 30 blocks'."""

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone; raises what `reshaped` does."""
        if any(tensor.kind == "expert" for tensor in spec.tensors):
            raise UsageError(f"{spec.name} holds stacks of experts, which packlight cannot prune yet")
        return super().plan(spec, calibration)

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones, the parameters that are gone beside those that were to go, and the bytes
        that the whole model takes in the same dtype."""
        yield from super().measure(spec, artifact)
        share, planned = (1 - of.num_params / spec.num_params for of in (artifact.spec, self.reshaped(spec)))
        yield Measurement("removed", share, "1", "packed", predicted=planned, note=self.in_words(spec))
        whole = artifact_bytes(spec, self.precision)
        note = f"of the weight files in {self.dtype} with nothing removed"
        yield Measurement("whole_bytes", whole, "bytes", "packed", note=note)


def rounded(value: float) -> int:
    """To the nearest whole number, half up."""
    return math.floor(value + 0.5)
