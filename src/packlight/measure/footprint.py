"""What a model costs while it runs: peak memory, prefill and decode speed, in a process that does nothing else.

The child first runs a small model of the same classes and kernels, so that libraries are loaded and warm; what is
resident then is the base of interpreter and torch, and is reported apart. Then it loads the model, fills the cache up
to the context and decodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.evidence import Measurement
from packlight.measure import child
from packlight.measure.memory import current_bytes, flush, peak_bytes
from packlight.ops.grid import quantize
from packlight.runtime import kv_cache
from packlight.runtime.bitsandbytes import load_with, quantized, state_bytes
from packlight.runtime.load import empty_model, put_
from packlight.runtime.model_decoder import prefill, step
from packlight.runtime.packed import PackedLinear
from packlight.spec import Precision, TensorSpec

DECODED = 24
"""Tokens decoded in one repeat."""
REPEATS = 3


@dataclass(frozen=True)
class Footprint:
    """Medians of the repeats; a spread is half the range between the slowest and the fastest."""

    peak_bytes: int
    base_bytes: int
    load_s: float
    prefill_tps: float
    prefill_spread: float
    decode_tps: float
    decode_spread: float
    context: int
    users: int
    repeats: int
    state_bytes: int | None = None
    """Of the weights in memory, where a loader quantized them on the fly and no file has this size."""

    def rows(self, subject: str) -> list[Measurement]:
        """As rows of evidence."""
        note = f"context {self.context}, users {self.users}; speeds: median of {self.repeats}, half the range"
        n = self.repeats
        return [
            Measurement("peak_bytes", self.peak_bytes, "bytes", subject, note=f"{note}; above base_bytes"),
            Measurement("base_bytes", self.base_bytes, "bytes", subject, note="interpreter, torch, warm kernels"),
            Measurement("load_s", self.load_s, "s", subject),
            Measurement(
                "prefill_tps", self.prefill_tps, "tokens/s", subject, spread=self.prefill_spread, n=n, note=note
            ),
            Measurement("decode_tps", self.decode_tps, "tokens/s", subject, spread=self.decode_spread, n=n, note=note),
        ]

    def state_rows(self, subject: str, num_params: int) -> list[Measurement]:
        """The size of a model that a loader quantized, in the place of bytes on disk: none are there."""
        assert self.state_bytes is not None
        bits = 8 * self.state_bytes / num_params
        by = f"bitsandbytes {version('bitsandbytes')}"
        note = f"bytes in memory: quantized by {by} while it is loaded, nothing is on disk"
        return [
            Measurement("disk_bytes", self.state_bytes, "bytes", subject, note=note),
            Measurement("bits_per_weight", bits, "bits", subject, note=note),
        ]


def footprint(
    path: Path,
    context: int,
    users: int = 1,
    dtype: str | None = None,
    threads: int | None = None,
    loader: str | None = None,
) -> Footprint:
    """Measure the checkpoint directory `path` in a child process.

    Args:
        context: tokens in the cache when the last token is decoded.
        users: sequences at the same time; speeds are those of one of them.
        dtype: compute dtype; default as stored.
        loader: one of `LOADERS`, which quantizes a dense checkpoint on the fly.

    Raises:
        MeasurementError: the child failed, for instance for lack of memory.
    """
    request = {"path": str(path), "context": context, "users": users, "dtype": dtype, "loader": loader}
    return Footprint(**child.ask(["-m", "packlight.measure.footprint"], request, threads))


def _measure(path: str, context: int, users: int, dtype: str | None, loader: str | None) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    prompt_tokens, decoded = split_context(context)
    _warm_up(checkpoint, dtype, prompt_tokens, users, loader)
    flush()
    base = current_bytes()
    start = time.perf_counter()
    model = load_with(checkpoint, loader, dtype)
    load_s = time.perf_counter() - start
    state = None if loader is None else state_bytes(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, checkpoint.spec.vocab_size, (users, prompt_tokens), generator=generator)
    repeats = [_conversation(model, ids, context, decoded) for _ in range(REPEATS)]
    peak = peak_bytes()
    prefill_tps = sorted(prompt_tokens / seconds for seconds, _ in repeats)
    decode_tps = sorted(decoded / seconds for _, seconds in repeats)
    return {
        "peak_bytes": peak - base,
        "base_bytes": base,
        "load_s": load_s,
        "prefill_tps": statistics.median(prefill_tps),
        "prefill_spread": (prefill_tps[-1] - prefill_tps[0]) / 2,
        "decode_tps": statistics.median(decode_tps),
        "decode_spread": (decode_tps[-1] - decode_tps[0]) / 2,
        "context": context,
        "users": users,
        "repeats": REPEATS,
        "state_bytes": state,
    }


def split_context(context: int) -> tuple[int, int]:
    """(prompt tokens, decoded tokens) that fill a context exactly."""
    decoded = min(DECODED, max(1, context // 4))
    return max(1, context - decoded), decoded


def _conversation(model: PreTrainedModel, ids: torch.Tensor, context: int, decoded: int) -> tuple[float, float]:
    """Seconds to prefill `ids` and to decode some more; the cache is freed at the end."""
    cache = kv_cache.allocate(model.config, context)
    prefill_s = _time(lambda: prefill(model, ids, cache))
    return prefill_s, _time(lambda: [step(model, ids[:, :1], cache) for _ in range(decoded)])


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _warm_up(checkpoint: Checkpoint, dtype: str | None, tokens: int, users: int, loader: str | None) -> None:
    """Run one random layer of the same shapes through the same code."""
    model = random_layer_model(checkpoint, dtype)
    if loader is not None:
        model = quantized(model, loader)
    cache = kv_cache.allocate(model.config, tokens + 2)
    ids = torch.zeros(users, tokens, dtype=torch.int64)
    prefill(model, ids, cache)
    step(model, ids[:, :1], cache)


def random_layer_model(checkpoint: Checkpoint, dtype: str | None = None) -> PreTrainedModel:
    """The checkpoint's architecture with one layer, 256 tokens and random weights on the same grids."""
    spec = checkpoint.spec
    model = empty_model(checkpoint, dtype, num_hidden_layers=1, vocab_size=256)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            put_(model, name, torch.randn(tensor.shape, generator=generator).mul_(0.02).to(tensor.dtype))
    model.tie_weights()
    pack_linears_(model, spec.stored)
    model.eval()
    return model


def pack_linears_(model: nn.Module, stored: Precision | None) -> None:
    """Put every linear inside the blocks of a small random model on its grid in `stored`."""
    if stored is None:
        return
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        grid = stored.grid_of(TensorSpec(f"{name}.weight", tuple(module.weight.shape), stored.dtype, "linear"))
        if grid is not None and grid.fits(module.in_features):
            weight = quantize(module.weight.data, grid, module.weight.dtype)
            model.set_submodule(name, PackedLinear(weight, None if module.bias is None else module.bias.data))


if __name__ == "__main__":
    child.answer(_measure(**child.request()))
