"""What every compression step promises, and the nouns it speaks in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from packlight.checkpoint.open import Checkpoint
from packlight.compress.walk import Block
from packlight.evidence import Measurement
from packlight.plan.memory import CalibrationSize, Reading, disk_bytes, job_plan
from packlight.spec import ModelSpec, Precision


@dataclass(frozen=True)
class Claim:
    """What a step says before any weight is read.

    Args:
        precision: how the result stores its weights.
        disk_bytes: exact size of the artifact's weight files.
        peak_bytes: what the compression job adds to the process at its peak.
        minutes: how long the job takes.
    """

    precision: Precision
    disk_bytes: int
    peak_bytes: int
    minutes: float


class Step(Protocol):
    """A compression method: frozen hyper-parameters and three verbs. Construction checks ranges and does no work.

    `needs` and `breaks` are traits of a checkpoint, such as `dense` (weights are floating point): a step is refused
    before any weight is read where a trait that it needs is absent, and later steps lose the traits it breaks.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    breaks: ClassVar[frozenset[str]]

    @property
    def reading(self) -> Reading | None:
        """What `apply_` asks of a calibration text; None for a step that does without, and that finds no
        `Block.activations`."""
        ...

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        ...

    def loss_share(self, is_end: bool) -> float:
        """What is left of the loss of rounding to nearest, about, in embedding and head and inside the blocks; 1 for a
        method that is no better."""
        ...

    def reshaped(self, spec: ModelSpec) -> ModelSpec:
        """The shapes of the result; `spec` itself where none changes. Raises UsageError as `plan` does."""
        ...

    def reconfigured(self, config: Mapping[str, Any], removed: Sequence[int]) -> Mapping[str, Any]:
        """The config of the result, before anything about its precision, where the blocks `removed`, counted from 0,
        are gone; `config` itself where no shape changes."""
        ...

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """The claim, from shapes alone. Raises UsageError where the step cannot be applied to this model."""
        ...

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Change each block in place as it comes round, and yield one row of evidence per block.

        A row is yielded after its block is finished: whoever drives the loop may store the block then.
        """
        ...

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Check the claim on the result alone; `spec` is that of the original."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them, `method` first."""
        ...


class KeepsShapes:
    """What the steps share whose result has the shapes and the config of the original."""

    def reshaped(self, spec: ModelSpec) -> ModelSpec:
        """No shape changes."""
        return spec

    def reconfigured(self, config: Mapping[str, Any], removed: Sequence[int]) -> Mapping[str, Any]:
        """The config stays."""
        return config


@dataclass(frozen=True)
class DenseStep(KeepsShapes):
    """What the steps whose result is on no grid share: they read no text, and break nothing.

    Args:
        dtype: of every floating-point tensor of the result.

    Raises:
        UsageError: not float32, bfloat16 or float16.
    """

    dtype: str = "bfloat16"

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    breaks: ClassVar[frozenset[str]] = frozenset()
    reading: ClassVar[None] = None

    def __post_init__(self) -> None:
        Precision(self.dtype)  # checks the name

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        return Precision(self.dtype)

    def loss_share(self, is_end: bool) -> float:
        """Nothing is put on a grid."""
        return 1.0

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone."""
        return claim(spec, self.precision, calibration, self.reshaped(spec))

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones."""
        yield from check_claim(self.plan(spec), artifact)

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them."""
        return {"method": self.name, **asdict(self)}


def claim(
    spec: ModelSpec,
    precision: Precision,
    calibration: CalibrationSize | None = None,
    result: ModelSpec | None = None,
) -> Claim:
    """What every block-by-block step claims: the exact bytes of its precision, and the walk's own peak and time.

    Args:
        result: the shapes of what is written, where they are not those of `spec`.
    """
    job = job_plan(spec, precision, calibration)
    return Claim(precision, disk_bytes(result or spec, precision).total, job.peak_bytes, job.minutes)


def check_claim(made: Claim, artifact: Checkpoint) -> Iterator[Measurement]:
    """The bytes that were claimed beside those of the stored tensors."""
    stored = sum(entry.nbytes for entry in artifact.index.values())
    yield Measurement("tensor_bytes", stored, "bytes", "packed", predicted=made.disk_bytes)
