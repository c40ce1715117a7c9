"""What a budget was spent on: which kinds of matrices are on which grids, for how many bytes and how much loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packlight.evidence import Measurement


@dataclass
class Spent:
    """Matrices of one role on one grid. `nats` is their predicted KL divergence."""

    role: str
    grid: str
    count: int = 0
    nbytes: int = 0
    nats: float = 0.0


def spending(rows: Iterable[Measurement]) -> list[Spent]:
    """The rows that `fit` writes for every matrix, `predicted_kl`, added up by role and grid.

    The role is the last part of a module's name, such as `down_proj`. Sorted by role as first met, then by grid.
    """
    found: dict[tuple[str, str], Spent] = {}
    roles: dict[str, int] = {}
    for row in {row.subject: row for row in rows if row.name == "predicted_kl"}.values():  # the last of each counts
        if not row.subject.endswith(".weight") or not isinstance(row.value, int | float):
            continue
        role = row.subject.removesuffix(".weight").rpartition(".")[2]
        grid, _, size = (row.note or "").partition(", ")
        spent = found.setdefault((role, grid), Spent(role, grid))
        roles.setdefault(role, len(roles))
        spent.count += 1
        spent.nbytes += int(size.partition(" ")[0] or 0)
        spent.nats += row.value
    return sorted(found.values(), key=lambda spent: (roles[spent.role], spent.grid))
