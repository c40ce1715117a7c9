"""How the matrices of a model share the zeros of a global count: by one threshold for all, found before the first is
pruned.

Magnitudes in float32 are ordered as their bits are when these are read as integers. So two passes over the weights,
one matrix in memory at a time, find the threshold exactly: the first counts by the upper 16 bits of a magnitude, the
second, where the count is reached, by the lower 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.tensors import read_tensor
from packlight.compress.prune.options import PruneOptions
from packlight.compress.step import Step
from packlight.spec import TensorSpec

_HALF = 1 << 16


def needs_counts(step: Step) -> bool:
    """Whether a step's zeros are still to be shared out."""
    return isinstance(step, PruneOptions) and step.scope == "global" and not step.counts


def counted(step: Step, checkpoint: Checkpoint, tick: Callable[[], None]) -> Step:
    """The step with the zeros of every matrix. `tick` is called twice, after each pass over the weights."""
    assert isinstance(step, PruneOptions)
    matrices = [tensor for tensor in checkpoint.spec.tensors if step.zeros.covers(tensor)]
    wanted = int(step.zeros.share * sum(tensor.numel for tensor in matrices) + 0.5)
    counts = shared_zeros(checkpoint, matrices, wanted, tick)
    return replace(step, counts=tuple(counts.items()))


def shared_zeros(
    checkpoint: Checkpoint, matrices: list[TensorSpec], wanted: int, tick: Callable[[], None]
) -> dict[str, int]:
    """By name, how many of the `wanted` smallest magnitudes of all matrices lie in each. Of equal ones, those of the
    earlier matrix go first."""
    upper = torch.zeros(len(matrices), _HALF, dtype=torch.int64)
    for place, bits in enumerate(_magnitudes(checkpoint, matrices)):
        upper[place] = torch.bincount(bits >> 16, minlength=_HALF)
    tick()
    edge, below = _reached(upper, wanted)
    lower = torch.zeros(len(matrices), _HALF, dtype=torch.int64)
    for place, bits in enumerate(_magnitudes(checkpoint, matrices)):
        lower[place] = torch.bincount(bits[bits >> 16 == edge] & (_HALF - 1), minlength=_HALF)
    tick()
    exact, less = _reached(lower, wanted - below)
    zeros = upper[:, :edge].sum(dim=1) + lower[:, :exact].sum(dim=1)
    left = wanted - below - less
    for place, equal in enumerate(lower[:, exact].tolist()):
        zeros[place] += min(equal, left)
        left -= min(equal, left)
    return {tensor.name: int(count) for tensor, count in zip(matrices, zeros, strict=True)}


def _magnitudes(checkpoint: Checkpoint, matrices: list[TensorSpec]) -> Iterator[torch.Tensor]:
    """|W| of one matrix after the other in float32, as the integers that their bits are."""
    for tensor in matrices:
        yield read_tensor(checkpoint.index[tensor.name]).float().abs().flatten().view(torch.int32)


def _reached(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The first bin of (matrices, bins) with which `wanted` are reached, and how many lie in the bins before it."""
    sums = counts.sum(dim=0).cumsum(dim=0)
    place = min(int(torch.searchsorted(sums, wanted)), len(sums) - 1)
    return place, int(sums[place - 1]) if place else 0
