"""Prompts side by side: padded on the left, and what they begin with in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, (batch, tokens) each, of sequences that are padded on the left with zeros."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def unpad(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """The sequences without their padding."""
    if mask is None:
        return [list(row) for row in ids.tolist()]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among the real ones of its row, (batch, tokens); 0 where padded."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with, and after which each still has one: a prompt's last token is always run."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    return next((place for place in range(shortest) if any(row[place] != first[place] for row in rows)), shortest)
