"""Which grid each matrix gets, so that a budget of bytes and time buys the least loss.

Every matrix has a choice of grids, each with a loss in nats, bytes and seconds per decode step, and losses of different
matrices add up. That is a multiple-choice knapsack, an integer program:

    minimize sum loss[m, g] x[m, g]   so that   sum_g x[m, g] = 1 for every matrix m,
    sum bytes[m, g] x[m, g] <= B,   sum seconds[m, g] x[m, g] <= T,   x in {0, 1}

which scipy's `milp` (HiGHS) solves to within a relative gap of 1e-4, in a moment for a few hundred matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from packlight.plan.kernels import head_of, kernel_for, multiplied_bytes, resident_tensor_bytes
from packlight.plan.layout import check_layout, matrix_shape, stored_parts, total_bytes
from packlight.plan.memory import OVERHEAD_SHARE, runtime_bytes
from packlight.plan.recipes import MEMORY_MARGIN
from packlight.plan.speed import decode_speed
from packlight.spec import Budget, Grid, Hardware, ModelSpec, Precision, TensorSpec

GAP = 1e-4
LAST_RESORT_BITS = 2
"""Grids of so few bits are considered only where the others do not fit. A second-order estimate of their losses is far
off: `evidence/allocation-variants.jsonl` has the demo model at 60 MB with and without them."""
TRIES = 10
INNER_GRIDS = tuple(
    Grid.parse(text)
    for text in (
        "int8-row-asym",
        "int6-g64-asym",
        "int5-g64-asym",
        "int5-g32-asym",
        "int4-g128-asym",
        "int4-g64-asym",
        "int4-g32-asym",
        "int3-g64-asym",
        "int3-g32-asym",
        "int2-g32-asym",
    )
)
"""What a matrix inside a block may become."""
END_GRIDS = tuple(
    Grid.parse(text)
    for text in (
        "int8-row-asym",
        "int6-g64-asym",
        "int5-g64-asym",
        "int4-g128-asym",
        "int4-g64-asym",
        "int4-g32-asym",
        "int3-g32-asym",
    )
)
"""What embedding and head may become."""


@dataclass(frozen=True)
class Option:
    """One grid for one matrix: what it costs in nats, in bytes and in seconds per decode step."""

    grid: Grid | None
    loss: float
    nbytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Allocation:
    """A grid for every matrix that has options, and the sums of what was chosen."""

    chosen: Mapping[str, Option]
    loss: float
    nbytes: int
    seconds: float

    @property
    def grids(self) -> dict[str, Grid | None]:
        return {name: option.grid for name, option in self.chosen.items()}


def allocate_within(
    spec: ModelSpec,
    losses: Mapping[str, Mapping[str, float]],
    budget: Budget,
    hardware: Hardware,
    dtype: str = "bfloat16",
) -> Allocation | None:
    """The least loss that a budget of memory and speed buys, or None where it buys nothing.

    Grids that a fast kernel serves go first; the others come in where memory leaves no choice, or where a speed is
    asked for, so that their time is counted.
    """
    limits = [{"int4", "int8"}, set(hardware.rates) or {"int4", "int8", "reference"}]
    for kernels in limits[budget.min_tps is not None :]:
        options = options_for(spec, losses, resident_bytes_of(spec), hardware, dtype, kernels.__contains__)
        found = _within(spec, options, budget, hardware, dtype)
        if found is not None:
            return found
    return None


def _within(
    spec: ModelSpec, options: dict[str, list[Option]], budget: Budget, hardware: Hardware, dtype: str
) -> Allocation | None:
    """Limits on the matrices alone, from those on the whole; where the speed of the whole falls short all the same,
    as its overheads depend on the choice, less time is allowed and the choice made again."""
    room = room_for_weights(spec, budget, dtype)
    if room is not None:
        room -= _others(spec, options, dtype)
    seconds = None if budget.min_tps is None else 1 / budget.min_tps
    for _ in range(TRIES):
        found = allocate(options, room, seconds)
        if found is None or budget.min_tps is None or seconds is None:
            return found
        precision = Precision.of(dtype, found.grids, spec.tensors)
        speed = decode_speed(spec, precision, hardware, budget.context, budget.users).tokens_per_s
        if speed is None or speed >= budget.min_tps:
            return found
        seconds = min(found.seconds, seconds) - max(1 / speed - 1 / budget.min_tps, 0.01 / budget.min_tps)
        if seconds <= 0:
            return None
    return None


def least_precision(spec: ModelSpec, dtype: str = "bfloat16") -> Precision:
    """The smallest grid for every matrix, by resident bytes."""
    size = resident_bytes_of(spec)
    least: dict[str, Grid | None] = {}
    for tensor in spec.tensors:
        if tensor.kind == "other":
            continue
        fitting = [g for g in (END_GRIDS if tensor.is_end else INNER_GRIDS) if g.fits(matrix_shape(tensor)[2])]
        sizes = {grid: size(tensor, Precision(dtype, tensors=((tensor.name, grid),))) for grid in (None, *fitting)}
        least[tensor.name] = min(sizes, key=sizes.__getitem__)
    return Precision.of(dtype, least, spec.tensors)


def room_for_weights(spec: ModelSpec, budget: Budget, dtype: str = "bfloat16") -> float | None:
    """Resident bytes of weights that a budget leaves, beside cache, activations and overhead."""
    if budget.memory_bytes is None:
        return None
    dense = runtime_bytes(spec, Precision(dtype), budget)
    return dense.weights + (budget.memory_bytes / MEMORY_MARGIN - dense.total) / (1 + OVERHEAD_SHARE)


def _others(spec: ModelSpec, options: Mapping[str, object], dtype: str) -> int:
    """Resident bytes of the tensors that have no options."""
    size, precision = resident_bytes_of(spec), Precision(dtype)
    return sum(size(tensor, precision) for tensor in spec.tensors if tensor.name not in options)


def allocate(
    options: Mapping[str, Sequence[Option]], max_bytes: float | None = None, max_seconds: float | None = None
) -> Allocation | None:
    """The choice with the least loss, or None where no choice keeps to the limits.

    Args:
        options: by full tensor name, at least one each.
        max_bytes, max_seconds: limits of the sums; None for no limit.
    """
    without = {
        name: [option for option in several if option.grid is None or option.grid.bits > LAST_RESORT_BITS] or several
        for name, several in options.items()
    }
    found = _solve(without, max_bytes, max_seconds)
    return found if found is not None else _solve(options, max_bytes, max_seconds)


def _solve(
    options: Mapping[str, Sequence[Option]], max_bytes: float | None, max_seconds: float | None
) -> Allocation | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = [name for name, several in options.items() for _ in several]
    flat = [option for several in options.values() for option in several]
    if not flat:
        return Allocation({}, 0.0, 0, 0.0)
    place = {name: row for row, name in enumerate(options)}
    rows = [place[name] for name in names]
    one_each = csr_array((np.ones(len(flat)), (rows, range(len(flat)))), shape=(len(options), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit, costs in ((max_bytes, [o.nbytes for o in flat]), (max_seconds, [o.seconds for o in flat])):
        if limit is not None:
            if limit <= 0:
                return None
            constraints.append(LinearConstraint(np.array(costs, dtype=float)[None, :] / limit, -np.inf, 1.0))
    solved = milp(
        [option.loss for option in flat],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        return None
    chosen = {name: option for name, option, x in zip(names, flat, solved.x, strict=True) if x > 0.5}
    return Allocation(
        chosen,
        sum(option.loss for option in chosen.values()),
        sum(option.nbytes for option in chosen.values()),
        sum(option.seconds for option in chosen.values()),
    )


def options_for(
    spec: ModelSpec,
    losses: Mapping[str, Mapping[str, float]],
    size: Callable[[TensorSpec, Precision], int],
    hardware: Hardware | None = None,
    dtype: str = "bfloat16",
    is_allowed: Callable[[str], bool] = lambda kernel: True,
) -> dict[str, list[Option]]:
    """The options of every matrix whose losses are known.

    Args:
        losses: nats by full tensor name and grid (as `Grid` writes itself).
        size: bytes of one tensor in a precision: `stored_bytes`, or a resident size.
        hardware: with rates, for the seconds of a decode step; None counts no time.
        dtype: of the result.
        is_allowed: which kernels may serve a matrix, by their names in `Hardware.rates`. A matrix that has no other
            choice keeps what it has.
    """
    found: dict[str, list[Option]] = {}
    for tensor in spec.tensors:
        several = []
        for text, loss in losses.get(tensor.name, {}).items():
            grid = Grid.parse(text)
            precision = Precision(dtype, tensors=((tensor.name, grid),))
            seconds = _seconds(spec, tensor, precision, hardware)
            several.append((kernel_for(tensor, precision), Option(grid, loss, size(tensor, precision), seconds)))
        allowed = [option for kernel, option in several if is_allowed(kernel)]
        if several:
            found[tensor.name] = allowed or [option for _, option in several]
    return found


def stored_bytes(tensor: TensorSpec, precision: Precision) -> int:
    """Bytes of a tensor on disk, in packlight's own layout."""
    check_layout(precision, "packlight")
    return total_bytes(stored_parts(tensor, precision, "packlight"))


def resident_bytes_of(spec: ModelSpec) -> Callable[[TensorSpec, Precision], int]:
    """Bytes of a tensor in the memory of packlight's runtime."""
    return lambda tensor, precision: resident_tensor_bytes(tensor, precision, spec.is_tied)


def _seconds(spec: ModelSpec, tensor: TensorSpec, precision: Precision, hardware: Hardware | None) -> float:
    if hardware is None or (tensor.is_end and tensor is not head_of(spec)):
        return 0.0
    rate = hardware.rates.get(kernel_for(tensor, precision))
    return 0.0 if rate is None else multiplied_bytes(tensor, precision) / rate.bytes_per_s
