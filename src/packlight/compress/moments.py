"""The second moments of what enters the matrices of a block: what GPTQ and the pruning methods fit to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from packlight.compress.listen import Group, inputs_of_all
from packlight.compress.walk import Block
from packlight.ops.channels import InputMoments

Moments = tuple[torch.Tensor, torch.Tensor | None]


def gather(
    block: Block,
    groups: Sequence[Group],
    originals: Mapping[str, torch.Tensor] | None = None,
    asymmetry: float = 0.0,
) -> dict[Group, Moments]:
    """Sum of x x^T over all tokens, and of (x~ - x) x^T where asymmetry asks for it, (cols, cols) each; one pass for
    all groups.

    Args:
        groups: matrices of the block with one input (`listen.input_groups`).
        originals: the block's matrices as they were, which asymmetry compares with.
        asymmetry: factor of the second sum; 0 leaves it out.
    """
    assert block.activations is not None
    widths = {group: block.tensor(group.names[0]).shape[1] for group in groups}
    hessians = {group: torch.zeros(cols, cols) for group, cols in widths.items()}
    crosses = {group: torch.zeros(cols, cols) if asymmetry else None for group, cols in widths.items()}
    first = [group.names[0] for group in groups]
    for part in block.activations.batches():
        seen = inputs_of_all(block, first, block.activations.inputs[part])
        exact = {}
        if asymmetry:
            assert originals is not None
            with block.showing(dict(originals)):
                exact = inputs_of_all(block, first, block.activations.exact[part])
        for group in groups:
            x = seen[group.names[0]]
            weights = block.activations.weights(group.names, part)
            weighted = x if weights is None else x * weights.reshape(-1, 1)
            hessians[group].addmm_(x.T, weighted)
            if (cross := crosses[group]) is not None:
                cross.addmm_((exact[group.names[0]] - x).T, weighted, alpha=asymmetry)
    return {group: (hessians[group], crosses[group]) for group in groups}


def input_moments(block: Block, name: str) -> InputMoments:
    """Mean and second moments of what enters one matrix, over all tokens."""
    assert block.activations is not None
    cols = block.tensor(name).shape[1]
    total, square, count = torch.zeros(cols, dtype=torch.float64), torch.zeros(cols, cols), 0
    for part in block.activations.batches():
        x = inputs_of_all(block, [name], block.activations.inputs[part])[name]
        total += x.double().sum(dim=0)
        square.addmm_(x.T, x)
        count += len(x)
    return InputMoments(total / count, square.double() / count)
