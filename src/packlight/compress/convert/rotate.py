"""Hadamard rotation, folded into the weights: the same function, with no weight much larger than the others.

    residual stream   h' = h R:   E R,  (W_in diag(g)) R,  R^T W_out,  (W_head diag(g)) R,  every norm's gain g is 1
    values            v' = v R_h within each head:   R_h^T W_v,  W_o R_h

R and R_h are Hadamard matrices with random signs, R_h of the head dimension (Ashkboos et al., "QuaRot",
arXiv 2404.00456, sections 3 and 4, stages 1a and 1c; what would have to be computed while the model runs is left out).
An RMS norm without a gain commutes with R; with one it does not, so the gains go into the matrices first. A head that
is tied to the embedding cannot take the final norm's gain without leaving it, so tied models are rotated within their
heads alone, and so are hidden sizes for which there is no Hadamard matrix.

The result is a dense checkpoint, made to be quantized by the next command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.compress.step import Claim, DenseStep
from packlight.compress.walk import Block
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.ops.hadamard import is_available, random_signs, rotate
from packlight.plan.memory import CalibrationSize
from packlight.spec import ModelSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks are what the formulas above say: RMS norms with a plain gain, separate matrices."""
READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The matrices behind each norm."""
WRITES = ("self_attn.o_proj", "mlp.down_proj")
"""The matrices that add to the residual stream."""


@dataclass(frozen=True)
class Rotate(DenseStep):
    """Rotate a dense checkpoint.

    Args:
        dtype: of the result; rotated weights in bfloat16 are rounded once more.
        seed: of the random signs.
        residual: rotate the residual stream, where the model allows it.
        heads: rotate values within their heads, where the head dimension allows it.

    Raises:
        UsageError: a value outside these.
    """

    dtype: str = "float32"
    seed: int = 0
    residual: bool = True
    heads: bool = True

    name: ClassVar[str] = "rotate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"a seed is a number from 0 on, not {self.seed!r}")

    def plan(self, spec: ModelSpec, calibration: CalibrationSize | None = None) -> Claim:
        """Bytes, peak and minutes from shapes alone. Raises UsageError where nothing of the model can be rotated."""
        if spec.model_type not in FAMILIES:
            raise UsageError(f"rotate knows the families {', '.join(FAMILIES)}, and {spec.name} is {spec.model_type}")
        if not self._turns_residual(spec) and not self._turns_heads(spec):
            raise UsageError(
                f"nothing of {spec.name} can be rotated: its head is tied or its sizes, {spec.hidden_size} and "
                f"{spec.head_dim} for a head, have no Hadamard matrix"
            )
        return super().plan(spec, calibration)

    def apply_(self, blocks: Iterable[Block]) -> Iterator[Measurement]:
        """One row per block: the largest weight over the root mean square of its matrices, before in `predicted`."""
        gain: torch.Tensor | None = None
        for block in blocks:
            spec = block.model
            before = _peak_to_rms(block)
            turns = self._turns_residual(spec)
            if block.kind == "embedding" and turns:
                gain = self._embedding(block, spec)
            elif block.kind == "head" and gain is not None:
                for name, _, weight in block.matrices():
                    self._put(block, name, self._turned(weight.double() * gain, spec.hidden_size))
            elif block.kind == "layer":
                if turns:
                    self._residual(block, spec.hidden_size)
                if self._turns_heads(spec):
                    self._heads(block, spec.head_dim)
            yield Measurement("peak_to_rms", _peak_to_rms(block), "1", block.name, predicted=before)

    def _turns_residual(self, spec: ModelSpec) -> bool:
        return self.residual and not spec.is_tied and is_available(spec.hidden_size)

    def _turns_heads(self, spec: ModelSpec) -> bool:
        return self.heads and is_available(spec.head_dim)

    def _turned(self, rows: torch.Tensor, order: int) -> torch.Tensor:
        """`rows` (.., cols) times R, or R_h for each run of `order` columns; float64."""
        signs = random_signs(order, self.seed).repeat(rows.shape[-1] // order)
        return rotate(rows.double() * signs, order)

    def _put(self, block: Block, name: str, values: torch.Tensor) -> None:
        block.put_(name, values.to(getattr(torch, self.dtype)).contiguous())

    def _embedding(self, block: Block, spec: ModelSpec) -> torch.Tensor:
        """Turn the embedding; returns the final norm's gain, which the head takes."""
        gain = torch.ones(spec.hidden_size, dtype=torch.float64)
        for name in block.tensors:
            tensor = block.tensor(name)
            if block.specs[name].kind == "embedding":
                self._put(block, name, self._turned(tensor, spec.hidden_size))
            elif name.endswith("norm.weight"):
                gain = tensor.double().clone()
                self._put(block, name, torch.ones_like(tensor))
        return gain

    def _residual(self, block: Block, hidden: int) -> None:
        for norm, readers in READS.items():
            gain = block.tensor(f"{block.name}.{norm}.weight")
            for reader in readers:
                name = f"{block.name}.{reader}.weight"
                weight = block.tensor(name)
                self._put(block, name, self._turned(weight.double() * gain.double(), hidden))
            self._put(block, f"{block.name}.{norm}.weight", torch.ones_like(gain))
        for writer in WRITES:
            name = f"{block.name}.{writer}.weight"
            weight = block.tensor(name)
            self._put(block, name, self._turned(weight.T, hidden).T)
            self._bias(block, f"{block.name}.{writer}.bias", hidden)

    def _heads(self, block: Block, head_dim: int) -> None:
        values, out = f"{block.name}.self_attn.v_proj", f"{block.name}.self_attn.o_proj.weight"
        weight = block.tensor(f"{values}.weight")
        self._put(block, f"{values}.weight", self._turned(weight.T, head_dim).T)
        self._bias(block, f"{values}.bias", head_dim)
        weight = block.tensor(out)
        self._put(block, out, self._turned(weight, head_dim))

    def _bias(self, block: Block, name: str, order: int) -> None:
        if name in block.specs:
            bias = block.tensor(name)
            self._put(block, name, self._turned(bias, order))


def _peak_to_rms(block: Block) -> float:
    """The largest magnitude over the root mean square, the largest of the block's matrices; 0 without any."""
    ratios = [float(w.abs().max() / w.square().mean().sqrt().clamp(min=1e-30)) for _, _, w in block.matrices()]
    return max(ratios, default=0.0)
