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
from packlight.runtime.decoder import Decoder
from packlight.runtime.prompts import common_length

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


class FixedShapeDecoder(Decoder):
    """A `Decoder` over forwards of fixed shapes.

    What prompts have in common with the tokens in the cache is not computed again, in whole chunks.

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
        self._forms: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._device = keys[0].device if keys else torch.device("cpu")
        self._padding = torch.zeros(shapes.batch, dtype=torch.int64)
        self._num_sequences = 0
        self._seen: list[list[int]] = []
        self.length = 0
        self.reused = 0

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
        self._allocate()
        self._padding = self._padded_rows(_left_padding(ids, mask))
        rows = [] if bool(self._padding.any()) else ids.tolist()
        self.reused = self.length = self._common(rows)
        self._num_sequences, self._seen = num_sequences, rows
        for start in range(self.length, num_tokens, self.shapes.chunk):
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
        for row, token in zip(self._seen, ids[:, 0].tolist(), strict=False):  # nothing is kept behind padding
            row.append(token)
        # NOTE a trap: a graph of a package reads memory as it was compiled to, and does not look at strides and dtypes.
        return self._run(self._forwards[1], self._padded_rows(ids).to(torch.int64).contiguous(), 1)

    def free(self) -> None:
        self._seen, self._num_sequences, self.length, self.reused = [], 0, 0, 0
        self._forms = [(tuple(tensor.shape), tensor.dtype) for tensor in (*self._keys, *self._values)] or self._forms
        self._keys, self._values = [], []

    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @torch.no_grad()  # NOTE a trap: tensors made in inference mode cannot be written by an exported graph
    def _allocate(self) -> None:
        """The cache again, where it was freed."""
        if self._keys:
            return
        with torch.inference_mode(False):
            made = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._forms]
        self._keys, self._values = made[: len(made) // 2], made[len(made) // 2 :]

    def _common(self, rows: list[list[int]]) -> int:
        """Tokens that the cache holds already for all of `rows`, whole chunks of them."""
        if len(rows) != len(self._seen) or not rows:
            return 0
        common = common_length([*rows, *([*row, -1] for row in self._seen)])
        return common // self.shapes.chunk * self.shapes.chunk

    def _run(self, forward: Forward, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        start, last = torch.tensor(self.length), torch.tensor([num_tokens - 1])
        parts = [part.to(self._device) for part in (ids, start, self._padding, last)]
        logits = forward(*parts, self._keys, self._values)
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
