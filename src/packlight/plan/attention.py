"""The attention backends by name, for choices on a command line and for docs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute attention.

    Args:
        name: what a user calls it.
        summary: what it is, in a line.
        refuses: what it does not compute, in a line; empty where it takes everything.
    """

    name: str
    summary: str
    refuses: str = ""


_WEIGHTS = "output_attentions, attention sinks, learned position biases, paged caches"

BACKENDS = (
    AttentionBackend(AUTO, "what transformers chooses for the model: torch's SDPA, or eager where that cannot do it"),
    AttentionBackend("eager", "the model's own formula: all scores in memory, any extra term"),
    AttentionBackend("math", "SDPA with torch's math kernel alone: all scores in memory", f"soft caps, {_WEIGHTS}"),
    AttentionBackend(
        "flash",
        "SDPA with torch's flash kernel alone, on CPU and CUDA: memory grows with the tokens",
        f"soft caps, {_WEIGHTS}, values of another width than keys; on a CPU dropout in training; on CUDA float32, "
        "heads above 256 and every dense mask (left-padded batches, windows, prompts in chunks)",
    ),
    AttentionBackend(
        "flash-attn",
        "FlashAttention-2 of the package flash-attn, on CUDA; takes padding and windows",
        f"CPUs, float32, heads above 256, {_WEIGHTS}",
    ),
    AttentionBackend(
        "flex",
        "FlexAttention, compiled for each kind of mask and shape: on a CPU by a C++ compiler, half a minute each",
        "output_attentions, dropout, paged caches; on a CPU attention sinks, float64, training and what torch cannot "
        "compile (decoding a left-padded batch, as of 2.13)",
    ),
    AttentionBackend(
        "tiled",
        "the plain tiled reference of `ops/attention.py`: for tests and for the lab, slow",
        f"dropout, {_WEIGHTS}",
    ),
)
"""In the order in which they are shown."""

BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)
