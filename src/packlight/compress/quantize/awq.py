"""AWQ: the input channels that carry large activations are scaled up before rounding, and so lose less in it.

The matrices that share an input get one factor for each of its channels, whose inverse is folded into what makes that
input (Lin et al., "AWQ", arXiv 2306.00978):

    W x = (W diag(s)) (diag(1/s) x),   s_j = (mean |x_j|)^a / sqrt(max * min),   a = 0, 1/n, .. (n - 1)/n

a is the one with the least error of the whole block's output, so that what queries and keys, or gate and up, make of
each other counts; the range of each group of weights is then searched with the squared inputs as importance. The
inverse goes into a norm, or into the rows of an earlier matrix. Neither is known by name: a norm is one whose output is
the very tensor that enters, and every fold is tried on a window and kept only where the block's output stays.

Its limits: where nothing can be folded (o_proj where heads share their values, anything behind GELU) a matrix is only
rounded with the importance of its inputs; and rounding errors are made smaller, not made up for as in GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from packlight.compress.listen import Group, input_groups, inputs_of, listening
from packlight.compress.quantize.options import GridOptions, relative_error
from packlight.compress.walk import Activations, Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.gptq import output_error
from packlight.ops.grid import Clip, quantize
from packlight.plan.memory import Reading
from packlight.spec import Grid

TOLERANCE = 1e-4
"""A fold may leave this share of what its scales alone change in the block's output."""
NOISE = 1e-6
"""And this share of the output itself, which is what float32 leaves of it."""
LEAST_MEAN = 1e-4
"""A channel's mean |x| counts as at least this share of all channels' mean: a dead one must not stretch the range."""
OFFSETS = (0.0, 1.0)
"""What norms may add to their weight before they multiply with it."""


