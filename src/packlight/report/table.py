"""A ledger as one table: a column per subject, a row per quantity, the prediction beside the measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from packlight.evidence import Measurement
from packlight.spec import format_size

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"
FAILED = "failed"
Number = float | int


@dataclass(frozen=True)
class SideBySide:
    """The cells of a table as text; `rows` holds one label and its cells, in the order of `subjects`."""

    subjects: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def side_by_side(rows: Sequence[Measurement], names: Sequence[str] | None = None) -> SideBySide:
    """Lay a ledger out by quantity and subject.

    Subjects come in the order in which the ledger first names them; quantities that no row has are left out. Of
    several rows for one cell the last counts, so that a repeated measurement replaces the earlier one. A row that
    failed shows as `failed`.

    Args:
        rows: a ledger; rows of other names, such as the errors of single tensors, are passed over.
        names: which quantities to show, as the ledger names them; all by default.
    """
    shown = [name for name in QUANTITIES if names is None or name in names]
    found = {(row.name, row.subject): row for row in rows if row.name in shown}
    subjects = tuple(dict.fromkeys(row.subject for row in rows if row.name in shown))
    present = {name for name, _ in found}
    cells = [
        (QUANTITIES[name].label, tuple(_cell(name, found.get((name, subject))) for subject in subjects))
        for name in shown
        if name in present
    ]
    return SideBySide(subjects, tuple(cells))


def rich_table(rows: Sequence[Measurement], title: str | None = None) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    grid = side_by_side(rows)
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for subject in grid.subjects:
        table.add_column(Text(subject), justify="right")
    for label, cells in grid.rows:
        table.add_row(label, *map(Text, cells))
    return table


def markdown_table(rows: Sequence[Measurement], names: Sequence[str] | None = None) -> str:
    """The same table in Markdown, ending with a newline."""
    grid = side_by_side(rows, names)
    lines = [
        _markdown_line("", grid.subjects),
        "|---|" + "---:|" * len(grid.subjects),
        *(_markdown_line(label, cells) for label, cells in grid.rows),
    ]
    return "\n".join(lines) + "\n"


def markdown_rows(rows: Sequence[Measurement]) -> str:
    """A line for each row, whatever its name, in Markdown; of several rows for one thing the last counts."""
    last = {(row.subject, row.name): row for row in rows}
    lines = [_markdown_line("what", ("of", "value", "predicted")), "|---|---|---:|---:|"]
    for row in last.values():
        predicted = MISSING if row.predicted is None else _with_unit(row.predicted, row.unit)
        value = str(row.value) if not _is_number(row.value) else _with_unit(row.value, row.unit)
        spread = "" if row.spread is None else f" ± {_with_unit(row.spread, row.unit)}"
        lines.append(_markdown_line(row.name, (row.subject, f"{value}{spread}", predicted)))
    return "\n".join(lines) + "\n"


def markdown_by_subject(rows: Sequence[Measurement], names: Sequence[str] | None = None) -> str:
    """A line for each subject and a column for each quantity, in Markdown; for many subjects."""
    grid = side_by_side(rows, names)
    columns = [label for label, _ in grid.rows]
    lines = [_markdown_line("", columns), "|---|" + "---:|" * len(columns)]
    for place, subject in enumerate(grid.subjects):
        lines.append(_markdown_line(subject, [cells[place] for _, cells in grid.rows]))
    return "\n".join(lines) + "\n"


def _number(value: Number) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(row: Measurement) -> str:
    return "" if row.spread is None else f" ± {row.spread:.2g}"


def _as_size(row: Measurement, value: Number) -> str:
    if row.predicted is None:
        return format_size(value)
    return f"{format_size(value)} ({format_size(row.predicted)}{_difference(value, row.predicted)})"


def _difference(value: Number, predicted: Number) -> str:
    return f", {100 * (value - predicted) / predicted:+.1f} %" if predicted else ""


def _as_bytes(_: Measurement, value: Number) -> str:
    return format_size(value)


def _as_number(row: Measurement, value: Number) -> str:
    return _number(value) + _spread(row)


def _as_share(_: Measurement, value: Number) -> str:
    return f"{100 * value:.1f} %"


def _as_rate(row: Measurement, value: Number) -> str:
    predicted = "" if row.predicted is None else f" ({_number(row.predicted)})"
    return _number(value) + _spread(row) + predicted


@dataclass(frozen=True)
class Quantity:
    """How a row of the ledger is called in a table, and how its value is written."""

    label: str
    write: Callable[[Measurement, Number], str]


QUANTITIES = {
    "sparsity": Quantity("zeros in the pruned matrices", _as_share),
    "removed": Quantity("share of all parameters that is gone", _as_share),
    "disk_bytes": Quantity("bytes on disk", _as_bytes),
    "dense_bytes": Quantity("the same with zeros stored like other numbers", _as_bytes),
    "whole_bytes": Quantity("the same with nothing removed", _as_bytes),
    "bits_per_weight": Quantity("bits per weight", _as_number),
    "peak_bytes": Quantity("peak memory (predicted, difference)", _as_size),
    "weights_bytes": Quantity("weights (planned, difference)", _as_size),
    "generation_bytes": Quantity("peak of an answer (planned, difference)", _as_size),
    "base_bytes": Quantity("interpreter and torch, apart", _as_bytes),
    "perplexity": Quantity("perplexity ± standard error", _as_number),
    "kl": Quantity("KL to the original, nats (predicted)", _as_rate),
    "top1": Quantity("top-1 agreement", _as_share),
    "first_token_s": Quantity("seconds to the first token", _as_number),
    "second_token_s": Quantity("to the second", _as_number),
    "prefill_tps": Quantity("prefill, tokens/s (predicted)", _as_rate),
    "decode_tps": Quantity("decode, tokens/s (predicted)", _as_rate),
    "tokens_per_s": Quantity("tokens/s of all clients ± half the range", _as_number),
    "ttft_s_p50": Quantity("s to the first token, p50", _as_number),
    "ttft_s_p99": Quantity("p99", _as_number),
    "token_s_p50": Quantity("s per token, p50", _as_number),
    "token_s_p99": Quantity("p99 of that", _as_number),
}
"""What a table shows, in this order, by the name of the ledger's row."""


def _cell(name: str, row: Measurement | None) -> str:
    if row is None:
        return MISSING
    if row.value is None:
        return FAILED
    if isinstance(row.value, str | bool):
        return str(row.value)
    return QUANTITIES[name].write(row, row.value)


def _markdown_line(label: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (label, *cells)) + " |"


def _is_number(value: object) -> TypeGuard[Number]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_unit(value: Number, unit: str) -> str:
    if unit == "bytes":
        return format_size(round(value))
    return f"{value:.4g}" if unit == "1" else f"{value:.4g} {unit}"
