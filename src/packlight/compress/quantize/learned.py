"""Learned rounding: codes and scales of a block are trained together until its output is that of the original block.

GPTQ fits every matrix on its own; here the matrices of a block make up for each other. Starting from GPTQ's result,
every weight gets a latent value v in units of the step, rounded on the way forward and passed through on the way back
(the straight-through estimator, Bengio et al., arXiv 1308.3432), and every scale a factor:

    w' = (clamp(round(v)) - zero_point) * scale * exp(f)
    loss = mean over tokens t of a_t |block'(x_t) - block(x~_t)|^2

with x what enters the block now and x~ what entered the original one (BRECQ, arXiv 2102.05426; the block-wise stage of
EfficientQAT, arXiv 2407.11062, section 3.2). a_t is how much the token matters to what the model predicts, by its
gradient; where no tokens are weighted, one over the mean square of the original's output, at least that of the median
token: otherwise the few tokens with enormous activations would be all that counts.

A part of the windows is held out; a block whose loss there did not fall keeps GPTQ's result. It pays at 3 and 2 bits,
and takes several times as long as GPTQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from packlight.compress.quantize.gptq import Gptq
from packlight.compress.walk import Activations, Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import CodedScale, QuantizedTensor, round_to_dtype
from packlight.plan.memory import Reading
from packlight.spec import Grid

HELD_OUT = 8
"""One window in this many is held out, at least one where there are two."""
NEAR_EDGE = 0.4
"""A latent value starts where the original weight lies, but within this of GPTQ's code. Nearer to the edge at 0.5 the
noise of the first steps undoes what GPTQ has found: `evidence/learned-start.jsonl`."""
TRAINED_TOGETHER = 2
"""Windows that one step of the optimizer sees."""


@dataclass(frozen=True)
class Learned(Gptq):
    """Block-wise training of codes and scales, from GPTQ's result on.

    Args:
        epochs: times that every calibration window is trained on.
        code_rate: step of the optimizer (Adam) for latent values, in units of a quantization step.
        scale_rate: the same for the logarithms of scales.
    """

    epochs: int = 4
    code_rate: float = 0.01
    scale_rate: float = 0.005

    name: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.epochs, int) and self.epochs >= 1):
            raise UsageError(f"epochs must be at least 1, not {self.epochs}")
        for name in ("code_rate", "scale_rate"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} is above 0 and below 1, not {getattr(self, name)}")

    @property
    def reading(self) -> Reading:
        """GPTQ's and one for the targets, and for every epoch one forward and one back, to inputs and weights."""
        gptq = super().reading
        passes = gptq.passes + (not gptq.keeps_targets) + 3 * self.epochs
        return replace(gptq, passes=passes, keeps_targets=True)

    def _solve(self, block: Block, originals: dict[str, torch.Tensor]) -> Measurement:
        rounded = super()._solve(block, originals)
        if not originals:
            return rounded
        assert block.activations is not None
        start = {name: block.packed[name] for name in originals}
        learners = {name: _Learner(originals[name], packed, self.scale_dtype) for name, packed in start.items()}
        train, held_out = _split(len(block.activations.inputs))
        before = _loss(block, block.activations, held_out)
        self._train(block, block.activations, learners, train)
        for name, learner in learners.items():
            block.pack_(name, learner.result())
        after = _loss(block, block.activations, held_out)
        if not after < before:
            for name, packed in start.items():
                block.pack_(name, packed)
        return Measurement(
            "block_loss",
            min(after, before),
            "1",
            block.name,
            predicted=before,
            note="relative squared error of the block's output on held-out windows; predicted: that of GPTQ",
        )

    def _train(self, block: Block, activations: Activations, learners: dict[str, _Learner], windows: list[int]) -> None:
        codes = [learner.latent for learner in learners.values()]
        factors = [learner.factor for learner in learners.values()]
        optimizer = torch.optim.Adam(
            [{"params": codes, "lr": self.code_rate}, {"params": factors, "lr": self.scale_rate}], betas=(0.9, 0.99)
        )
        generator = torch.Generator().manual_seed(0)
        steps = self.epochs * -(-len(windows) // TRAINED_TOGETHER)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        with torch.enable_grad(), _learning(block, learners):
            for _ in range(self.epochs):
                order = torch.randperm(len(windows), generator=generator)
                for chosen in torch.tensor(windows)[order].split(TRAINED_TOGETHER):
                    optimizer.zero_grad()
                    _batch_loss(block, activations, chosen).backward()
                    optimizer.step()
                    decay.step()


class _Learner(nn.Module):
    """A matrix whose codes and scales can be trained."""

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, original: torch.Tensor, packed: QuantizedTensor, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.grid, self.scale_dtype = packed, packed.grid, scale_dtype
        group = packed.shape[1] // packed.scale.shape[1]
        self.register_buffer("scale", packed.scale.float().repeat_interleave(group, dim=1))
        zero = torch.zeros_like(packed.scale) if packed.zero_point is None else packed.zero_point
        self.register_buffer("zero", zero.float().repeat_interleave(group, dim=1))
        code = packed.codes.float()
        near = (original.float() / self.scale + self.zero).clamp(code - NEAR_EDGE, code + NEAR_EDGE)
        self.latent = nn.Parameter(near)
        # Where scales are coded, their row's unit is trained; one by one they would not stay on their codes.
        self.factor = nn.Parameter(torch.zeros(packed.shape[0], 1 if self._is_coded else packed.scale.shape[1]))

    @property
    def _is_coded(self) -> bool:
        return self.packed.coded_scale is not None

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """The matrix as it would be stored but for the rounding of its scales; takes the module's own weight and
        leaves it out of account."""
        grid: Grid = self.grid
        rounded = self.latent + (self.latent.round() - self.latent).detach()
        code = rounded.clamp(grid.qmin, grid.qmax)
        factor = self.factor.exp().repeat_interleave(self.latent.shape[1] // self.factor.shape[1], dim=1)
        return (code - self.zero) * self.scale * factor

    @torch.no_grad()
    def result(self) -> QuantizedTensor:
        """Codes and scales as they are stored."""
        codes = self.latent.round().clamp(self.grid.qmin, self.grid.qmax).to(torch.int8)
        factor = self.factor.exp()
        if self.packed.coded_scale is None:
            scale = round_to_dtype(self.packed.scale.float() * factor, self.scale_dtype)
            return replace(self.packed, codes=codes, scale=scale)
        coded = self.packed.coded_scale
        coded = CodedScale(coded.codes, round_to_dtype(coded.unit.float() * factor, self.scale_dtype))
        return replace(self.packed, codes=codes, scale=coded.value(), coded_scale=coded)


@contextmanager
def _learning(block: Block, learners: dict[str, _Learner]) -> Iterator[None]:
    """The block's modules compute with what is being trained."""
    owners = {name: block.owner(name) for name in learners}
    for name, learner in learners.items():
        parametrize.register_parametrization(owners[name], "weight", learner, unsafe=True)
    try:
        yield
    finally:
        for owner in owners.values():
            parametrize.remove_parametrizations(owner, "weight", leave_parametrized=False)


def _split(count: int) -> tuple[list[int], list[int]]:
    """Windows to train on, and windows held out; both the same where there is only one."""
    held_out = list(range(0, count, HELD_OUT)) if count > 1 else [0]
    train = [place for place in range(count) if place not in set(held_out)]
    return train or held_out, held_out


@torch.no_grad()
def _loss(block: Block, activations: Activations, windows: list[int]) -> float:
    parts = torch.tensor(windows).split(activations.batch)
    return sum(float(_batch_loss(block, activations, part)) * len(part) for part in parts) / len(windows)


def _batch_loss(block: Block, activations: Activations, windows: torch.Tensor) -> torch.Tensor:
    """Squared error of the block's output over the mean square of the original's, as a mean over tokens."""
    out = activations.run(block.module, activations.inputs[windows])
    wanted = activations.targets[windows]
    error, power = (out - wanted).square().mean(dim=-1), wanted.square().mean(dim=-1)  # (windows, tokens)
    weights = activations.weights([block.name], windows)
    if weights is None:
        return (error / power.clamp(min=power.median())).mean()
    loss: torch.Tensor = (error * weights).mean() / power.median()
    return loss
