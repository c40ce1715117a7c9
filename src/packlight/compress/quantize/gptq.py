"""GPTQ: every matrix is rounded so that its output, not its weights, changes least on a calibration text.

The text passes through the blocks as they are compressed, so that each matrix is fitted to what will really reach it.
`ops/gptq.py` has the arithmetic. Act-order is on by default: small Llama-type models come out worse than rounding to
nearest without it. Its limits: it minimizes each layer's error on its own, and at 2 bits that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.listen import input_groups
from packlight.compress.moments import gather
from packlight.compress.quantize.options import GridOptions, relative_error
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.gptq import DAMPING, gptq, output_error
from packlight.ops.grid import Clip, QuantizedTensor
from packlight.plan.memory import Reading
from packlight.spec import Grid

SHARE, END_SHARE = 0.6, 0.4
"""What is left of the loss of rounding to nearest inside the blocks, and in embedding and head."""
END_ROWS = 8192
"""Rows of embedding and head that are rounded at once."""


@dataclass(frozen=True)
class Gptq(GridOptions):
    """GPTQ (arXiv 2210.17323) and its asymmetric form GPTAQ (arXiv 2504.02692).

    Args:
        act_order: round the columns with the largest activations first.
        static_groups: fit the points of all groups before the first column is rounded; act-order needs it.
        true_sequential: within a block, let each group of matrices see its inputs after the groups before it have been
            rounded; otherwise all inputs are gathered in one pass.
        damping: share of the mean diagonal of H that is added to its diagonal.
        guided: weight every token by the root of its gradient's square, so that a matrix is fitted to the tokens that
            matter to what the model predicts (in the spirit of GuidedQuant, arXiv 2505.07004, which weights by the
            square for each group of rows), and embedding and head to what passes there. It costs a pass forward and
            back over the text before the first block; without it, embedding and head are rounded to nearest.
        asymmetry: how much of the difference between what enters a layer of the original and what enters it now is
            made up for, 0 (GPTQ) to 1 (GPTAQ as derived; its authors' code takes 0.25).
    """

    clip: Clip = "mse"
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damping: float = DAMPING
    guided: bool = True
    asymmetry: float = 0.0

    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is above 0 and at most 1, not {self.damping}")
        if not 0 <= self.asymmetry <= 1:
            raise UsageError(f"asymmetry is 0 to 1, not {self.asymmetry}")
        if self.act_order and not self.static_groups:
            raise UsageError("act-order needs static groups")

    @property
    def reading(self) -> Reading:
        """One pass on to the next block and one to gather inputs; half as much again where each group of matrices has
        its own pass, which ends at the group; all of that again in the original block for asymmetry; twice forward and
        once back to weight tokens."""
        gathering = 1.5 if self.true_sequential else 1.0
        passes = (1 + gathering) * (2 if self.asymmetry else 1) + (3 if self.guided else 0)
        return Reading(passes, weighs_tokens=self.guided, keeps_targets=self.asymmetry > 0)

    def loss_share(self, is_end: bool) -> float:
        """As measured on the demo model at 3 and 4 bits."""
        if is_end:
            return END_SHARE if self.guided else 1.0
        return SHARE

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Matrices inside the blocks by GPTQ, embedding and head too where tokens are weighted, to nearest where they
        are not; one row per block."""
        for block in blocks:
            originals = {name: weight for name, _, weight in self.matrices(block)}
            if block.activations is not None:
                yield self._solve(block, originals)
            else:
                self._solve_ends(block)
                yield relative_error(block, originals)

    @torch.no_grad()
    def _solve_ends(self, block: Block) -> None:
        for name, grid, weight in list(self.matrices(block)):
            if name in block.moments:
                # No row hears of another one: some at a time keep the memory small, whatever the vocabulary.
                parts = [self._round(name, part, block.moments[name], grid) for part in weight.split(END_ROWS)]
                block.pack_(name, QuantizedTensor.stacked(parts))
        self.round_(block)

    def _round(
        self, name: str, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, cross: torch.Tensor | None = None
    ) -> QuantizedTensor:
        order, static = self.act_order, self.static_groups
        return gptq(
            weight, hessian, grid, self.scale_dtype, order, static, self.clip, self.damping, cross=cross, name=name
        )

    @torch.no_grad()
    def _solve(self, block: Block, originals: dict[str, torch.Tensor]) -> Measurement:
        grids = {name: grid for name, grid, _ in self.matrices(block)}
        groups = input_groups(block, list(grids))
        error = norm = 0.0
        moments = {} if self.true_sequential else gather(block, groups, originals, self.asymmetry)
        for group in groups:
            if self.true_sequential:
                moments = gather(block, [group], originals, self.asymmetry)
            hessian, cross = moments[group]
            for name in group.names:
                block.pack_(name, self._round(name, originals[name], hessian, grids[name], cross))
                error += output_error(originals[name], block.tensor(name), hessian)
                norm += output_error(originals[name], torch.zeros_like(originals[name]), hessian)
        return Measurement(
            "relative_output_error",
            error / norm if norm else 0.0,
            "1",
            block.name,
            note="||(W - W') X||^2 / ||W X||^2 on the calibration text",
        )
