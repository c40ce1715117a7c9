"""Which precisions are worth trying, and in which order, for a budget.

The order is by a proxy of the loss, from the grid alone: the expected squared rounding error of Gaussian weights
relative to their variance, averaged over all parameters, embedding and head weighted. It ranks grids; it does not
predict perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from packlight.plan.layout import artifact_bytes, layout_of, matrix_shape
from packlight.plan.memory import MemoryPlan, runtime_bytes
from packlight.plan.speed import Speed, decode_speed
from packlight.spec import DTYPE_BYTES, FLOAT_DTYPES, Budget, Grid, Hardware, ModelSpec, Precision, format_size

QUANTIZED_DTYPE = "bfloat16"
MEMORY_MARGIN = 1.02
"""A prediction counts as within a budget when it leaves this much room for its own error."""
GROUPS = (32, 64, 128)

DEQUANTIZES_FROM = (5, 21)
"""The transformers that learned to de-quantize compressed-tensors checkpoints while loading."""
EMBEDDING_WEIGHT = 1.3
"""What an error in the embedding or the head costs beside one in a block, per parameter. On the demo model, 4 bits in
groups of 32, the KL that the tied embedding adds is 1.3 to 1.6 times its share (C4, and the bundled text); on
stories15M, whose vocabulary is twice as large as its blocks and mostly unused, 0.4 times. `evidence/embeddings.json`
has the C4 numbers. A proxy from shapes cannot tell these apart."""

# Relative squared error of rounding a float to a narrower dtype: 2^-(2p+2) / 3 for p explicit mantissa bits, once
# averaged over the mantissa (half an ulp at most, uniform).
_MANTISSA_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}
_CONV1D_FAMILIES = ("gpt2",)
"""Families whose block matrices are Conv1D modules, which compressed-tensors does not pack."""


@dataclass(frozen=True)
class Candidate:
    """One precision held against a budget. `reasons` say what it misses; empty where it is feasible."""

    precision: Precision
    memory: MemoryPlan
    disk_bytes: int
    decode: Speed
    loss_proxy: float
    loads_in_transformers: bool
    reasons: tuple[str, ...] = ()

    @property
    def is_feasible(self) -> bool:
        return not self.reasons


def candidates(spec: ModelSpec, is_portable_only: bool = True) -> list[Precision]:
    """Precisions whose grids fit every matrix of this model; portable ones load in stock transformers.

    A checkpoint that is already quantized has one candidate: what it is stored in.
    """
    if spec.stored is not None:
        return [spec.stored]
    found = _dense(spec)
    for linear in _linear_grids():
        for embedding in (None, linear, Grid(8), Grid(8, symmetric=False)):
            precision = Precision(QUANTIZED_DTYPE, linear, embedding)
            if precision not in found and fits(precision, spec):
                found.append(precision)
    return [p for p in found if not is_portable_only or loads_in_transformers(p, spec)]


def fits(precision: Precision, spec: ModelSpec) -> bool:
    """Whether every grid divides every row that it is asked to cover."""
    grids = ((tensor, precision.grid_of(tensor)) for tensor in spec.tensors)
    return all(grid is None or grid.fits(matrix_shape(tensor)[2]) for tensor, grid in grids)


def loads_in_transformers(precision: Precision, spec: ModelSpec) -> bool:
    """Whether the installed stock transformers with compressed-tensors loads what packlight writes for this precision.

    One grid loads; with zero points or with packed embeddings from transformers 5.21 on, which de-quantizes every
    matrix while it loads. Two different grids do not load, nor do fused experts or Conv1D matrices.
    """
    grids = precision.grids
    if not precision.is_own:
        return True
    if layout_of(precision) == "packlight":
        return False
    has_experts = any(tensor.kind == "expert" or ".experts." in tensor.name for tensor in spec.tensors)
    if has_experts or spec.model_type in _CONV1D_FAMILIES:
        return False
    is_plain = precision.embedding is None and all(grid.symmetric for grid in grids)
    return is_plain or _installed_transformers() >= DEQUANTIZES_FROM


def rank(
    spec: ModelSpec, budget: Budget, hardware: Hardware, precisions: Sequence[Precision] | None = None
) -> list[Candidate]:
    """Candidates, the feasible ones first: by loss proxy, then by bytes; the others by bytes, smallest first."""
    precisions = candidates(spec) if precisions is None else precisions
    judged = [judge(spec, precision, budget, hardware) for precision in precisions]
    return sorted(judged, key=_order)


def judge(spec: ModelSpec, precision: Precision, budget: Budget, hardware: Hardware) -> Candidate:
    """One precision against a budget. A speed that is only bounded from above counts as met up to that bound."""
    memory = runtime_bytes(spec, precision, budget)
    decode = decode_speed(spec, precision, hardware, budget.context, budget.users)
    return Candidate(
        precision=precision,
        memory=memory,
        disk_bytes=artifact_bytes(spec, precision),
        decode=decode,
        loss_proxy=loss_proxy(spec, precision),
        loads_in_transformers=loads_in_transformers(precision, spec),
        reasons=tuple(_misses(spec, memory, decode, budget)),
    )


def smallest(judged: Sequence[Candidate]) -> Candidate:
    """The candidate that needs least memory: what to name when none meets the budget."""
    return min(judged, key=lambda candidate: candidate.memory.total)


def loss_proxy(spec: ModelSpec, precision: Precision) -> float:
    """Expected relative squared error of the stored weights, averaged over all parameters."""
    error = 0.0
    for tensor in spec.tensors:
        grid = precision.grid_of(tensor)
        if grid is None:
            error += tensor.numel * _dtype_error(tensor.dtype, precision.dtype)
        else:
            weight = EMBEDDING_WEIGHT if tensor.kind in ("embedding", "head") else 1.0
            error += weight * tensor.numel * grid_error(grid, matrix_shape(tensor)[2])
    return error / spec.num_params


def grid_error(grid: Grid, cols: int) -> float:
    """Expected squared error of round-to-nearest over the variance, for Gaussian weights.

    The step is the range of a group over `2^bits - 1` levels, where the range is `2 max|w|` on a symmetric grid and
    `max w - min w` on an asymmetric one; a uniform quantizer of step d has the error d^2 / 12.
    """
    count = grid.group_size or cols
    squared_range = 4 * _mean_square_of_largest_magnitude(count) if grid.symmetric else _mean_square_of_range(count)
    return squared_range / float(2**grid.bits - 1) ** 2 / 12


@cache
def _installed_transformers() -> tuple[int, int]:
    """Major and minor version; the newest known where none is installed, as on a machine that only plans."""
    try:
        major, minor, *_ = version("transformers").split(".")
    except PackageNotFoundError:
        return DEQUANTIZES_FROM
    return int(major), int(minor)


def _dense(spec: ModelSpec) -> list[Precision]:
    """The source dtype, and bfloat16 where that is no wider."""
    names = [spec.dtype] if spec.dtype in FLOAT_DTYPES else []
    if DTYPE_BYTES[spec.dtype] >= DTYPE_BYTES["bfloat16"] and "bfloat16" not in names:
        names.append("bfloat16")
    return [Precision(name) for name in names]


def _linear_grids() -> list[Grid]:
    eight = [Grid(8, None, is_symmetric) for is_symmetric in (True, False)]
    return eight + [Grid(4, group, is_symmetric) for group in (*GROUPS, None) for is_symmetric in (True, False)]


def _misses(spec: ModelSpec, memory: MemoryPlan, decode: Speed, budget: Budget) -> list[str]:
    reasons = []
    if budget.memory_bytes is not None and memory.total * MEMORY_MARGIN > budget.memory_bytes:
        reasons.append(f"needs {format_size(memory.total)} of the {format_size(budget.memory_bytes)} allowed")
    if budget.context > spec.max_context:
        reasons.append(f"a context of {budget.context} tokens is beyond the model's {spec.max_context}")
    if budget.min_tps is not None:
        if decode.tokens_per_s is None:
            reasons.append(f"its speed cannot be predicted: {decode.reason}")
        elif decode.tokens_per_s < budget.min_tps:
            reasons.append(f"decodes {decode.tokens_per_s:.3g} tokens/s of the {budget.min_tps:g} asked for")
    return reasons


def _order(candidate: Candidate) -> tuple[bool, float, int]:
    proxy = candidate.loss_proxy if candidate.is_feasible else 0.0
    return not candidate.is_feasible, proxy, candidate.memory.total


def _dtype_error(source: str, target: str) -> float:
    if source not in _MANTISSA_BITS or _MANTISSA_BITS[source] <= _MANTISSA_BITS[target]:
        return 0.0
    return 2.0 ** (-2 * _MANTISSA_BITS[target] - 2) / 3


@lru_cache(maxsize=256)
def _mean_square_of_largest_magnitude(count: int) -> float:
    """E[max |w|^2] of `count` standard normals: the integral of 2 x P(max |w| > x)."""
    return _integral(lambda x: 2 * x * (1 - math.erf(x / math.sqrt(2)) ** count), 0.0, _FAR)


@lru_cache(maxsize=256)
def _mean_square_of_range(count: int) -> float:
    """E[(max - min)^2] = 2 E[max^2] + 2 E[max]^2, taking the two ends as independent (within 1 % from 32 on)."""
    if count == 1:
        return 0.0

    def below(x: float) -> float:
        return (0.5 * math.erfc(-x / math.sqrt(2))) ** count

    mean = _integral(lambda x: 1 - below(x) - below(-x), 0.0, _FAR)
    square = _integral(lambda x: 2 * x * (1 - below(x) + below(-x)), 0.0, _FAR)
    return 2 * square + 2 * mean * mean


_FAR = 10.0  # standard deviations; beyond it lies less than 1e-15 of any row that fits in memory


def _integral(function: Callable[[float], float], start: float, end: float, steps: int = 500) -> float:
    """Simpson's rule."""
    width: float = (end - start) / steps
    weights: tuple[Literal[2, 4], ...] = (2, 4)
    inner = sum(weights[i % 2] * function(start + i * width) for i in range(1, steps))
    return (function(start) + inner + function(end)) * width / 3
