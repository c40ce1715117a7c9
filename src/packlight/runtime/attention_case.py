"""What an attention backend is asked for, and which backend refuses it, with the reason.

A refusal is raised before anything is computed. There is no second choice behind it: a backend that was asked for by
name is the one that runs, or a sentence says why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from packlight.errors import MissingExtraError, UsageError

HALF = (torch.float16, torch.bfloat16)
MAX_FLASH_HEAD_DIM = 256
"""Widest head of the CUDA kernels of FlashAttention-2; the CPU kernel has no such limit."""


@dataclass(frozen=True)
class Case:
    """One layer's attention, by everything that a backend may refuse.

    Args:
        device: type of the device: `cpu`, `cuda`, ...
        dtype: of queries, keys and values.
        head_dim: width of queries and keys.
        value_dim: width of values.
        dropout: probability with which weights are dropped, 0 outside training.
        softcap: bound of the scores, as Gemma 2 has it.
        has_sinks: the softmax has a learned extra term for each head, as GPT-OSS has it.
        has_dense_mask: a mask of (tokens, keys) is given.
        has_position_bias: a learned bias is added to the scores, as T5 has it.
        is_paged: keys and values come from the paged cache of continuous batching.
        needs_weights: the weights of the softmax are to be returned.
        needs_grad: a backward pass will follow.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    dropout: float = 0.0
    softcap: float | None = None
    has_sinks: bool = False
    has_dense_mask: bool = False
    has_position_bias: bool = False
    is_paged: bool = False
    needs_weights: bool = False
    needs_grad: bool = False


Refusal = tuple[str, str]
"""What is refused, and the backend to use instead."""


def check_case(name: str, case: Case) -> None:
    """Raise where the backend does not compute this case.

    Raises:
        UsageError: it never does; the sentence names backend, case and another backend.
        MissingExtraError: the package that it needs is not installed.
    """
    for what, instead in _REFUSALS.get(name, _nothing)(case):
        raise refused(name, what, instead)
    if name == "flash-attn" and find_spec("flash_attn") is None:
        raise MissingExtraError("flash-attn", "flash-attn", "the attention backend flash-attn")


def refused(name: str, what: str, instead: str) -> UsageError:
    """The error of a backend that does not compute something."""
    return UsageError(f"the attention backend {name} does not take {what}: use {instead}")


def _nothing(_: Case) -> Iterator[Refusal]:
    return iter(())


def _extras(case: Case) -> Iterator[Refusal]:
    """What only the model's own formula has."""
    if case.needs_weights:
        yield "output_attentions, since it never holds the weights of a whole row", "eager"
    if case.has_position_bias:
        yield "a learned position bias", "eager"
    if case.is_paged:
        yield "the paged cache of continuous batching", "auto"
    if case.has_sinks:
        yield "attention sinks", "eager"


def _math(case: Case) -> Iterator[Refusal]:
    yield from _extras(case)
    if case.softcap is not None:
        yield f"scores that are soft-capped at {case.softcap:g}", "eager"


def _flash(case: Case) -> Iterator[Refusal]:
    yield from _math(case)
    if case.device not in ("cpu", "cuda"):
        yield f"the device {case.device}, only cpu and cuda", "auto"
    if case.value_dim != case.head_dim:
        yield f"values of width {case.value_dim} beside keys of width {case.head_dim}", "math"
    if case.device == "cpu":
        if case.dropout > 0:
            yield f"dropout of {case.dropout:g} on a CPU", "eager"
        return
    if case.dtype not in HALF:
        yield f"{_word(case.dtype)} on CUDA, only float16 and bfloat16", "math"
    if case.head_dim > MAX_FLASH_HEAD_DIM:
        yield f"heads of width {case.head_dim} on CUDA, at most {MAX_FLASH_HEAD_DIM}", "math"
    if case.has_dense_mask:
        yield "a dense mask on CUDA (a left-padded batch, a window, a prompt in chunks)", "auto"


def _flash_attn(case: Case) -> Iterator[Refusal]:
    if case.device != "cuda":
        yield f"the device {case.device}, only cuda", next((instead for _, instead in _flash(case)), "flash")
    yield from _extras(case)
    if case.dtype not in HALF:
        yield f"{_word(case.dtype)}, only float16 and bfloat16", "math"
    if case.head_dim > MAX_FLASH_HEAD_DIM:
        yield f"heads of width {case.head_dim}, at most {MAX_FLASH_HEAD_DIM}", "math"


def _flex(case: Case) -> Iterator[Refusal]:
    if case.needs_weights:
        yield "output_attentions, since it never holds the weights of a whole row", "eager"
    if case.is_paged:
        yield "the paged cache of continuous batching", "auto"
    if case.dropout > 0:
        yield f"dropout of {case.dropout:g}", "eager"
    if case.device == "cpu":
        if case.has_sinks:
            yield "attention sinks on a CPU", "eager"
        if case.needs_grad:
            yield "training on a CPU", "eager"
        if case.dtype == torch.float64:
            yield "float64 on a CPU", "math"


def _tiled(case: Case) -> Iterator[Refusal]:
    yield from _extras(case)
    if case.dropout > 0:
        yield f"dropout of {case.dropout:g}", "eager"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_REFUSALS: dict[str, Callable[[Case], Iterator[Refusal]]] = {
    "math": _math,
    "flash": _flash,
    "flash-attn": _flash_attn,
    "flex": _flex,
    "tiled": _tiled,
}
