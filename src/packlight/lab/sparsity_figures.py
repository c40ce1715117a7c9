"""Tables and the plot of the study of sparsity, from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from packlight.evidence import Measurement
from packlight.lab import sparsity as lab
from packlight.lab import sparsity_properties as properties
from packlight.report.plain import PlainTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Measurement]
Values = dict[str, float]
"""What was measured on one matrix, by the name of the row; a bound under `BOUND` and the name."""

BOUND = "bound of "
ENERGIES = {f"{1 - kept.lost:.0%}".replace("%", " %"): kept for kept in lab.KEPT if kept.p == 2}
MOST_OF_ENERGY = lab.KEPT[-1]
DRAWN_BOUNDS = [kept for kept in lab.KEPT if kept.lost == 0.05]
LABELS = {
    "pq_index_0.5_1": "PQ Index 0.5, 1",
    "pq_index_1_2": "PQ Index 1, 2",
    "gini": "Gini",
    "hoyer": "Hoyer",
    "soft_sparsity_0.5": "soft sparsity 0.5",
}
LAST_OF_ENERGY = "weights in last 1 % of energy, %"
FEWEST = 3
"""Matrices for which a rank correlation is given."""


def properties_table(rows: Rows) -> PlainTable:
    """Which measure has which property, as far as the search saw."""
    cells = {(row.subject, row.name): row for row in rows}
    names = [properties.row_name(name) for name in properties.PROPERTIES]
    lines = [
        (measure.name, *("no" if cells[measure.name, name].value else "yes" for name in names))
        for measure in properties.MEASURES
        if all((measure.name, name) in cells for name in names)
    ]
    return PlainTable("Which measure has which property", ("measure", *properties.PROPERTIES), tuple(lines))


def contradictions_table(rows: Rows) -> PlainTable:
    """For every property that a measure lacks, how often, and the first vector that shows it."""
    cells = {(row.subject, row.name): row for row in rows}
    lines = []
    for measure in properties.MEASURES:
        for name in properties.PROPERTIES:
            row = cells.get((measure.name, properties.row_name(name)))
            if row is not None and row.value:
                lines.append((measure.name, name, f"{row.value} of {row.n}", str(row.note)))
    columns = ("measure", "lacks", "vectors against it", "the first: vector → changed vector, measure → measure")
    return PlainTable("Contradictions", columns, tuple(lines))


def tables(rows: Rows) -> list[PlainTable]:
    """All tables but the contradictions; what was not measured is left out."""
    return [table for table in (properties_table(rows), *matrix_tables(rows)) if table.rows]


def matrix_tables(rows: Rows) -> list[PlainTable]:
    """What was measured on models: sparsity against compressibility, the bound, medians by what a matrix does."""
    models = by_model(rows)
    roles = [_roles(model, matrices) for model, matrices in models.items()]
    return [table for table in (_agreement(models), _bounds(models), *roles) if table.rows]


def by_model(rows: Rows) -> dict[str, dict[str, Values]]:
    """Values by model and matrix."""
    found: dict[str, dict[str, Values]] = {}
    for row in rows:
        model, colon, matrix = row.subject.rpartition(": ")
        if not colon or not isinstance(row.value, int | float):
            continue
        values = found.setdefault(model, {}).setdefault(matrix, {})
        values[row.name] = float(row.value)
        if row.predicted is not None:
            values[BOUND + row.name] = float(row.predicted)
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; None for too few values, or where one side does not vary."""
    from scipy import stats

    if len(first) < FEWEST or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(stats.spearmanr(first, second).statistic)


def gaussian() -> Values:
    """What a matrix of independent Gaussian numbers, infinitely large, has: sparsity and the share that is kept."""
    from scipy import stats

    half, one = (2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi) for p in (0.5, 1.0))  # mean |x|^p
    # x^2 weighted by itself is chi-squared with 3 degrees of freedom: up to here lies the energy that is lost.
    square = stats.chi2.ppf(MOST_OF_ENERGY.lost, 3)
    return {
        "pq_index_0.5_1": 1 - half**2 / one,
        "pq_index_1_2": 1 - one,
        "gini": math.sqrt(2) - 1,
        "hoyer": 1 - one,
        MOST_OF_ENERGY.name: float(1 - stats.chi2.cdf(square, 1)),
    }


def draw(figure: Figure, rows: Rows) -> None:
    """Five measures against compressibility, compressibility against the model's own answer, and three bounds."""
    figure.set_size_inches(10, 9.5)
    models = by_model(rows)
    panels = figure.subplots(3, 3).flatten()
    for axes, name in zip(panels, lab.MEASURES, strict=False):
        _draw_measure(axes, models, name)
    _draw_divergence(panels[5], models)
    for axes, kept in zip(panels[6:], DRAWN_BOUNDS, strict=True):
        _draw_bound(axes, models, kept)
    panels[0].legend(frameon=False)


def _removable(values: Values, kept: lab.Kept = MOST_OF_ENERGY) -> float:
    return 1 - values[kept.name]


def _agreement(models: dict[str, dict[str, Values]]) -> PlainTable:
    lines = []
    for model, matrices in models.items():
        for measure, label in LABELS.items():
            energies = [_correlation(matrices.values(), measure, kept.name) for kept in ENERGIES.values()]
            answers = [*energies, _correlation(matrices.values(), measure, lab.HALF), _within_roles(matrices, measure)]
            lines.append(
                (model, label, str(len(matrices)), *("–" if one is None else f"{one:+.2f}" for one in answers))
            )
    title = "Whether a measure orders matrices as they can be compressed (rank correlation, +1: always)"
    answers_named = (*(f"{share} of energy" for share in ENERGIES), "KL, half zeroed", "KL, within a role")
    return PlainTable(title, ("model", "measure", "matrices", *answers_named), tuple(lines))


