"""What every method shares that sets single weights to zero: how many, counted in what, and how the result is stored.

Zeros are asked of the matrices inside the blocks; embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from packlight.checkpoint.masked import masked_names, read_masked
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.tensors import read_tensor
from packlight.compress.listen import input_groups
from packlight.compress.moments import gather
from packlight.compress.step import Claim, DenseStep
from packlight.compress.walk import Block
from packlight.errors import CheckpointError, UsageError
from packlight.evidence import Measurement
from packlight.ops.gptq import output_error
from packlight.plan.layout import artifact_bytes
from packlight.plan.memory import CalibrationSize, Reading
from packlight.spec import ModelSpec, Precision, Sparsity

Storage = Literal["dense", "bitmask"]


@dataclass(frozen=True)
class PruneOptions(DenseStep):
    """How many weights go.

    Args:
        sparsity: share of zeros in the pruned matrices, from 0 to below 1; None is a half, or what N:M implies.
        scope: 'layer', 'row', 'global' or N:M; see `spec.Sparsity`.
        storage: 'dense' stores zeros like other numbers; 'bitmask' leaves them out of the file, in packlight's own
            layout, and they are back once the model is loaded.
        counts: zeros of every matrix for the scope 'global' (`compress.prune.share.counted` finds them).
        dtype: of every floating-point tensor of the result.

    Raises:
        UsageError: a value outside these, or a scope that the method does not take.
    """

    sparsity: float | None = None
    scope: str = "layer"
    storage: Storage = "dense"
    counts: tuple[tuple[str, int], ...] = ()

    scopes: ClassVar[tuple[str, ...]] = ("layer", "row")
    """What the method takes beside N:M."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage not in get_args(Storage):
            raise UsageError(f"storage is {' or '.join(get_args(Storage))}, not {self.storage!r}")
        # A recipe file holds lists.
        try:
            pairs = tuple((str(name), int(count)) for name, count in self.counts)
        except (TypeError, ValueError):
            raise UsageError(f"counts are pairs of a tensor's name and its zeros, not {self.counts!r}") from None
        object.__setattr__(self, "counts", pairs)
        asked = self.zeros  # checks the rest
        if asked.pattern is None and asked.scope not in self.scopes:
            raise UsageError(f"{self.name} counts zeros by {', '.join(self.scopes)} or N:M, not {self.scope}")

    @property
    def zeros(self) -> Sparsity:
        """How many weights go, counted in what."""
        return Sparsity.of(self.sparsity, self.scope, self.counts)

    @property
    def precision(self) -> Precision:
        """How the result stores its weights."""
        return Precision(self.dtype, sparse=self.zeros if self.storage == "bitmask" else None)

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone.

        Raises:
            UsageError: M divides no row of the model, the model has no matrix or has stacks of experts, or the zeros
                that a matrix takes of a global share are not known or more than it has weights.
        """
        if any(tensor.kind == "expert" for tensor in spec.tensors):
            raise UsageError(f"{spec.name} holds stacks of experts, which packlight cannot prune yet")
        names = {tensor.name for tensor in spec.tensors if self.zeros.covers(tensor)}
        if not names:
            raise UsageError(f"{spec.name} has no matrix inside its blocks: there is nothing to prune")
        if unknown := next((name for name, _ in self.counts if name not in names), None):
            raise UsageError(f"the recipe counts zeros of {unknown}, and {spec.name} has no such matrix")
        for tensor in spec.tensors:
            if not 0 <= self.zeros.num_zeros(tensor) <= tensor.numel:
                raise UsageError(f"{tensor.name} has {tensor.numel} weights and cannot take the zeros of the recipe")
        return super().plan(spec, calibration)

    def measure(self, spec: ModelSpec, artifact: Checkpoint) -> Iterator[Measurement]:
        """Claimed bytes beside stored ones, what they would be with every zero in them, and the zeros that are there
        beside those that were asked for."""
        yield from super().measure(spec, artifact)
        note = f"of the weight files in {self.dtype} with every zero in them"
        yield Measurement("dense_bytes", artifact_bytes(spec, Precision(self.dtype)), "bytes", "packed", note=note)
        yield sparsity_row(self.zeros, spec, artifact)

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as a recipe file holds them."""
        return {"method": self.name, **asdict(self), "counts": [list(pair) for pair in self.counts]}

    def matrices(self, block: Block) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, zeros, weight (rows, cols)) of the matrices of a block that are to be pruned.

        Raises:
            CheckpointError: one of them belongs to another module than a linear, whose rows need not be outputs.
        """
        for name, spec, weight in block.matrices():
            if not self.zeros.covers(spec):
                continue
            if not isinstance(owner := block.owner(name), nn.Linear):
                kind = type(owner).__name__
                raise CheckpointError(f"{name} belongs to a {kind}, and packlight prunes linear matrices alone so far")
            yield name, self.zeros.num_zeros(spec), weight


@dataclass(frozen=True)
class CalibratedPruning(PruneOptions):
    """What the methods share that look at what enters a matrix: block by block, each fed by the pruned blocks before
    it, the inputs of all matrices of a block gathered in one pass before the first of them is pruned."""

    @property
    def reading(self) -> Reading:  # type: ignore[override]  # of the methods that read nothing it is None
        """One pass on to the next block and one to gather inputs."""
        return Reading(2.0)

    @abstractmethod
    def pruned(self, name: str, weight: torch.Tensor, hessian: torch.Tensor, num_zeros: int) -> torch.Tensor:
        """`weight` (rows, cols) with its zeros, from the sum of x x^T (cols, cols) of its inputs."""

    @torch.no_grad()
    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """One row per block: ||(W - W') X||^2 / ||W X||^2 over its matrices, on the calibration text."""
        for block in blocks:
            yield Measurement(
                "relative_output_error",
                self._prune(block),
                "1",
                block.name,
                note="||(W - W') X||^2 / ||W X||^2 on the calibration text",
            )

    def _prune(self, block: Block) -> float:
        chosen = {name: (zeros, weight) for name, zeros, weight in self.matrices(block)}
        if not chosen:
            return 0.0
        error = norm = 0.0
        moments = gather(block, groups := input_groups(block, list(chosen)))
        for group in groups:
            hessian, _ = moments[group]
            for name in group.names:
                zeros, weight = chosen[name]
                changed = self.pruned(name, weight, hessian, zeros)
                error += output_error(weight, changed, hessian)
                norm += output_error(weight, torch.zeros_like(weight), hessian)
                block.put_(name, changed)
        return error / norm if norm else 0.0


def sparsity_row(asked: Sparsity, spec: ModelSpec, artifact: Checkpoint) -> Measurement:
    """Share of zeros in the pruned matrices of an artifact, beside the share that was asked for."""
    masked = masked_names(artifact.index)
    found = wanted = weights = 0
    for tensor in spec.tensors:
        if not asked.covers(tensor):
            continue
        base = tensor.name.removesuffix(".weight")
        weight = read_masked(artifact, base) if base in masked else read_tensor(artifact.index[tensor.name])
        found += int((weight == 0).sum())
        wanted += asked.num_zeros(tensor)
        weights += tensor.numel
    of_all = found / spec.num_params
    note = f"{found} of {weights} weights in the pruned matrices, {100 * of_all:.3g} % of all parameters"
    return Measurement("sparsity", found / weights, "1", "packed", predicted=wanted / weights, note=note)
