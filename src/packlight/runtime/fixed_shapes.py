"""Decoding in fixed shapes: what `torch.compile` and an ahead-of-time package need in order to be compiled once.

A prompt is computed in chunks of one length, the last one padded on the right; an answer, one token at a time. What
stands behind the last real token is wrong, and nobody sees it: attention is causal, and the next token overwrites it.

This file knows tensors only, no model: the forward may be an `nn.Module` (`runtime/fixed_forward.py`), the same module
compiled (`runtime/compiled.py`), or a graph of a package (`runtime/package.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from packlight.errors import UsageError

Forward = Callable[..., torch.Tensor]
"""`forward(ids, start, padding, last, keys, values) -> logits (batch, vocab)`, see `FixedForward.forward`."""


@dataclass(frozen=True)
class Shapes:
    """What is fixed.

    Args:
        batch: sequences at the same time.
        context: tokens per sequence, prompt and answer together.
        chunk: tokens of a prompt that are computed at once.

    Raises:
        UsageError: a size below 1.
    """

    batch: int = 1
    context: int = 1024
    chunk: int = 128

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("context", self.context), ("chunk", self.chunk)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")

    @property
    def buffer(self) -> int:
        """Tokens that the KV cache has room for: whole chunks, since the last one is written whole."""
        return math.ceil(self.context / self.chunk) * self.chunk


class FixedShapeDecoder:
    """A `Decoder` over forwards of fixed shapes.

    Args:
        shapes: what they are fixed to.
        prefill: the forward of `shapes.chunk` tokens.
        decode: the forward of one token.
        keys: of each layer, (batch, kv_heads, buffer, head_dim), written in place.
        values: the same.
    """

    def __init__(
        self, shapes: Shapes, prefill: Forward, decode: Forward, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> None:
        self.shapes = shapes
        self.capacity: int | None = shapes.context
        self._forwards = prefill, decode
        self._keys, self._values = keys, values
        self._padding = torch.zeros(shapes.batch, dtype=torch.int64)
        self._num_sequences = 0
        self.length = 0

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Start anew with prompts.

        Args:
            ids: (batch, tokens), at most as many sequences and tokens as the shapes hold.
            mask: (batch, tokens), 0 where left-padded.

        Returns:
            Logits of the last position, (batch, vocab).

        Raises:
            UsageError: no token, more sequences or more tokens than there is room for, or a mask that is no padding
                on the left.
        """
        num_sequences, num_tokens = ids.shape
        if num_tokens < 1:
            raise UsageError("the prompt is empty: give at least one token")
        if num_sequences > self.shapes.batch:
            raise UsageError(
                f"{num_sequences} sequences were given and at most {self.shapes.batch} fit: make it for more"
            )
        self._check_room(num_tokens)
        self._num_sequences, self.length = num_sequences, 0
        self._padding = self._padded_rows(_left_padding(ids, mask))
        for start in range(0, num_tokens, self.shapes.chunk):
            part = ids[:, start : start + self.shapes.chunk]
            whole = torch.zeros(self.shapes.batch, self.shapes.chunk, dtype=torch.int64)
            whole[:num_sequences, : part.shape[1]] = part
            logits = self._run(self._forwards[0], whole, part.shape[1])
        return logits

    @torch.inference_mode()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One token per sequence of the last prefill, (batch, 1) -> next logits (batch, vocab).

        Raises:
            UsageError: the context is full, or other sequences are given than those that were begun.
        """
        if tuple(ids.shape) != (self._num_sequences, 1):
            raise UsageError(f"a step takes {self._num_sequences} tokens, one per sequence, not {tuple(ids.shape)}")
        self._check_room(self.length + 1)
        # NOTE a trap: a graph of a package reads memory as it was compiled to, and does not look at strides and dtypes.
        return self._run(self._forwards[1], self._padded_rows(ids).to(torch.int64).contiguous(), 1)

    def _run(self, forward: Forward, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        start, last = torch.tensor(self.length), torch.tensor([num_tokens - 1])
        logits = forward(ids, start, self._padding, last, self._keys, self._values)
        self.length += num_tokens
        return logits[: self._num_sequences]

    def _padded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of zeros below, up to the batch: sequences that nobody reads."""
        missing = self.shapes.batch - rows.shape[0]
        return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self.shapes.context:
            raise UsageError(
                f"the context holds {self.shapes.context} tokens and {num_tokens} were asked for: shorten the prompt "
                "or the answer, or make it for a longer context"
            )


def _left_padding(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Padded positions of each sequence, (batch,). Raises UsageError where the mask is anything else."""
    num_tokens = ids.shape[1]
    if mask is None:
        return torch.zeros(ids.shape[0], dtype=torch.int64)
    padding = num_tokens - mask.to(torch.int64).sum(dim=1)
    expected = torch.arange(num_tokens) >= padding[:, None]  # (batch, tokens)
    if mask.shape != ids.shape or not torch.equal(mask.bool(), expected) or bool((padding == num_tokens).any()):
        raise UsageError("the mask must be 0 where a prompt is padded on its left and 1 from there on")
    return padding