def _correlation(matrices: Iterable[Values], measure: str, answer: str) -> float | None:
    """Of sparsity with an answer that is small where much can go."""
    there = [values for values in matrices if {measure, answer} <= values.keys()]
    return spearman([values[measure] for values in there], [-values[answer] for values in there])


def _within_roles(matrices: dict[str, Values], measure: str) -> float | None:
    """With the divergence, among matrices that do the same in different blocks; the mean over what they do."""
    found = [_correlation(group, measure, lab.HALF) for group in _by_role(matrices).values()]
    known = [one for one in found if one is not None]
    return statistics.mean(known) if known else None


def _by_role(matrices: dict[str, Values]) -> dict[str, list[Values]]:
    groups: dict[str, list[Values]] = {}
    for name, values in matrices.items():
        groups.setdefault(lab.role_of(name), []).append(values)
    return groups


def _bounds(models: dict[str, dict[str, Values]]) -> PlainTable:
    lines = []
    for model, matrices in models.items():
        for kept in lab.KEPT:
            pairs = [(values[kept.name], values[BOUND + kept.name]) for values in matrices.values()]
            needed, bound = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = [one / least for one, least in pairs]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append((model, _lost(kept), f"{kept.p:g}, {kept.q:g}", _percent(bound), _percent(needed), spread))
    columns = ("model", "lost", "p, q", "must stay, at least", "must stay, counted", "counted over bound")
    return PlainTable("Weights that must stay: the bound and the count (medians over matrices)", columns, tuple(lines))


def _roles(model: str, matrices: dict[str, Values]) -> PlainTable:
    measures = ["pq_index_0.5_1", "pq_index_1_2", "gini"]
    lines = [
        (
            role,
            str(len(group)),
            *(f"{statistics.median(values[name] for values in group):.3f}" for name in measures),
            _percent(statistics.median(values[MOST_OF_ENERGY.name] for values in group)),
            _divergence(group),
        )
        for role, group in _by_role(matrices).items()
    ]
    normal = gaussian()
    known = (f"{normal[name]:.3f}" for name in measures)
    lines.append(("Gaussian numbers", "", *known, _percent(normal[MOST_OF_ENERGY.name]), ""))
    columns = ("matrix", "number", *(LABELS[name] for name in measures), "hold 99 % of the energy", "KL, half zeroed")
    return PlainTable(f"{model}, medians", columns, tuple(lines))


def _divergence(group: Sequence[Values]) -> str:
    found = [values[lab.HALF] for values in group if lab.HALF in values]
    return f"{statistics.median(found):.2g}" if found else "–"


def _draw_measure(axes: Axes, models: dict[str, dict[str, Values]], name: str) -> None:
    is_soft = name.startswith("soft")
    for place, (model, matrices) in enumerate(models.items()):
        x = [abs(values[name]) for values in matrices.values()]
        axes.plot(x, [100 * _removable(values) for values in matrices.values()], **_style(place), label=model)
    if not is_soft:
        normal = gaussian()
        axes.plot(normal[name], 100 * _removable(normal), "k+", markersize=9, label="Gaussian numbers")
    elif models:
        axes.set_xscale("log")
        axes.invert_xaxis()
    axes.set_xlabel("l0.5 / l1, sparser to the right" if is_soft else "sparsity")
    axes.set_ylabel(LAST_OF_ENERGY)
    axes.set_title(LABELS[name])


def _draw_divergence(axes: Axes, models: dict[str, dict[str, Values]]) -> None:
    for place, matrices in enumerate(models.values()):
        there = [values for values in matrices.values() if values.get(lab.HALF, 0) > 0]
        x = [100 * _removable(values) for values in there]
        axes.plot(x, [values[lab.HALF] for values in there], **_style(place))
        if there:
            axes.set_yscale("log")
    axes.set_xlabel(LAST_OF_ENERGY)
    axes.set_ylabel("KL, smaller half zeroed, nats")
    axes.set_title("What the model makes of it")


def _draw_bound(axes: Axes, models: dict[str, dict[str, Values]], kept: lab.Kept) -> None:
    for place, matrices in enumerate(models.values()):
        bound = [100 * values[BOUND + kept.name] for values in matrices.values()]
        axes.plot(bound, [100 * values[kept.name] for values in matrices.values()], **_style(place))
    axes.plot([0, 100], [0, 100], "-", color="0.5", linewidth=0.8, zorder=0)
    axes.text(98, 4, "no matrix can lie here", ha="right", color="0.4")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"must stay by the bound of {kept.p:g}, {kept.q:g}, %")
    axes.set_ylabel("must stay, counted, %")
    axes.set_title(f"{_lost(kept)} lost")


def _style(place: int) -> dict[str, Any]:
    return {"linestyle": "", "marker": "o^svD"[place % 5], "markersize": 3.5, "alpha": 0.6, "markeredgewidth": 0}


def _lost(kept: lab.Kept) -> str:
    what = {0.5: "the roots", 1: "the magnitudes", 2: "the energy"}[kept.p]
    return f"{100 * kept.lost:g} % of {what}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