@dataclass(frozen=True)
class Awq(GridOptions):
    """AWQ; see `GridOptions` for the grid.

    Args:
        exponents: values of a that are tried, n above.
        sample: one window in this many is run for each of them.
        guided: weight every token by the root of its gradient's square, in the importance of a channel and in the error
            of a block's output. It costs a pass forward and back over the text before the first block.
    """

    clip: Clip = "mse"
    exponents: int = 20
    sample: int = 8
    guided: bool = True

    name: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("exponents", "sample"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def reading(self) -> Reading:
        """One pass on to the next block, one for the mean inputs, one and a half to round each group of matrices after
        those before it; the search in some windows, for four groups; twice forward and once back to weight tokens."""
        search = 4 * self.exponents / self.sample
        return Reading(1 + 1 + 1.5 + search + (3 if self.guided else 0), weighs_tokens=self.guided)

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """Matrices inside the blocks by AWQ, embedding and head to nearest; one row per block."""
        for block in blocks:
            if block.activations is not None:
                yield self._solve(block, block.activations)
            else:
                originals = {name: weight for name, _, weight in self.matrices(block)}
                self.round_(block)
                yield relative_error(block, originals)

    @torch.no_grad()
    def _solve(self, block: Block, activations: Activations) -> Measurement:
        grids = {name: grid for name, grid, _ in self.matrices(block)}
        # Those without a grid too: they share inputs with others.
        matrices = [name for name, _, _ in block.matrices() if isinstance(block.owner(name), nn.Linear)]
        groups = input_groups(block, matrices)
        chosen = self._scale_(block, activations, groups, grids)
        error = norm = 0.0
        for group in groups:
            rounded = [name for name in group.names if name in grids]
            moments = _moments(block, activations, group) if rounded else torch.empty(0)
            for name in rounded:
                weight = block.tensor(name)
                block.pack_(name, self.round(name, grids[name], weight, moments.diagonal()))
                error += output_error(weight, block.tensor(name), moments)
                norm += output_error(weight, torch.zeros_like(weight), moments)
        return Measurement(
            "relative_output_error",
            error / norm if norm else 0.0,
            "1",
            block.name,
            note="||(W - W') X||^2 / ||W X||^2 on the calibration text; exponents "
            + (", ".join(f"{name} {exponent:.2f}" for name, exponent in chosen.items()) or "none"),
        )

    def _scale_(
        self, block: Block, activations: Activations, groups: list[Group], grids: Mapping[str, Grid]
    ) -> dict[str, float]:
        """Scale every group whose scales can be folded; returns each one's exponent by its first matrix.

        The groups before one are rounded while its exponent is looked for, those after it are not. No fold is made
        before all exponents are known, for that of a later group changes the rows of an earlier one.
        """
        folds = find_folds(block, groups)
        inputs = _mean_inputs(block, activations, groups)
        output = _Output(block, activations, self.sample)
        before: dict[str, torch.Tensor] = {}
        chosen: dict[Group, float] = {}
        for group in groups:

            def rounded(exponent: float, clip: Clip, group: Group = group) -> dict[str, torch.Tensor]:
                return self._rounded(block, group, inputs[group], grids, exponent, clip)

            def loss(exponent: float, clip: Clip) -> float:
                return output.error({**before, **rounded(exponent, clip)})

            if folds[group] is not None and not grids.keys().isdisjoint(group.names):
                chosen[group] = self._best(loss)
            before.update(rounded(chosen.get(group, 0.0), self.clip))
        for group, exponent in chosen.items():
            fold = folds[group]
            if fold is not None and exponent > 0:
                fold_(block, group, fold, inputs[group].scale(exponent), self.scale_dtype)
        return {
            group.names[0].removeprefix(f"{block.name}.").removesuffix(".weight"): exponent
            for group, exponent in chosen.items()
        }

    def _best(self, loss: Callable[[float, Clip], float]) -> float:
        """The exponent with the least loss. It is searched with the whole range of each group of weights, which is far
        cheaper than with the best range; with that, the winner has to be better than not scaling."""
        best = min((step / self.exponents for step in range(self.exponents)), key=lambda a: loss(a, "minmax"))
        if self.clip == "minmax" or best == 0:
            return best
        return min((0.0, best), key=lambda a: loss(a, self.clip))

    def _rounded(
        self, block: Block, group: Group, inputs: _Inputs, grids: Mapping[str, Grid], exponent: float, clip: Clip
    ) -> dict[str, torch.Tensor]:
        """The matrices of a group as they are after scaling, rounding and scaling back."""
        scale = inputs.scale(exponent)
        found = {}
        for name in (name for name in group.names if name in grids):
            scaled, importance = block.tensor(name) * scale, inputs.square / scale.square()
            packed = quantize(scaled, grids[name], self.scale_dtype, name, clip, importance)
            found[name] = packed.dequantize().float() / scale
        return found


@dataclass(frozen=True)
class Fold:
    """Where the inverse of a group's scales can go.

    Args:
        weight: a norm's vector, or an earlier matrix, of which the last rows make the group's input; of queries, keys
            and values in one matrix, or of gate and up, those are the right ones.
        bias: of the same module; None where it has none.
        offset: what a norm adds to its weight before it multiplies.
    """

    weight: str
    bias: str | None
    offset: float = 0.0


def find_folds(block: Block, groups: list[Group]) -> dict[Group, Fold | None]:
    """For each group a fold that leaves the output of the block as it is; None where there is none.

    Args:
        groups: in the order in which a token meets them.
    """
    found: dict[Group, Fold | None] = {}
    before: tuple[str, ...] = ()
    for group in groups:
        cols = block.tensor(group.names[0]).shape[1]
        norms = [Fold(name, _bias(block, name), offset) for name in _norms(block, group) for offset in OFFSETS]
        earlier = [Fold(name, _bias(block, name)) for name in before if len(block.tensor(name)) >= cols]
        found[group] = next((fold for fold in norms + earlier if _is_exact(block, group, fold)), None)
        before = group.names
    return found


def fold_(block: Block, group: Group, fold: Fold, scale: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Multiply the columns of the group by `scale` (cols,), and divide by it where its input is made.

    Args:
        dtype: in which a norm's weight is going to be stored. It is rounded to it here, and the columns take the factor
            that makes up for the rounding.
    """
    cols = len(scale)
    weight = block.tensor(fold.weight)
    if weight.ndim == 1:
        had = weight + fold.offset
        divided = had / scale - fold.offset
        if dtype is not None:
            divided = divided.to(dtype).to(weight.dtype)
        has = divided + fold.offset
        # A weight of zero passes nothing on whatever its factor; one that would be rounded to zero stays as it was.
        divided = torch.where((has == 0) & (had != 0), weight, divided)
        scale = torch.where(had == 0, scale, torch.where(has == 0, torch.ones_like(scale), had / has))
        block.put_(fold.weight, divided)
    else:
        block.put_(fold.weight, torch.cat([weight[:-cols], weight[-cols:] / scale.unsqueeze(1)]))
    if fold.bias is not None:
        bias = block.tensor(fold.bias)
        block.put_(fold.bias, torch.cat([bias[:-cols], bias[-cols:] / scale]))
    for name in group.names:
        block.put_(name, block.tensor(name) * scale)


def _is_exact(block: Block, group: Group, fold: Fold) -> bool:
    """Whether the fold leaves the block's output as it is, on one window and with scales that are powers of two, so
    that no rounding error comes in between."""
    assert block.activations is not None
    hidden = block.activations.inputs[:1]
    scale = torch.exp2(torch.arange(block.tensor(group.names[0]).shape[1]) % 3 - 1.0)
    changed = [*group.names, fold.weight, *([fold.bias] if fold.bias else [])]
    before = block.activations.run(block.module, hidden)
    with block.showing({name: block.tensor(name) * scale for name in group.names}):
        alone = block.activations.run(block.module, hidden)
    with block.showing({name: block.tensor(name) for name in changed}):
        fold_(block, group, fold, scale)
        after = block.activations.run(block.module, hidden)
    # For each token on its own: a few have activations beside which the errors of all others vanish.
    allowed = TOLERANCE * (alone - before).norm(dim=-1) + NOISE * before.norm(dim=-1)
    return bool(((after - before).norm(dim=-1) <= allowed).all())


def _norms(block: Block, group: Group) -> list[str]:
    """Vectors of modules whose output is the very tensor that enters the group."""
    assert block.activations is not None
    cols = block.tensor(group.names[0]).shape[1]
    made: dict[str, torch.Tensor] = {}  # kept: while a tensor lives, no other has its address
    entered: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        return lambda module, args, out: made.update({name: out}) if isinstance(out, torch.Tensor) else None

    vectors = [name for name in block.tensors if block.tensor(name).shape == (cols,) and not name.endswith(".bias")]
    owners = {name: block.owner(name) for name in vectors}
    handles = [
        owner.register_forward_hook(hook(name)) for name, owner in owners.items() if not isinstance(owner, nn.Linear)
    ]
    with listening(block, {group.names[0]: lambda _, x: entered.append(x)}):
        block.activations.run(block.module, block.activations.inputs[:1])
    for handle in handles:
        handle.remove()
    return [name for name, out in made.items() if entered and out.data_ptr() == entered[0].data_ptr()]


def _bias(block: Block, weight: str) -> str | None:
    name = f"{weight.rpartition('.')[0]}.bias"
    return name if name in block.tensors else None


@dataclass(frozen=True)
class _Inputs:
    """Means over the calibration text of |x| and, with its tokens weighted, of x^2, (cols,) each."""

    size: torch.Tensor
    square: torch.Tensor

    def scale(self, exponent: float) -> torch.Tensor:
        """s, (cols,)."""
        tiny = torch.finfo(self.size.dtype).tiny
        s = (self.size / self.size.mean().clamp(min=tiny)).clamp(min=LEAST_MEAN).pow(exponent)
        return s / (s.max() * s.min()).sqrt()


def _mean_inputs(block: Block, activations: Activations, groups: list[Group]) -> dict[Group, _Inputs]:
    cols = {group: block.tensor(group.names[0]).shape[1] for group in groups}
    sums = {group.names[0]: _Inputs(torch.zeros(cols[group]), torch.zeros(cols[group])) for group in groups}
    by_name = {group.names[0]: group for group in groups}
    tokens = activations.inputs.shape[0] * activations.inputs.shape[1]

    for part in activations.batches():

        def note(name: str, x: torch.Tensor, part: slice = part) -> None:
            weights = activations.weights(by_name[name].names, part)
            x = x.reshape(-1, x.shape[-1])
            square = x.square() if weights is None else x.square() * weights.reshape(-1, 1)
            sums[name].size.add_(x.abs().sum(dim=0) / tokens)
            sums[name].square.add_(square.sum(dim=0) / tokens)

        with listening(block, dict.fromkeys(by_name, note)):
            activations.run(block.module, activations.inputs[part])
    return {group: sums[name] for name, group in by_name.items()}


def _moments(block: Block, activations: Activations, group: Group) -> torch.Tensor:
    """Sum of x x^T over all tokens, each with its weight, (cols, cols)."""
    cols = block.tensor(group.names[0]).shape[1]
    moments = torch.zeros(cols, cols)
    for part in activations.batches():
        x = inputs_of(block, group.names[0], activations.inputs[part])
        weights = activations.weights(group.names, part)
        moments.addmm_(x.T, x if weights is None else x * weights.reshape(-1, 1))
    return moments


class _Output:
    """What a block makes of some of the windows before anything in it is rounded."""

    def __init__(self, block: Block, activations: Activations, sample: int) -> None:
        self.block, self.activations = block, activations
        self.parts = torch.arange(0, len(activations.inputs), sample).split(activations.batch)
        self.wanted = [self._run(part) for part in self.parts]

    def error(self, shown: dict[str, torch.Tensor]) -> float:
        """Mean squared error of the output with other matrices, tokens weighted by what they matter to the model's
        predictions; where that is not known, by one over their mean square, at least that of the median token:
        otherwise the few with enormous activations would be all that counts."""
        total = 0.0
        with self.block.showing(shown):
            for part, wanted in zip(self.parts, self.wanted, strict=True):
                error = (self._run(part) - wanted).square().mean(dim=-1)  # (windows, tokens)
                weights = self.activations.weights([self.block.name], part)
                if weights is None:
                    power = wanted.square().mean(dim=-1)
                    weights = power.clamp(min=power.median()).reciprocal()
                total += float((error * weights).sum())
        return total

    def _run(self, part: torch.Tensor) -> torch.Tensor:
        return self.activations.run(self.block.module, self.activations.inputs[part])
