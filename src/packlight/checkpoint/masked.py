"""Pruned matrices without their zeros: a bitmask and the values that are kept, in packlight's own layout.

`plan/layout.py` says which tensors that are and how many bytes they take. Whoever reads a matrix gets it dense: the
zeros are left out of the file and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.shards import TensorEntry
from packlight.checkpoint.stored import MASK
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError
from packlight.ops.prune import kept_mask, pack_bits, unpack_bits

PARTS = ("weight_mask", "weight_values", "weight_shape")


def masked_names(index: Mapping[str, TensorEntry]) -> dict[str, frozenset[str]]:
    """The stored tensors of every matrix whose zeros are left out, keyed by module name."""
    bases = [name.removesuffix(MASK) for name in index if name.endswith(MASK)]
    return {base: frozenset(f"{base}.{part}" for part in PARTS if f"{base}.{part}" in index) for base in bases}


def read_masked(checkpoint: Checkpoint, base: str) -> torch.Tensor:
    """One matrix (rows, cols), zeros and all.

    Raises:
        CheckpointError: a part is missing, or the parts do not belong together.
    """
    names = {part: f"{base}.{part}" for part in PARTS}
    found = {part: read_tensor(checkpoint.index[name]) for part, name in names.items() if name in checkpoint.index}
    return decode_masked(found, base)


def decode_masked(parts: Mapping[str, torch.Tensor], base: str) -> torch.Tensor:
    """A matrix from its stored parts, keyed by the last part of their names.

    Raises:
        CheckpointError: a part is missing, or the parts do not belong together.
    """
    if missing := next((part for part in PARTS if part not in parts), None):
        raise CheckpointError(f"{base}.{missing} is missing, which {base}{MASK} implies: make the artifact again")
    mask, values = parts["weight_mask"], parts["weight_values"]
    rows, cols = parts["weight_shape"].tolist()
    if tuple(mask.shape) != (rows, -(-cols // 8)):
        raise CheckpointError(
            f"{base}{MASK} has shape {tuple(mask.shape)}, a matrix of {rows} x {cols} implies another"
        )
    kept = unpack_bits(mask, cols)
    if (count := int(kept.sum())) != values.numel():
        raise CheckpointError(f"{base}{MASK} keeps {count} weights and {values.numel()} are stored: it is damaged")
    dense = torch.zeros(rows, cols, dtype=values.dtype)
    dense[kept] = values.flatten()
    return dense


def masked_tensors(base: str, weight: torch.Tensor, num_zeros: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs that store a pruned matrix (rows, cols) without `num_zeros` of its zeros."""
    kept = kept_mask(weight, num_zeros)
    yield f"{base}.weight_mask", pack_bits(kept)
    yield f"{base}.weight_values", weight[kept]
    yield f"{base}.weight_shape", torch.tensor(weight.shape, dtype=torch.int64)
