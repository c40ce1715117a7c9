"""Which precision a budget is spent on: from shapes alone, or by what every matrix costs on every grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from packlight.checkpoint.open import Checkpoint
from packlight.compress.calibration import Prepared
from packlight.compress.registry import build
from packlight.compress.sensitivity import Losses, known_losses
from packlight.compress.step import Step
from packlight.errors import BudgetError
from packlight.evidence import Measurement
from packlight.plan.allocate import END_GRIDS, INNER_GRIDS, Allocation, allocate_within, least_precision
from packlight.plan.memory import runtime_bytes
from packlight.plan.recipes import MEMORY_MARGIN, QUANTIZED_DTYPE, Candidate, candidates, judge, rank, smallest
from packlight.plan.speed import decode_speed, prefill_speed
from packlight.spec import Budget, Hardware, ModelSpec, Precision, format_size


def choose(spec: ModelSpec, budget: Budget, machine: Hardware) -> Candidate:
    """The recipe that promises the least loss within the budget.

    Raises:
        BudgetError: none does; the message names the one that needs least.
    """
    judged = rank(spec, budget, machine, candidates(spec))
    if judged and judged[0].is_feasible:
        return judged[0]
    raise BudgetError(_too_little(smallest(judged), budget))


def refuse_out_of_reach(spec: ModelSpec, budget: Budget, machine: Hardware) -> None:
    """Raises BudgetError where not even the smallest grid for every matrix meets a budget."""
    if not (least := judge(spec, least_precision(spec), budget, machine)).is_feasible:
        raise BudgetError(_too_little(least, budget))


def fits_whole(spec: ModelSpec, budget: Budget, machine: Hardware) -> bool:
    """Whether a budget has room for the model as it is, or in a float type: then no grid is needed."""
    whole = [precision for precision in candidates(spec) if not precision.grids]
    return any(judge(spec, precision, budget, machine).is_feasible for precision in whole)


def weigh(
    checkpoint: Checkpoint,
    text: Prepared,
    budget: Budget,
    machine: Hardware,
    method: Step,
    start: Callable[[int], Callable[[], None]],
) -> tuple[Precision, Allocation]:
    """A grid for every matrix, by what each costs on each.

    Args:
        method: what is to round them.
        start: called with the number of stages, unless the costs are known from an earlier run; returns their `tick`.

    Raises:
        BudgetError: no choice meets the budget.
    """
    spec = checkpoint.spec
    losses = known_losses(checkpoint, text, INNER_GRIDS, END_GRIDS, QUANTIZED_DTYPE, start)
    found = allocate_within(spec, lessened(losses, method, spec), budget, machine, QUANTIZED_DTYPE)
    if found is None:
        raise BudgetError(_too_little(judge(spec, least_precision(spec), budget, machine), budget))
    return Precision.of(QUANTIZED_DTYPE, found.grids, spec.tensors), found


def lessened(losses: Losses, method: Step, spec: ModelSpec) -> Losses:
    """What matrices cost after a method, from what they cost after rounding to nearest."""
    shares = {tensor.name: method.loss_share(tensor.is_end) for tensor in spec.tensors}
    return {name: {grid: loss * shares[name] for grid, loss in by.items()} for name, by in losses.items()}


def spent(allocation: Allocation) -> Iterator[Measurement]:
    """What was bought with which bytes: a row for every matrix, and their sum."""
    for name, option in allocation.chosen.items():
        note = f"{option.grid}, {option.nbytes} bytes in memory"
        yield Measurement("predicted_kl", option.loss, "nats", name, note=note)
    note = f"the sum of {len(allocation.chosen)} matrices, {allocation.nbytes} bytes in memory"
    yield Measurement("predicted_kl", allocation.loss, "nats", "packed", note=note)


def step_options(precision: Precision, spec: ModelSpec, method: str = "rtn") -> dict[str, Any]:
    """The recipe entry that gives a precision: the usual grid of each kind, and every tensor that has another one."""
    if not precision.grids:
        return {"method": "cast", "dtype": precision.dtype}
    linear = precision.linear or precision.grids[0]
    options: dict[str, Any] = {
        "method": method,
        "bits": linear.bits,
        "group_size": linear.group_size,
        "symmetric": linear.symmetric,
        "scale_bits": linear.scale_bits,
        "embeddings": None if precision.embedding is None else precision.embedding.bits,
        "dtype": precision.dtype,
    }
    usual, others = build(options).precision, []
    for tensor in spec.tensors:
        grid = precision.grid_of(tensor)
        if grid != usual.grid_of(tensor):
            others.append([tensor.name, None if grid is None else str(grid)])
    return options | {"grids": others}


def predictions(spec: ModelSpec, precision: Precision, budget: Budget, machine: Hardware) -> dict[str, float]:
    """What the plan claims for a footprint, by the name of its row."""
    claims: dict[str, float] = {"peak_bytes": runtime_bytes(spec, precision, budget).total}
    decode = decode_speed(spec, precision, machine, budget.context, budget.users)
    prefill = prefill_speed(spec, precision, machine, budget.context)
    for name, speed in (("decode_tps", decode), ("prefill_tps", prefill)):
        if speed.tokens_per_s is not None:
            claims[name] = speed.tokens_per_s
    return claims


def promise(chosen: Candidate) -> str:
    """What is predicted for a choice, in a few words."""
    speed = "" if chosen.decode.tokens_per_s is None else f", {chosen.decode.tokens_per_s:.3g} tokens/s"
    return f"{format_size(chosen.memory.total)} of memory{speed}, {format_size(chosen.disk_bytes)} on disk"


def _too_little(least: Candidate, budget: Budget) -> str:
    total = least.memory.total
    reasons = list(least.reasons)
    if budget.memory_bytes is not None and total * MEMORY_MARGIN > budget.memory_bytes:
        # Half a percent more, as the number is written with three digits and may be rounded down.
        reasons.append(f"allow {format_size(total * MEMORY_MARGIN * 1.005)} or more")
    return (
        f"no recipe fits: the smallest, {least.precision}, takes {format_size(total)} at a context of "
        f"{budget.context} for {budget.users} user{'s' * (budget.users > 1)}: {'; '.join(reasons)}"
    )
