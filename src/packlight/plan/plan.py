"""The plan of one model for one budget: what each precision would take, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packlight.plan.kv_advice import KVAdvice, advise
from packlight.plan.layout import artifact_bytes
from packlight.plan.memory import (
    JobPlan,
    MemoryPlan,
    disk_bytes,
    job_plan,
    kv_cache_bytes,
    kv_elements_per_token,
    logits_bytes,
)
from packlight.plan.recipes import Candidate, fits, judge
from packlight.plan.speed import Speed, prefill_speed
from packlight.spec import FLOAT_DTYPES, Budget, Grid, Hardware, ModelSpec, Precision, format_size

PREFILL_TOKENS = 512
"""Length of the prompt that prefill speed is predicted for, or the context where that is shorter."""


@dataclass(frozen=True)
class Row:
    """One precision. All sizes are bytes; `bits_per_weight` is of the file's tensors over all parameters."""

    precision: str
    disk_bytes: int
    bits_per_weight: float
    memory: MemoryPlan
    decode: Speed
    prefill: Speed
    job: JobPlan
    loss_proxy: float
    loads_in_transformers: bool
    fits: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A model's facts, the budget, and a row for each precision."""

    model: str
    architecture: str
    num_params: int
    dtype: str
    is_tied: bool
    max_context: int
    kv_elements_per_token: int
    evaluation_logits_bytes: int
    budget: Budget
    hardware: Hardware
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    kv_advice: KVAdvice | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; totals are written out."""
        data = asdict(self)
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["memory"]["total"] = row.memory.total
            plain["reasons"] = list(row.reasons)
        data["rows"], data["notes"] = list(data["rows"]), list(self.notes)
        return data


def make_plan(
    spec: ModelSpec,
    budget: Budget,
    hardware: Hardware,
    precisions: Sequence[Precision] | None = None,
    lengths: tuple[int, int] | None = None,
) -> Plan:
    """A row for each of `precisions`, by default the usual ones that fit the model's shapes.

    Args:
        lengths: tokens of prompt and answer that advice on the KV cache is wanted for, with the weights as stored.
    """
    precisions = default_precisions(spec) if precisions is None else precisions
    return Plan(
        model=spec.name,
        architecture=spec.architecture,
        num_params=spec.num_params,
        dtype=spec.dtype,
        is_tied=spec.is_tied,
        max_context=spec.max_context,
        kv_elements_per_token=kv_elements_per_token(spec),
        evaluation_logits_bytes=logits_bytes(spec, budget.context),
        budget=budget,
        hardware=hardware,
        notes=tuple(_notes(spec, budget)),
        rows=tuple(_row(spec, budget, hardware, precision) for precision in precisions),
        kv_advice=None if lengths is None else advise(spec, as_stored(spec), budget, hardware, *lengths),
    )


def as_stored(spec: ModelSpec) -> Precision:
    """The precision of the checkpoint as it is."""
    return spec.stored or Precision(spec.dtype)


def default_precisions(spec: ModelSpec) -> list[Precision]:
    """The three float dtypes, int8 per row and int4 in groups, then the same with the embeddings; only what fits.

    A checkpoint that is already quantized has one row.
    """
    if spec.stored is not None:
        return [spec.stored]
    int8, int4 = Grid(8), [Grid(4, group) for group in (128, 64, 32)]
    grids = [int8, *int4]
    packed = [Precision(linear=grid) for grid in grids] + [Precision(linear=grid, embedding=grid) for grid in grids]
    dense = [Precision(dtype) for dtype in FLOAT_DTYPES]
    return dense + [precision for precision in packed if fits(precision, spec)]


def _row(spec: ModelSpec, budget: Budget, hardware: Hardware, precision: Precision) -> Row:
    judged: Candidate = judge(spec, precision, budget, hardware)
    return Row(
        precision=str(precision),
        disk_bytes=artifact_bytes(spec, precision),
        bits_per_weight=8 * disk_bytes(spec, precision).total / spec.num_params,
        memory=judged.memory,
        decode=judged.decode,
        prefill=prefill_speed(spec, precision, hardware, min(PREFILL_TOKENS, budget.context)),
        job=job_plan(spec, precision),
        loss_proxy=judged.loss_proxy,
        loads_in_transformers=judged.loads_in_transformers,
        fits=judged.is_feasible,
        reasons=judged.reasons,
    )


def _notes(spec: ModelSpec, budget: Budget) -> list[str]:
    notes = []
    if spec.sliding_window is not None and budget.context > spec.sliding_window:
        full = kv_cache_bytes(spec, budget.context, budget.users)
        windowed = kv_cache_bytes(spec, budget.context, budget.users, is_windowed=True)
        notes.append(
            f"{spec.num_sliding_layers} of {spec.num_layers} layers look back {spec.sliding_window} tokens only: the "
            f"KV cache is planned whole, {format_size(full)} in bfloat16; an engine that evicts holds "
            f"{format_size(windowed)}"
        )
    if spec.num_experts and spec.experts_per_token:
        notes.append(f"a token uses {spec.experts_per_token} of {spec.num_experts} experts; all of them are held")
    return notes
