"""Tokens per second from bytes and the rates of a machine.

Decoding reads every weight once per step, so its time is bytes over bandwidth plus what each layer costs to launch;
prefill is bound by arithmetic, two operations per parameter and token. The rates come from a probe on the machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from packlight.plan.kernels import head_of, kernel_for, multiplied_bytes
from packlight.plan.memory import PREFILL_CHUNK, kv_cache_bytes
from packlight.spec import Hardware, ModelSpec, Precision, TensorSpec


@dataclass(frozen=True)
class Speed:
    """A prediction. `tokens_per_s` is None where the machine's rates are not known at all."""

    tokens_per_s: float | None
    is_upper_bound: bool
    reason: str


def decode_speed(spec: ModelSpec, precision: Precision, hardware: Hardware, context: int, users: int = 1) -> Speed:
    """Decode tokens per second that one user sees, with the cache filled to `context` tokens for each user.

    All users share one reading of the weights per step. With a rate for every kernel that is used, the time of a step
    is `layers * overhead + sum over kernels of bytes / rate + cache bytes / rate`; otherwise bytes over memory
    bandwidth bound the speed from above.
    """
    weights = read_bytes(spec, precision, users)
    cache = kv_cache_bytes(spec, context, users, precision.dtype)
    missing = _missing_rates(weights, precision, hardware)
    if not missing:
        seconds = spec.num_layers * _layer_overhead(weights, precision, hardware)
        seconds += sum(size / _byte_rate(kernel, hardware) for kernel, size in weights.items())
        seconds += cache / _byte_rate(precision.dtype, hardware)  # attention reads the cache as a dense kernel does
        return Speed(1 / seconds, False, "probed kernel rates")
    if hardware.bandwidth_bytes_per_s is None:
        return Speed(None, False, f"no rate is known for {', '.join(missing)}, nor the memory bandwidth")
    read = sum(weights.values()) + cache
    reason = f"bytes over memory bandwidth; no rate is known for {', '.join(missing)}"
    return Speed(hardware.bandwidth_bytes_per_s / read, True, reason)


def prefill_speed(spec: ModelSpec, precision: Precision, hardware: Hardware, tokens: int) -> Speed:
    """Prompt tokens per second of one user whose prompt is `tokens` long, without attention's own arithmetic."""
    params = _matrix_params(spec, precision)
    missing = [kernel for kernel in params if kernel not in hardware.rates]
    if missing:
        return Speed(None, False, f"no rate is known for {', '.join(missing)}")
    chunks = math.ceil(tokens / PREFILL_CHUNK)
    seconds = chunks * spec.num_layers * max((hardware.rates[kernel].layer_overhead_s for kernel in params), default=0)
    seconds += sum(2 * count * tokens / hardware.rates[kernel].flops_per_s for kernel, count in params.items())
    return Speed(tokens / seconds, False, "probed kernel rates") if seconds else Speed(None, False, "no matrices")


def pass_seconds(
    spec: ModelSpec, precision: Precision, hardware: Hardware, tokens: int, cached: int = 0
) -> float | None:
    """Seconds of one forward pass over `tokens` tokens of one sequence, with logits of the last one.

    The longer of arithmetic and of reading the weights, and what each layer costs to launch; on top of it the cache of
    `cached` earlier tokens is read, and queries meet keys and values, 4 d operations per pair and layer for a width d.
    Where kernels have no rates, the machine's bandwidth and its float32 matrix product stand for them.

    Returns:
        None where neither is known.
    """
    weights, params = read_bytes(spec, precision), _matrix_params(spec, precision)
    cache = kv_cache_bytes(spec, cached, 1, precision.dtype)
    pairs = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * (tokens + 1)
    if not _missing_rates(weights, precision, hardware) and all(kernel in hardware.rates for kernel in params):
        launches = spec.num_layers * _layer_overhead(weights, precision, hardware)
        reading = sum(size / _byte_rate(kernel, hardware) for kernel, size in weights.items())
        arithmetic = sum(2 * count * tokens / hardware.rates[kernel].flops_per_s for kernel, count in params.items())
        fastest = max(hardware.rates[kernel].flops_per_s for kernel in params)
        return launches + max(reading, arithmetic) + cache / _byte_rate(precision.dtype, hardware) + pairs / fastest
    if hardware.bandwidth_bytes_per_s is None or hardware.flops_per_s is None:
        return None
    reading = sum(weights.values()) / hardware.bandwidth_bytes_per_s
    arithmetic = 2 * params.total() * tokens / hardware.flops_per_s
    return max(reading, arithmetic) + cache / hardware.bandwidth_bytes_per_s + pairs / hardware.flops_per_s


def read_bytes(spec: ModelSpec, precision: Precision, users: int = 1) -> Counter[str]:
    """Bytes of weights that one decode step reads, by kernel.

    The input embedding is looked up, not read, unless it is also the head. Of a mixture layer, a step reads the
    experts that its tokens chose, at most `users * experts_per_token` of them.
    """
    read: Counter[str] = Counter()
    for tensor, share in _multiplied(spec, users):
        read[kernel_for(tensor, precision)] += math.ceil(multiplied_bytes(tensor, precision) * share)
    return read


def _multiplied(spec: ModelSpec, users: int) -> Iterator[tuple[TensorSpec, float]]:
    """Every tensor that a step reads, and the share of it."""
    head = head_of(spec)
    for tensor in spec.tensors:
        if tensor.kind not in ("embedding", "head"):
            yield tensor, _expert_share(spec, tensor, users)
        elif tensor is head:
            yield tensor, 1.0


def _matrix_params(spec: ModelSpec, precision: Precision) -> Counter[str]:
    """Parameters that one prompt token is multiplied with, by kernel; the head sees one token of a prompt only."""
    params: Counter[str] = Counter()
    for tensor, share in _multiplied(spec, 1):
        if tensor.kind in ("linear", "expert"):
            params[kernel_for(tensor, precision)] += round(tensor.numel * share)
    return params


def _expert_share(spec: ModelSpec, tensor: TensorSpec, users: int) -> float:
    is_expert = tensor.kind == "expert" or ".experts." in tensor.name
    if not is_expert or not spec.num_experts or not spec.experts_per_token:
        return 1.0
    return min(1.0, users * spec.experts_per_token / spec.num_experts)


def _missing_rates(weights: Counter[str], precision: Precision, hardware: Hardware) -> list[str]:
    """Kernels without a rate. Norms and biases of a packed model are too few to ask for a rate of their dtype."""
    total = sum(weights.values())
    return [k for k, size in weights.items() if k not in hardware.rates and not _is_small(k, size, total, precision)]


def _is_small(kernel: str, size: int, total: int, precision: Precision) -> bool:
    return kernel == precision.dtype and size < 0.01 * total


def _layer_overhead(weights: Counter[str], precision: Precision, hardware: Hardware) -> float:
    """Of the kernel that reads most."""
    known = [kernel for kernel, _ in weights.most_common() if kernel in hardware.rates]
    return hardware.rates[known[0]].layer_overhead_s if known else 0.0


def _byte_rate(kernel: str, hardware: Hardware) -> float:
    """Bytes per second of a kernel; where it has no rate of its own, of the memory or of the fastest kernel."""
    rate = hardware.rates.get(kernel)
    if rate is not None:
        return rate.bytes_per_s
    return hardware.bandwidth_bytes_per_s or max(known.bytes_per_s for known in hardware.rates.values())
