"""Channels of the MLPs go, equally many in every block: a narrower model of the same architecture.

    score_j = Var(x_j) ||W_:j||^2,   b = sum over channels that go of W_:j E x_j

x is what enters the down projection W. With channel j go a row of the gate and the up projection and a column of W, and
the bias b gives back what the channels contributed on average (An et al., "FLAP", arXiv 2312.11983). Two things differ
from the paper: attention heads stay, and every block loses the same number of channels, because a config has one
width. Where an architecture knows no bias there, or instead of it, the columns that stay can take over by least
squares. Its limit: the mean and the correlations of channels are those of the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from packlight.checkpoint.config import base_fields, changed_config
from packlight.compress.moments import input_moments
from packlight.compress.prune.structure import StructuredPruning, rounded
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.channels import (
    InputMoments,
    fluctuation,
    highest,
    input_size,
    least_squares,
    mean_bias,
    repaired_error,
)
from packlight.ops.gptq import DAMPING
from packlight.plan.memory import Reading
from packlight.plan.reshape import with_shapes
from packlight.spec import ModelSpec

Score = Literal["fluctuation", "wanda"]
Repair = Literal["bias", "least-squares", "affine", "none"]
READERS, WRITER = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
WITH_BIAS = ("llama", "granite", "smollm3")
"""Families whose config can give their MLPs biases (`mlp_bias`)."""
MULTIPLES = (256, 64, 32, 8)
"""Widths that engines like, best first: 256 is a super-block of llama.cpp's k-quants, 64 a tile of packed kernels."""
FINEST = 16
"""The multiple is at most this part of the width, so that rounding moves the share by 1/32 at most."""


