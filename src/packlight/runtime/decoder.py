"""What the loop of `generate` drives: a model and what it remembers of its tokens."""

from __future__ import annotations

from typing import Protocol

import torch


class Decoder(Protocol):
    """What the loop of `generate` drives."""

    capacity: int | None
    """Tokens per sequence that it can remember, prompt and answer together; None: as many as the model takes."""

    reused: int
    """Tokens of each prompt that the last `prefill` did not compute, or computed once for all."""

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Begin with prompts; returns the last position's logits, (batch, vocab).

        Args:
            ids: (batch, tokens), padded on the left.
            mask: (batch, tokens), 0 where padded; None where nothing is.
        """
        ...

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One more token per sequence, ids (batch, 1); returns the next logits, (batch, vocab)."""
        ...

    def free(self) -> None:
        """Forget everything and give the memory back; the next `prefill` begins anew."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of memory that the KV cache holds now."""
        ...
