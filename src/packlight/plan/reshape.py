"""Shapes of a model of which a part is taken out, from the shapes of the whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from packlight.errors import UsageError
from packlight.spec import ModelSpec, TensorSpec

_BLOCK = re.compile(r"(?P<front>(?:.*?\.)?)(?P<place>\d+)\.(?P<rest>.+)")


def without_blocks(spec: ModelSpec, count: int) -> ModelSpec:
    """The model with `count` fewer blocks, whichever these are: its blocks are alike, and those that stay are numbered
    anew. Of layers with a sliding window, as many are taken to stay as can.

    Raises:
        UsageError: blocks differ in their shapes.
    """
    blocks: dict[int, set[tuple[str, tuple[int, ...], str]]] = {}
    for tensor in spec.tensors:
        if match := _BLOCK.fullmatch(tensor.name):
            blocks.setdefault(int(match["place"]), set()).add((match["rest"], tensor.shape, tensor.dtype))
    if len(blocks) != spec.num_layers or any(block != blocks[0] for block in blocks.values()):
        raise UsageError(f"the blocks of {spec.name} differ in their shapes: only blocks that are alike can be removed")
    left = spec.num_layers - count
    kept = tuple(t for t in spec.tensors if not (match := _BLOCK.fullmatch(t.name)) or int(match["place"]) < left)
    num_sliding = min(spec.num_sliding_layers, left)
    return replace(
        spec,
        num_layers=left,
        tensors=kept,
        num_sliding_layers=num_sliding,
        sliding_window=spec.sliding_window if num_sliding else None,
    )


def with_shapes(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], intermediate_size: int) -> ModelSpec:
    """The model with other shapes for some tensors, by name; one that is new takes the dtype of the matrix it belongs
    to."""
    by_name = {tensor.name: tensor for tensor in spec.tensors}
    made = [replace(t, shape=shapes.get(t.name, t.shape)) for t in spec.tensors]
    for name in shapes.keys() - by_name.keys():
        owner = by_name[f"{name.rpartition('.')[0]}.weight"]
        made.append(TensorSpec(name, shapes[name], owner.dtype, "other"))
    return replace(spec, tensors=tuple(made), intermediate_size=intermediate_size)
