"""What attention costs by backend and number of tokens: seconds, and peak memory beyond what was there before.

One layer's causal attention (`layer_cost`) or a whole model that reads a prompt (`model_cost`). On a CPU each point is
measured in a child process of its own; on CUDA in this one, whose allocator counts exactly. The peak is the most memory
in use during the call less that before it: the output, and with a model its KV cache and activations, are part of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import MeasurementError, UsageError
from packlight.measure import child
from packlight.measure.memory import current_bytes, new_peak, peak_bytes, wait
from packlight.runtime import kv_cache
from packlight.runtime.attention import attend, use
from packlight.runtime.load import load_model

REPEATS = 5
CUDA_REPEATS = 25
"""Calls of a millisecond or less."""
ENOUGH_S = 20.0
"""No further repeat once all of them together took this long."""
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class AttentionCost:
    """Medians of the repeats; a spread is half the range between the lowest and the highest.

    Args:
        seconds: of one call.
        extra_bytes: peak during the call beyond what was resident before.
        repeats: how many calls were measured, after one at a small size to warm up.
        first_token: what a model answers first, by its greatest logit; None of a layer.
    """

    seconds: float
    seconds_spread: float
    extra_bytes: float
    extra_bytes_spread: float
    repeats: int
    first_token: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer: queries (1, num_heads, tokens, head_dim), keys and values (1, num_kv_heads, ...)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def layer_cost(
    backend: str,
    tokens: int,
    shape: LayerShape,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
) -> AttentionCost:
    """Causal attention of one layer over random queries, keys and values, its mask included where it needs one.

    Args:
        backend: any of `BACKEND_NAMES` but `flash-attn`.

    Raises:
        MeasurementError: it failed, for instance for lack of memory.
    """
    request = {"backend": backend, "tokens": tokens, "shape": asdict(shape), "dtype": dtype, "device": device}
    return _ask("layer", request, threads)


def model_cost(
    path: Path,
    backend: str,
    ids: Sequence[int],
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
) -> AttentionCost:
    """A model reads a prompt in one piece, into a KV cache of just its length, and gives the logits of the next token.

    Args:
        path: a checkpoint directory.
        ids: the prompt.

    Raises:
        MeasurementError: it failed, for instance for lack of memory, or because the backend refuses the model.
    """
    request = {"path": str(path), "backend": backend, "ids": list(ids), "dtype": dtype, "device": device}
    return _ask("model", request, threads)


def _ask(kind: str, request: dict[str, Any], threads: int | None) -> AttentionCost:
    if request["device"] != "cpu":
        return _here(kind, request)
    answer = child.ask(["-m", "packlight.measure.attention_cost"], {"kind": kind, **request}, threads)
    return AttentionCost(**answer)


def _here(kind: str, request: dict[str, Any]) -> AttentionCost:
    try:
        return _measure(kind, **request)
    except (torch.OutOfMemoryError, UsageError) as error:
        raise MeasurementError(str(error).splitlines()[0]) from error


def _measure(kind: str, **request: Any) -> AttentionCost:
    return _model(**request) if kind == "model" else _layer(**request)


def _layer(backend: str, tokens: int, shape: dict[str, int], dtype: str, device: str) -> AttentionCost:
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int, length: int) -> torch.Tensor:
        values = torch.randn(1, num_heads, length, shape["head_dim"], generator=generator)
        return values.to(device, getattr(torch, dtype))

    def attention(length: int) -> Callable[[], torch.Tensor]:
        kv = shape["num_kv_heads"]
        q, k, v = random(shape["num_heads"], length), random(kv, length), random(kv, length)
        return lambda: attend(backend, q, k, v)

    with torch.inference_mode():
        attention(min(tokens, _WARM_UP_TOKENS))()
        return _measured(attention(tokens), device)


def _model(path: str, backend: str, ids: list[int], dtype: str, device: str) -> AttentionCost:
    model = load_model(open_checkpoint(path), dtype, device)

    def read(prompt: torch.Tensor) -> int:
        cache = kv_cache.allocate(model.config, prompt.shape[1])
        logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    prompt = torch.tensor([ids], device=device)
    with use(model, backend), torch.inference_mode():
        read(prompt[:, :_WARM_UP_TOKENS])
        return _measured(lambda: read(prompt), device)


def _measured(call: Callable[[], Any], device: str) -> AttentionCost:
    seconds: list[float] = []
    peaks: list[int] = []
    result: Any = call() if device != "cpu" else None  # there the first call of a size also chooses its kernels
    repeats = REPEATS if device == "cpu" else CUDA_REPEATS
    while len(seconds) < repeats and sum(seconds) < ENOUGH_S:
        result = None
        new_peak(device)
        before, start = current_bytes(device), time.perf_counter()
        result = call()
        wait(device)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_bytes(device) - before)
    return AttentionCost(
        seconds=statistics.median(seconds),
        seconds_spread=(max(seconds) - min(seconds)) / 2,
        extra_bytes=statistics.median(peaks),
        extra_bytes_spread=(max(peaks) - min(peaks)) / 2,
        repeats=len(seconds),
        first_token=result if isinstance(result, int) else None,
    )


if __name__ == "__main__":
    child.answer(asdict(_measure(**child.request())))
