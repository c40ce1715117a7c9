"""Another floating-point type for every weight: bfloat16 takes half the bytes of float32 and loses hardly anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.step import DenseStep
from packlight.compress.walk import Block
from packlight.errors import CheckpointError
from packlight.evidence import Measurement
from packlight.ops.grid import squared_error, squared_norm


@dataclass(frozen=True)
class Cast(DenseStep):
    """Store every weight in `dtype`."""

    name: ClassVar[str] = "cast"

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
