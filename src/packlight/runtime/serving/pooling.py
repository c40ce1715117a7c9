"""From the hidden states of a text to one vector, as the checkpoint says it (the files of sentence-transformers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F

from packlight.errors import CheckpointError

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""The mean over the tokens, and the last token's states."""

_FLAGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def declared_pooling(directory: Path) -> Pooling | None:
    """What a checkpoint declares in `modules.json` and its pooling module; None where it declares nothing.

    Raises:
        CheckpointError: it declares a kind that is not one of `POOLINGS`, or the files are damaged.
    """
    modules = directory / "modules.json"
    if not modules.is_file():
        return None
    for module in _read(modules):
        if str(module.get("type", "")).endswith(".Pooling"):
            config = _read(directory / str(module.get("path", "")) / "config.json")
            chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
            if len(chosen) != 1 or chosen[0] not in _FLAGS:
                raise CheckpointError(
                    f"{directory} pools with {' and '.join(chosen) or 'nothing'}: known are mean and last"
                )
            return _FLAGS[chosen[0]]
    return None


def pool(states: torch.Tensor, pooling: Pooling) -> list[float]:
    """A vector of length 1 from hidden states (tokens, width)."""
    vector = states.mean(dim=0) if pooling == "mean" else states[-1]
    numbers: list[float] = F.normalize(vector, dim=0).tolist()
    return numbers


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
