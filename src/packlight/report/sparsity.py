"""What pruning saved, in a sentence: never more than was obtained."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.evidence import Measurement
from packlight.spec import format_size

NOTHING_AT_RUN_TIME = "In memory the matrices are dense, and every zero is multiplied like any other number"


def what_zeros_saved(rows: Sequence[Measurement]) -> str | None:
    """The sentence for a ledger with the sparsity, the bytes of the files, and those of dense ones; None without."""
    found = _numbers(rows, "packed")
    if not {"sparsity", "disk_bytes", "dense_bytes"} <= found.keys():
        return None
    share, stored, dense = found["sparsity"], found["disk_bytes"], found["dense_bytes"]
    zeros = f"{100 * share:.3g} % of the weights in the pruned matrices are zero"
    if stored == dense:
        return (
            f"{zeros}, and the zeros save nothing: dense storage keeps each of them, {format_size(stored)} as without "
            f"pruning. {NOTHING_AT_RUN_TIME}: no memory and no time are saved there."
        )
    return (
        f"{zeros}; without them the weight files have {format_size(stored)} instead of {format_size(dense)}, "
        f"{_change(stored, dense)}. "
        f"{NOTHING_AT_RUN_TIME}: no memory and no time are saved there."
    )


def what_removal_saved(rows: Sequence[Measurement]) -> str | None:
    """The sentence for a ledger of a model of which whole structures were removed; None for another.

    It holds only what is the same on every machine; `what_was_measured` has the rest.
    """
    found = _numbers(rows, "packed")
    if not {"removed", "disk_bytes", "whole_bytes"} <= found.keys():
        return None
    what = next(row.note for row in rows if row.name == "removed")
    stored, whole = found["disk_bytes"], found["whole_bytes"]
    return (
        f"{100 * found['removed']:.3g} % of all parameters are gone ({what}): the weight files have "
        f"{format_size(stored)} instead of {format_size(whole)}, {_change(stored, whole)}."
    )


def what_was_measured(rows: Sequence[Measurement]) -> str | None:
    """Memory and speed beside those of the original, for a ledger that `what_removal_saved` has a sentence for. A
    difference that is no larger than the two spreads together is none."""
    before, after = _measured(rows, "original"), _measured(rows, "packed")
    shown = [name for name in _AT_RUN_TIME if name in before and name in after]
    if what_removal_saved(rows) is None or not shown:
        return None
    return (
        "Measured on this machine beside the original as it is stored: "
        f"{'; '.join(_beside(name, after[name], before[name]) for name in shown)}."
    )


def _beside(name: str, after: Measurement, before: Measurement) -> str:
    (label, write), now, once = _AT_RUN_TIME[name], after.value, before.value
    assert isinstance(now, int | float) and isinstance(once, int | float)
    said = f"{label} {write(now)} instead of {write(once)}, "
    spread = (after.spread or 0.0) + (before.spread or 0.0)
    if spread and abs(now - once) <= spread:
        return f"{said}no difference beyond the spread of {write(spread)}"
    return said + _change(now, once)


def sentences(rows: Sequence[Measurement]) -> dict[str, str]:
    """What a ledger says about pruning, keyed by what was done: `zeros` or `removed`; empty without pruning."""
    if (zeros := what_zeros_saved(rows)) is not None:
        return {"zeros": zeros}
    said = [one for one in (what_removal_saved(rows), what_was_measured(rows)) if one is not None]
    return {"removed": " ".join(said)} if said else {}


def _numbers(rows: Sequence[Measurement], subject: str) -> dict[str, float]:
    return {row.name: row.value for row in rows if row.subject == subject and isinstance(row.value, int | float)}


def _measured(rows: Sequence[Measurement], subject: str) -> dict[str, Measurement]:
    return {row.name: row for row in rows if row.subject == subject and isinstance(row.value, int | float)}


def _change(value: float, of: float) -> str:
    if value == of:
        return "as much"
    return f"{abs(100 * (value / of - 1)):.3g} % {'less' if value < of else 'more'}"


def _as_rate(value: float) -> str:
    return f"{value:.3g} tokens/s"


_AT_RUN_TIME = {
    "peak_bytes": ("peak memory", format_size),
    "prefill_tps": ("prefill", _as_rate),
    "decode_tps": ("decode", _as_rate),
}
