"""What the zeros of a pruned model saved, in a sentence: never more than was obtained."""

from __future__ import annotations

from collections.abc import Sequence

from packlight.evidence import Measurement
from packlight.spec import format_size

NOTHING_AT_RUN_TIME = "In memory the matrices are dense, and every zero is multiplied like any other number"


def what_zeros_saved(rows: Sequence[Measurement]) -> str | None:
    """The sentence for a ledger with the sparsity, the bytes of the files, and those of dense ones; None without."""
    found = {row.name: row.value for row in rows if row.subject == "packed" and isinstance(row.value, int | float)}
    if not {"sparsity", "disk_bytes", "dense_bytes"} <= found.keys():
        return None
    share, stored, dense = found["sparsity"], found["disk_bytes"], found["dense_bytes"]
    zeros = f"{100 * share:.3g} % of the weights in the pruned matrices are zero"
    if stored == dense:
        return (
            f"{zeros}, and the zeros save nothing: dense storage keeps each of them, {format_size(stored)} as without "
            f"pruning. {NOTHING_AT_RUN_TIME}: no memory and no time are saved there."
        )
    change = f"{abs(100 * (stored / dense - 1)):.3g} % {'less' if stored < dense else 'more'}"
    return (
        f"{zeros}; without them the weight files have {format_size(stored)} instead of {format_size(dense)}, {change}. "
        f"{NOTHING_AT_RUN_TIME}: no memory and no time are saved there."
    )
