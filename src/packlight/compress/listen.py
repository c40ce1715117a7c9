"""What enters the linears of a block while calibration windows pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.compress.walk import Block


@dataclass(frozen=True)
class Group:
    """Matrices of a block that multiply one and the same input, such as queries, keys and values."""

    names: tuple[str, ...]


class _EnoughError(Exception):
    """Ends a forward pass when what was asked for has been seen."""


def input_groups(block: Block, names: Sequence[str]) -> list[Group]:
    """The matrices `names` in the order in which a token meets them, those with one input together.

    Found by running one window: two linears share their input where they are given the same tensor.
    """
    assert block.activations is not None
    seen: list[tuple[int, list[str]]] = []
    kept = []  # while a tensor lives, no other has its address

    def note(name: str, x: torch.Tensor) -> None:
        kept.append(x)
        if seen and seen[-1][0] == x.data_ptr():
            seen[-1][1].append(name)
        else:
            seen.append((x.data_ptr(), [name]))

    with torch.no_grad(), listening(block, dict.fromkeys(names, note)):
        block.activations.run(block.module, block.activations.inputs[:1])
    found = [Group(tuple(group)) for _, group in seen]
    unseen = sorted(set(names) - {name for group in found for name in group.names})
    return [*found, *(Group((name,)) for name in unseen)]


@contextmanager
def listening(block: Block, wanted: Mapping[str, Callable[[str, torch.Tensor], None]]) -> Iterator[None]:
    """Call `wanted[name](name, x)` with the input (..., cols) of a linear whenever it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: wanted[name](name, args[0])

    handles = [block.owner(name).register_forward_pre_hook(hook(name)) for name in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(block: Block, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """What enters the linear of `name`, (n, cols) float32, when `hidden` (windows, tokens, width) enters the block."""
    return inputs_of_all(block, [name], hidden)[name]


@torch.no_grad()
def inputs_of_all(block: Block, names: Sequence[str], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters several linears, as `inputs_of` for each, from one pass.

    The pass ends when all have been seen: what comes later in the block is not computed.
    """
    assert block.activations is not None
    found: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> None:
        found[name] = x.reshape(-1, x.shape[-1]).float()
        if len(found) == len(names):
            raise _EnoughError

    with listening(block, dict.fromkeys(names, note)), suppress(_EnoughError):
        block.activations.run(block.module, hidden)
    return found