@dataclass(frozen=True)
class Flap(StructuredPruning):
    """Narrow the MLPs; see `StructuredPruning` for the other hyper-parameters.

    Args:
        score: 'fluctuation', or 'wanda': sum_i |W_ij| ||x_j||.
        repair: 'bias' as in the paper; 'least-squares' changes the columns that stay; 'affine' does both at once;
            'none' leaves them as they are.
        multiple: of the width that stays; None is the largest of 256, 64, 32 and 8 that is at most a sixteenth of the
            width.
        damping: share of the mean diagonal that is added to the second moments for the two by least squares.
    """

    score: Score = "fluctuation"
    repair: Repair = "bias"
    multiple: int | None = None
    damping: float = DAMPING

    name: ClassVar[str] = "flap"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in get_args(Score):
            raise UsageError(f"score is {' or '.join(get_args(Score))}, not {self.score!r}")
        if self.repair not in get_args(Repair):
            raise UsageError(f"repair is {' or '.join(get_args(Repair))}, not {self.repair!r}")
        if self.multiple is not None and self.multiple < 1:
            raise UsageError(f"the width is a multiple of at least one channel, not of {self.multiple}")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is above 0 and at most 1, not {self.damping}")

    @property
    def reading(self) -> Reading:  # type: ignore[override]  # of the methods that read nothing it is None
        """One pass on to the next block and one to gather inputs."""
        return Reading(2.0)

    def reshaped(self, spec: ModelSpec) -> ModelSpec:
        """Narrower MLPs, and biases where the repair takes them."""
        width = self.width(spec.intermediate_size, spec.name)
        blocks = _mlps(spec)
        if self._takes_bias and spec.model_type not in WITH_BIAS:
            raise UsageError(
                f"a {spec.model_type} model such as {spec.name} has no place for biases in its MLPs, which "
                f"repair={self.repair} needs: choose --option repair=least-squares or repair=none"
            )
        if not self.sparsity:
            return spec
        shapes: dict[str, tuple[int, ...]] = {}
        has_bias = self._takes_bias or any(t.name.endswith(f".{WRITER}.bias") for t in spec.tensors)
        for block in blocks:
            for reader in READERS:
                shapes[f"{block}.{reader}.weight"] = (width, spec.hidden_size)
            shapes[f"{block}.{WRITER}.weight"] = (spec.hidden_size, width)
            if has_bias:
                shapes |= {f"{block}.{reader}.bias": (width,) for reader in READERS}
                shapes[f"{block}.{WRITER}.bias"] = (spec.hidden_size,)
        return with_shapes(spec, shapes, width)

    def reconfigured(self, config: Mapping[str, Any], removed: Sequence[int]) -> Mapping[str, Any]:
        """The width of the MLPs, and that they have biases where the repair takes them."""
        if not self.sparsity:
            return config
        width = self.width(base_fields(config).intermediate_size, "the model")
        return changed_config(config, {"intermediate_size": width, **({"mlp_bias": True} if self._takes_bias else {})})

    def in_words(self, spec: ModelSpec) -> str:
        """How many channels."""
        gone = spec.intermediate_size - self.width(spec.intermediate_size, spec.name)
        return f"{gone} of the {spec.intermediate_size} channels of every MLP"

    def width(self, inner: int, name: str) -> int:
        """Channels that stay of `inner`.

        Raises:
            UsageError: all would, although some are to go, or none would.
        """
        multiple = self.multiple or next((one for one in MULTIPLES if one * FINEST <= inner), 1)
        kept = rounded((1 - self.sparsity) * inner / multiple) * multiple
        if not self.sparsity:
            return inner
        if not 0 < kept < inner:
            raise UsageError(
                f"{100 * self.sparsity:g} % of the {inner} channels of {name} in multiples of {multiple} is "
                f"{'all of them' if kept < 1 else 'none'}: ask for {'less' if kept < 1 else 'more'}, "
                "or give --option multiple="
            )
        return kept

    @torch.no_grad()
    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """One row per block: E ||W x - W' x_K - b||^2 / E ||W x||^2 of its down projection, on the calibration text."""
        note = "||(W - W') x - b||^2 / ||W x||^2 of the down projection on the calibration text"
        for block in blocks:
            error = self._narrow(block) if block.kind == "layer" and self.sparsity else 0.0
            yield Measurement("relative_output_error", error, "1", block.name, note=note)

    @property
    def _takes_bias(self) -> bool:
        return self.repair in ("bias", "affine") and self.sparsity > 0

    def _narrow(self, block: Block) -> float:
        writer = f"{block.name}.{WRITER}"
        weight = block.tensor(f"{writer}.weight")
        moments = input_moments(block, f"{writer}.weight")
        scores = fluctuation(weight, moments) if self.score == "fluctuation" else input_size(weight, moments)
        kept = highest(scores, self.width(block.model.intermediate_size, block.model.name))
        changed, bias = self._repaired(weight, moments, kept, writer)
        error = repaired_error(weight, changed, bias, kept, moments)
        for reader in READERS:
            name = f"{block.name}.{reader}"
            block.put_(f"{name}.weight", block.tensor(f"{name}.weight")[kept].clone())
            self._bias(block, name, kept, None if bias is None else torch.zeros(len(kept)))
        block.put_(f"{writer}.weight", changed.to(weight.dtype).contiguous())
        self._bias(block, writer, None, bias)
        return error

    def _repaired(
        self, weight: torch.Tensor, moments: InputMoments, kept: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(columns that stay, bias or None)."""
        if self.repair == "bias":
            return weight[:, kept], mean_bias(weight, moments, kept)
        if self.repair == "least-squares":
            return least_squares(weight, moments.second, kept, self.damping, name), None
        if self.repair == "affine":
            changed = least_squares(weight, moments.covariance, kept, self.damping, name)
            return changed, weight.double() @ moments.mean - changed @ moments.mean[kept]
        return weight[:, kept], None

    def _bias(self, block: Block, name: str, kept: torch.Tensor | None, more: torch.Tensor | None) -> None:
        """Of the bias that a linear has, the channels that stay, and `more` added; a new one where it has none."""
        bias = f"{name}.bias"
        if bias in block.specs:
            old = block.tensor(bias)
            old = old if kept is None else old[kept]
            block.put_(bias, (old if more is None else old + more).to(old.dtype).clone())
        elif more is not None:
            block.put_(bias, more.to(block.tensor(f"{name}.weight").dtype))


def _mlps(spec: ModelSpec) -> list[str]:
    """Module names of the blocks.

    Raises:
        UsageError: not every block has the MLP that is meant here, or their widths differ.
    """
    found = {tensor.name: tensor.shape for tensor in spec.tensors}
    wide, narrow = (spec.intermediate_size, spec.hidden_size), (spec.hidden_size, spec.intermediate_size)
    blocks = [name.removesuffix(f".{WRITER}.weight") for name in found if name.endswith(f".{WRITER}.weight")]
    is_known = len(blocks) == spec.num_layers and all(
        found.get(f"{block}.{WRITER}.weight") == narrow
        and all(found.get(f"{block}.{reader}.weight") == wide for reader in READERS)
        for block in blocks
    )
    if not is_known:
        raise UsageError(
            f"not every block of {spec.name} has gate_proj, up_proj and down_proj of the width that its config names: "
            "flap knows no other MLP yet"
        )
    return blocks
