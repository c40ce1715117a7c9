"""What a budget was spent on, from a ledger's rows alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.evidence import Measurement
from packlight.report.spending import Spent, spending


def row(subject: str, nats: float | None, note: str | None, name: str = "predicted_kl") -> Measurement:
    return Measurement(name, nats, "nats", subject, note=note)


ROWS = [
    row("model.embed_tokens.weight", 0.5, "int8-row-asym, 1000 bytes in memory"),
    row("model.layers.0.self_attn.q_proj.weight", 0.25, "int4-g64-asym, 300 bytes in memory"),
    row("model.layers.0.mlp.down_proj.weight", 0.125, "int5-g64-asym, 500 bytes in memory"),
    row("model.layers.1.self_attn.q_proj.weight", 0.75, "int4-g64-asym, 300 bytes in memory"),
    row("model.layers.1.mlp.down_proj.weight", 1.0, "int3-g32-asym, 200 bytes in memory"),
    row("packed", 2.625, "the sum of 5 matrices, 2300 bytes in memory"),
]


def test_rows_are_added_up_by_role_and_grid() -> None:
    """Roles as they are first met, grids by name; the sum of all is not one of them."""
    assert spending(ROWS) == [
        Spent("embed_tokens", "int8-row-asym", 1, 1000, 0.5),
        Spent("q_proj", "int4-g64-asym", 2, 600, 1.0),
        Spent("down_proj", "int3-g32-asym", 1, 200, 1.0),
        Spent("down_proj", "int5-g64-asym", 1, 500, 0.125),
    ]


def test_the_sums_are_those_of_the_ledgers_last_row() -> None:
    found = spending(ROWS)
    assert sum(one.nats for one in found) == ROWS[-1].value
    assert sum(one.nbytes for one in found) == 2300
    assert sum(one.count for one in found) == 5


def test_other_rows_are_passed_over() -> None:
    others = [
        row("model.layers.0.mlp.down_proj.weight", 1.0, "int3-g32-asym, 9 bytes in memory", name="relative_error"),
        row("model.layers.9.mlp.down_proj.weight", None, "it failed"),
        row("packed", 1.0, None),
        Measurement("predicted_kl", "much", "nats", "model.layers.8.mlp.down_proj.weight"),
    ]
    assert spending(others) == []
    assert spending([*others, *ROWS]) == spending(ROWS)
    assert spending([]) == []


def test_a_row_without_a_note_still_counts() -> None:
    assert spending([row("a.b.weight", 1.0, None)]) == [Spent("b", "", 1, 0, 1.0)]
    assert spending([row("a.b.weight", 1.0, "int4-row-sym")]) == [Spent("b", "int4-row-sym", 1, 0, 1.0)]


def test_rows_are_read_once_from_any_iterable() -> None:
    assert spending(iter(ROWS)) == spending(ROWS)


@settings(deadline=None)
@given(st.permutations(ROWS))
def test_the_sums_do_not_depend_on_the_order(rows: list[Measurement]) -> None:
    found = {(one.role, one.grid): one for one in spending(rows)}
    assert found == {(one.role, one.grid): one for one in spending(ROWS)}


def test_a_matrix_that_was_written_twice_counts_once() -> None:
    """A job that was killed while it wrote these rows writes them all again; the last counts, as in every ledger."""
    assert spending([*ROWS[:3], *ROWS]) == spending(ROWS)
