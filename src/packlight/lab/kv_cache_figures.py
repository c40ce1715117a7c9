"""Tables and the plot of the study of KV caches, from its rows alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from packlight.evidence import Measurement
from packlight.lab.kv_cache import Growth
from packlight.plan.kv_cache import KINDS
from packlight.report.plain import PlainTable
from packlight.spec import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Measurement]


def growth_table(steps: Sequence[Growth]) -> PlainTable:
    """The prompt and the steps behind it; shapes are (batch, heads, tokens, head_dim)."""
    gained = [0, *(after.cache_bytes - before.cache_bytes for before, after in pairwise(steps))]
    rows = tuple(
        (str(step.tokens), str(step.query), str(step.keys), f"{step.cache_bytes:,}", f"+{gain:,}" if gain else "")
        for step, gain in zip(steps, gained, strict=True)
    )
    columns = ("tokens", "query of a layer", "its keys", "cache, bytes", "gained")
    return PlainTable("Growth: the query is one vector, the cache gains one column", columns, rows)


def tables(rows: Rows) -> list[PlainTable]:
    """Seconds per token, break-even points, kinds; what was not measured is left out."""
    made = [_times(rows), _break_even(rows), _kinds(rows)]
    return [table for table in made if table.rows]


def draw(figure: Figure, rows: Rows) -> None:
    """Left, seconds per token against length; right, bytes and seconds of every kind of cache."""
    left, right = figure.subplots(1, 2)
    _draw_times(left, rows)
    _draw_kinds(right, rows)


def _times(rows: Rows) -> PlainTable:
    cached, uncached = (_by_number(rows, name, r"(\d+) tokens") for name in ("cached_token_s", "uncached_token_s"))
    lines = [
        (
            str(length),
            _ms(cached[length]),
            _ms(uncached[length]),
            f"{_value(uncached[length]) / _value(cached[length]):.1f}",
        )
        for length in sorted(cached.keys() & uncached.keys())
    ]
    columns = ("tokens before", "with cache, ms", "without, ms", "times as fast")
    return PlainTable("Time of one token", columns, tuple(lines))


def _break_even(rows: Rows) -> PlainTable:
    found = _by_number(rows, "break_even_tokens", r"prompt of (\d+) tokens")
    lines = [
        (str(prompt), "none measured" if row.value is None else f"{row.value}", _planned(row))
        for prompt, row in sorted(found.items())
    ]
    columns = ("tokens of prompt", "answer from which on a cache pays", "planned")
    return PlainTable("When a cache pays", columns, tuple(lines))


def _kinds(rows: Rows) -> PlainTable:
    cells = _cells(rows)
    lines = []
    for subject in _kind_subjects(rows):
        held, peak, seconds, kl = (
            cells[subject, name] for name in ("kv_cache_bytes", "peak_bytes", "cached_token_s", "kl")
        )
        lines.append((subject, _bytes(held), _bytes(peak), _ms(seconds), f"{_value(kl):.2g}"))
    columns = ("kind", "held (planned)", "peak (planned)", "token, ms", "KL, nats")
    return PlainTable("Kinds of cache", columns, tuple(lines))


def _draw_times(axes: Axes, rows: Rows) -> None:
    from matplotlib.ticker import LogLocator

    lengths: list[int] = []
    for name, label, style in (("uncached_token_s", "without a cache", "o-"), ("cached_token_s", "with a cache", "s-")):
        found = _by_number(rows, name, r"(\d+) tokens")
        lengths = sorted(found)
        axes.errorbar(
            lengths,
            [1000 * _value(found[length]) for length in lengths],
            [1000 * (found[length].spread or 0) for length in lengths],
            fmt=style,
            capsize=2,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("tokens before")
    axes.set_ylabel("time of one token, ms")
    axes.legend(frameon=False)
    axes.set_title("A token with a cache and without")


def _draw_kinds(axes: Axes, rows: Rows) -> None:
    cells = _cells(rows)
    subjects = _kind_subjects(rows)
    held = [_value(cells[subject, "kv_cache_bytes"]) / 1e6 for subject in subjects]
    planned = [(cells[subject, "kv_cache_bytes"].predicted or 0) / 1e6 for subject in subjects]
    places = range(len(subjects))
    axes.bar([place - 0.2 for place in places], held, 0.4, label="held, measured")
    axes.bar([place + 0.2 for place in places], planned, 0.4, label="held, planned", hatch="//", fill=False)
    for place, subject in zip(places, subjects, strict=True):
        axes.annotate(
            f"{1000 * _value(cells[subject, 'cached_token_s']):.0f} ms",
            (place, max(held[place], planned[place])),
            ha="center",
            va="bottom",
        )
    axes.set_xticks(list(places), [subject.split(" ")[0] for subject in subjects])
    axes.set_ylabel("bytes of the cache, MB")
    axes.set_ylim(0, 1.15 * max([*held, *planned], default=1))
    axes.legend(frameon=False)
    axes.set_title(f"Kinds of cache{', ' + subjects[0].split(', ')[1] if subjects else ''} (above: time of a token)")


def _by_number(rows: Rows, name: str, pattern: str) -> dict[int, Measurement]:
    """Rows of one name whose subject is a number in words, by that number."""
    found = {}
    for row in rows:
        match = re.fullmatch(pattern, row.subject)
        if row.name == name and match is not None:
            found[int(match[1])] = row
    return found


def _cells(rows: Rows) -> dict[tuple[str, str], Measurement]:
    return {(row.subject, row.name): row for row in rows if " cache, " in row.subject}


def _kind_subjects(rows: Rows) -> list[str]:
    """In the order in which the kinds are named everywhere."""
    found = [subject for subject, name in _cells(rows) if name == "kv_cache_bytes"]
    return sorted(found, key=lambda subject: [kind == subject.split(" ")[0] for kind in KINDS], reverse=True)


def _ratio(above: Measurement, below: Measurement) -> float:
    return _value(above) / _value(below)


def _bytes(row: Measurement) -> str:
    return f"{format_size(int(_value(row)))} ({format_size(int(row.predicted or 0))})"


def _value(row: Measurement) -> float:
    assert isinstance(row.value, int | float)
    return float(row.value)


def _ms(row: Measurement) -> str:
    return f"{1000 * _value(row):.1f} ± {1000 * (row.spread or 0):.1f}"


def _planned(row: Measurement) -> str:
    return "–" if row.predicted is None else f"{row.predicted}"
