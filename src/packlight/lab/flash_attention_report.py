"""The FlashAttention study as tables in Markdown, as one JSON document, and as a plot; all from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight.errors import MissingExtraError
from packlight.evidence import Measurement
from packlight.lab.flash_attention import Point, exponents
from packlight.report.plain import PlainTable
from packlight.spec import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = {
    "layer": "One layer, causal attention",
    "model": "The model reads a prompt",
    "count": "Elements that one head moves",
}
_LABELS = {"attention_s": "time", "extra_bytes": "peak memory", "traffic_elements": "loads and stores"}
_MISSING, _FAILED = "–", "failed"
_STYLES = (("#0072b2", "o", "-"), ("#d55e00", "s", "--"), ("#009e73", "^", "-."), ("#cc79a7", "D", ":"))
"""Colour, marker and line of each backend: told apart without colour too (Okabe and Ito's palette)."""
PLOT_PIXELS_PER_INCH = 160


class Table:
    """The last value of every (quantity, level, backend, tokens); failures are there with the value None."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        cells = [row for row in rows if row.name in _LABELS]
        self.rows = {(row.name, point): row for row in cells for point in [Point.of(row.subject)]}

    def backends(self, level: str) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(point.backend for _, point in self.rows if point.level == level))

    def lengths(self, level: str) -> list[int]:
        """Shortest first."""
        return sorted({point.tokens for _, point in self.rows if point.level == level})

    def value(self, name: str, point: Point) -> float | None:
        """The number, or None where there is none."""
        row = self.rows.get((name, point))
        return float(row.value) if row is not None and isinstance(row.value, int | float) else None

    def cell(self, name: str, point: Point, write: Callable[[Measurement], str]) -> str:
        """As text."""
        row = self.rows.get((name, point))
        return _MISSING if row is None else _FAILED if row.value is None else write(row)


def markdown(rows: Sequence[Measurement]) -> str:
    """Every table of the study, each with a heading, ending with a newline."""
    table = Table(rows)
    parts = [_measured(table, level) for level in ("layer", "model") if table.lengths(level)]
    if table.lengths("count"):
        parts.append(_counted(table))
    fitted = list(exponents(rows))
    if fitted:
        lines = [
            [
                LEVELS[level],
                backend,
                _LABELS[name],
                f"{fit.value:.2f}{'' if fit.stderr is None else f' ± {fit.stderr:.2f}'}",
            ]
            for name, level, backend, fit in fitted
        ]
        parts.append(_table("Exponents", ["", "", "grows with", "tokens to the power of"], lines))
    return "\n".join(parts)


def document(rows: Sequence[Measurement]) -> dict[str, Any]:
    """The study as one JSON document: points, exponents, and settings as the ledger has them."""
    table = Table(rows)
    points = [
        {
            "level": point.level,
            "backend": point.backend,
            "tokens": point.tokens,
            "name": name,
            "value": row.value,
            "unit": row.unit,
            **({} if row.spread is None else {"spread": row.spread}),
            **({} if row.value is not None else {"why": row.note}),
        }
        for (name, point), row in table.rows.items()
    ]
    fitted = [
        {"level": level, "backend": backend, "of": name, "exponent": fit.value, "stderr": fit.stderr, "n": fit.n}
        for name, level, backend, fit in exponents(rows)
    ]
    return {"points": points, "exponents": fitted}


def check_plot() -> None:
    """Raises MissingExtraError where nothing can be drawn, before hours have gone into measuring."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "lab", "the plot of a study")


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """Draw time, peak memory and traffic over tokens, both axes logarithmic, into a .png or .svg file.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table, fits = Table(rows), {(name, level, backend): fit for name, level, backend, fit in exponents(rows)}
    panels = [
        (name, level)
        for level in LEVELS
        for name in _LABELS
        if any(point.level == level and name == found for found, point in table.rows)
    ]
    lines = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(10.5, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axis, (name, level) in zip(axes, panels, strict=False):
        for style, backend in zip(_STYLES, table.backends(level), strict=False):
            _line(axis, table, name, level, backend, style, fits.get((name, level, backend)))
        _dress(axis, name, level, table.lengths(level))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=PLOT_PIXELS_PER_INCH)


def _measured(table: Table, level: str) -> str:
    backends = table.backends(level)
    is_pair = len(backends) == 2
    head = ["tokens", *(f"{backend}, s" for backend in backends), *(["times faster"] if is_pair else [])]
    head += [*(f"{backend}, peak" for backend in backends), *(["times less"] if is_pair else [])]
    lines = []
    for tokens in table.lengths(level):
        points = [Point(level, backend, tokens) for backend in backends]
        line = [f"{tokens:,}", *(table.cell("attention_s", point, _seconds) for point in points)]
        line += [_ratio(table, "attention_s", points)] if is_pair else []
        line += [table.cell("extra_bytes", point, _size) for point in points]
        line += [_ratio(table, "extra_bytes", points)] if is_pair else []
        lines.append(line)
    return _table(LEVELS[level], head, lines)


def _counted(table: Table) -> str:
    names = table.backends("count")
    lines = []
    for tokens in table.lengths("count"):
        points = [Point("count", name, tokens) for name in names]
        cells = [table.cell("traffic_elements", point, lambda row: f"{row.value / 1e6:,.2f} M") for point in points]  # type: ignore[operator]
        lines.append([f"{tokens:,}", *cells, _ratio(table, "traffic_elements", [points[0], points[-1]])])
    return _table(LEVELS["count"], ["tokens", *names, f"{names[0]} over {names[-1]}"], lines)


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return PlainTable(title, tuple(head), tuple(map(tuple, lines))).markdown()


def _seconds(row: Measurement) -> str:
    return f"{row.value:.3g} ± {row.spread:.1g}" if row.spread else f"{row.value:.3g}"


def _size(row: Measurement) -> str:
    assert isinstance(row.value, int | float)
    return format_size(row.value)


def _ratio(table: Table, name: str, points: Sequence[Point]) -> str:
    """How many times the first costs what the second does."""
    first, second = (table.value(name, point) for point in points)
    return f"{first / second:.3g}" if first and second else _MISSING


def _line(axis: Axes, table: Table, name: str, level: str, backend: str, style: tuple[str, str, str], fit: Any) -> None:
    colour, marker, dashes = style
    points = [Point(level, backend, tokens) for tokens in table.lengths(level)]
    found = [(point.tokens, value) for point in points if (value := table.value(name, point))]
    if not found:
        return
    scale = 1e-6 if name == "extra_bytes" else 1.0
    label = backend
    if fit is not None:
        error = "" if fit.stderr is None else f" ± {fit.stderr:.2f}"
        label = f"{backend}: N to the {fit.value:.2f}{error}"
    x, y = [tokens for tokens, _ in found], [value * scale for _, value in found]
    axis.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=label, markersize=5, linewidth=1.4)


def _dress(axis: Axes, name: str, level: str, lengths: Sequence[int]) -> None:
    units = {
        "attention_s": "seconds",
        "extra_bytes": "peak memory beyond the start, MB",
        "traffic_elements": "elements",
    }
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(lengths), labels=[f"{tokens:,}" for tokens in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel(units[name])
    axis.set_title(LEVELS[level], fontsize=10)
    axis.grid(visible=True, which="major", color="0.85", linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)
