"""What this machine does per second, found by running small random models, so that a plan can predict speed.

Two sizes of one random Llama give, for each kernel, the two unknowns of `spec.KernelRate`: what a layer costs whatever
its size, and the rate at which its weights are read; a prefill gives the arithmetic rate. The models that are planned
play no part in it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from packlight.measure.footprint import pack_linears_
from packlight.plan.memory import PREFILL_CHUNK
from packlight.runtime import kv_cache
from packlight.runtime.model_decoder import prefill, step
from packlight.spec import FLOAT_DTYPES, Grid, Hardware, KernelRate, Precision

KERNELS = ("float32", "bfloat16", "int8", "int4", "reference")
_GRIDS = {"int8": Grid(8), "int4": Grid(4, 32), "reference": Grid(8, 32)}
_LAYERS = 4
_SMALL, _LARGE = 256, 768
_PROMPT = 512
_STEPS = 12


def calibrate(hardware: Hardware, kernels: Sequence[str] = KERNELS, tick: Callable[[], None] | None = None) -> Hardware:
    """`hardware` with a rate for each of `kernels`; about a second each. `tick` is called after each one."""
    torch.set_num_threads(hardware.threads)
    rates = dict(hardware.rates)
    for kernel in kernels:
        rates[kernel] = _rate(kernel)
        if tick is not None:
            tick()
    return replace(hardware, rates=rates)


def _rate(kernel: str) -> KernelRate:
    small_bytes, small_s, _ = _times(kernel, _SMALL)
    large_bytes, large_s, prefill_s = _times(kernel, _LARGE)
    # On a noisy machine the small model can come out as slow as the large one; then all of the time is overhead.
    seconds_per_byte = max((large_s - small_s) / (large_bytes - small_bytes), 1e-13)
    overhead_s = max(small_s - small_bytes * seconds_per_byte, 0.0) / _LAYERS
    flops = 2 * _matrix_params(_LARGE) * _PROMPT
    launches_s = math.ceil(_PROMPT / PREFILL_CHUNK) * _LAYERS * overhead_s
    return KernelRate(1 / seconds_per_byte, overhead_s, flops / max(prefill_s - launches_s, 1e-9))


def _times(kernel: str, hidden: int) -> tuple[int, float, float]:
    """(bytes of weights, seconds per decode step, seconds for a prompt) of one random model."""
    model = _random_llama(kernel, hidden)
    ids = torch.zeros(1, _PROMPT, dtype=torch.int64)
    cache = kv_cache.allocate(model.config, 2 * _PROMPT)
    prefill(model, ids, cache)
    prompt = []
    for _ in range(3):
        cache = kv_cache.allocate(model.config, 2 * _PROMPT)
        prompt.append(_seconds(lambda: prefill(model, ids, cache)))  # noqa: B023 - called at once
    steps = [_seconds(lambda: step(model, ids[:, :1], cache)) for _ in range(_STEPS)]
    tensors = [t for name, t in model.state_dict().items() if "layers" in name]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return size, _quartile(steps), _quartile(prompt)


def _quartile(seconds: list[float]) -> float:
    """Lower quartile: what a step takes when nothing else runs, as long as that is so a quarter of the time."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _random_llama(kernel: str, hidden: int) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=64,
        max_position_embeddings=4 * _PROMPT,
        tie_word_embeddings=True,
    )
    dtype = kernel if kernel in FLOAT_DTYPES else "bfloat16"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval()
    if kernel in _GRIDS:
        pack_linears_(model, Precision("bfloat16", _GRIDS[kernel]))
    return model


def _matrix_params(hidden: int) -> int:
    """Of `_random_llama`: queries and output, half-width keys and values, three MLP matrices of 3 hidden."""
    return _LAYERS * hidden * (hidden + hidden + hidden + 9 * hidden)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
