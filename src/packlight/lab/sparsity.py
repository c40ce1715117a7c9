"""Sparsity of a real model's matrices beside how far each can be compressed: a study, one matrix at a time.

Of every matrix, flattened:

    sparsity         by every measure of `MEASURES`
    kept share       of the weights, the largest first, so that what is left out holds a share of sum |w|^p: with p = 2
                     of the energy, the squared Frobenius norm. Beside it the least that the PQ Index allows
    KL, half zeroed  divergence of the model from itself when the smaller half of this one matrix is zeroed

The kept share is compressibility as the weights alone show it, and every input and every later layer counts the same in
it. The divergence is what the model makes of it, and includes how much the rest of the model needs the matrix.

Matrices are read one at a time, and are in float64 in parts alone; only for the divergence is the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.packed import packed_names, read_quantized
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError, UsageError
from packlight.evidence import Measurement
from packlight.measure.quality import Reference, evaluate, evaluate_reference
from packlight.ops.sparsity import gini, hoyer, least_kept, num_needed, pq_index, soft_sparsity
from packlight.spec import TensorSpec

MEASURES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pq_index_0.5_1": lambda w: pq_index(w, 0.5, 1.0),
    "pq_index_1_2": lambda w: pq_index(w, 1.0, 2.0),
    "gini": gini,
    "hoyer": hoyer,
    "soft_sparsity_0.5": lambda w: -soft_sparsity(w, 0.5),
}
"""Larger is sparser, so soft sparsity has a minus."""
HALF = "kl_half_zeroed"


@dataclass(frozen=True)
class Kept:
    """A share of sum |w|^p that may be lost, and the order q of the bound on how many weights must then stay."""

    p: float
    q: float
    lost: float

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"kept_p{self.p:g}_q{self.q:g}_lost{self.lost:g}"

    @property
    def eta(self) -> float:
        """What is lost over what stays, as the bound has it."""
        return self.lost / (1 - self.lost)


KEPT: Sequence[Kept] = (
    Kept(0.5, 1, 0.05),
    Kept(1, 2, 0.05),
    Kept(2, 4, 0.1),
    Kept(2, 4, 0.05),
    Kept(2, 4, 0.01),
)


def matrices(checkpoint: Checkpoint, num_blocks: int | None = None) -> list[TensorSpec]:
    """The matrices that a pruner would look at, in the order of the checkpoint.

    Args:
        num_blocks: how many of the model's blocks to look at, evenly spread, the first and the last among them; all
            for None. Embedding and head come with them.

    Raises:
        CheckpointError: there is no matrix.
        UsageError: `num_blocks` is below 1.
    """
    if num_blocks is not None and num_blocks < 1:
        raise UsageError(f"at least one block is looked at, not {num_blocks}")
    found = [tensor for tensor in checkpoint.spec.tensors if tensor.kind != "other"]
    if not found:
        raise CheckpointError(f"{checkpoint.source} has no weight matrices that packlight knows: give a language model")
    chosen = _spread(sorted({block for tensor in found if (block := block_of(tensor.name)) is not None}), num_blocks)
    return [tensor for tensor in found if (block := block_of(tensor.name)) is None or block in chosen]


def block_of(name: str) -> int | None:
    """The number of the block that a tensor lies in, None outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def role_of(name: str) -> str:
    """What the matrix does, the same in every block: `down_proj`."""
    return name.removesuffix(".weight").rpartition(".")[-1]


def weights(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """All entries of one matrix in a row, (numel,), as stored; of a quantized one, what its codes stand for.

    Raises:
        CheckpointError: a part of it is missing or damaged.
    """
    base = name.removesuffix(".weight")
    if base in packed_names(checkpoint.index):
        return read_quantized(checkpoint, base).dequantize().flatten()
    tensor = read_tensor(checkpoint.index[name]).flatten()
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 can be neither compared nor sorted


def measured(checkpoint: Checkpoint, name: str, subject: str) -> Iterator[Measurement]:
    """Sparsity by every measure, and the share of the weights that must stay beside its bound.

    Raises:
        CheckpointError: as `weights`; and for a matrix that holds an infinity or NaN.
    """
    w = weights(checkpoint, name)
    if not bool(torch.isfinite(w.amax() - w.amin())):
        raise CheckpointError(f"{name} of {checkpoint.source} holds an infinity or NaN: it cannot be pruned as it is")
    w = w.abs().sort().values  # once: what sorts again finds it in order
    d = len(w)
    for each in KEPT:
        needed, bound = int(num_needed(w, each.lost, each.p)), float(least_kept(w, each.p, each.q, each.eta))
        yield Measurement(each.name, needed / d, "1", subject, predicted=bound / d, n=d)
    for measure, of in MEASURES.items():
        yield Measurement(measure, float(of(w)), "1", subject, n=d)


def dense_reference(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Reference:
    """The model as it is, with a head of its own: the model's head may be the next matrix that is zeroed."""
    _, reference = evaluate_reference(model, windows, lambda: None)
    return replace(reference, head=deepcopy(reference.head))


@torch.no_grad()
def divergence(
    model: PreTrainedModel, name: str, windows: Sequence[Sequence[int]], reference: Reference, subject: str
) -> Measurement:
    """KL to the model itself while the smaller half of one matrix is zero; the model is as before afterwards.

    The value is None where the model has no dense matrix of this name. `reference` is a `dense_reference`.
    """
    weight = model.state_dict(keep_vars=True).get(name)
    if not isinstance(weight, torch.nn.Parameter):
        return Measurement(HALF, None, "nats", subject, note="not measured: no dense matrix of this name in the model")
    before = weight.detach().clone()
    try:
        # In place, so that a tied head changes with its embedding. By index: among equal ones exactly half must go.
        weight.view(-1)[smaller_half(weight)] = 0
        quality = evaluate(model, windows, reference, lambda: None)
    finally:
        weight.copy_(before)
    return Measurement(HALF, quality.kl, "nats", subject, spread=quality.kl_stderr, n=quality.num_tokens)


def smaller_half(weight: torch.Tensor) -> torch.Tensor:
    """Flat indices of the half of the entries, rounded down, whose magnitudes are the smallest."""
    flat = weight.detach().abs().flatten()
    return flat.topk(len(flat) // 2, largest=False, sorted=False).indices


def _spread(blocks: Sequence[int], count: int | None) -> set[int]:
    if count is None or count >= len(blocks):
        return set(blocks)
    last = len(blocks) - 1
    return {blocks[round(place * last / (count - 1))] if count > 1 else blocks[0] for place in range(count)}
