"""Which of six properties a measure of sparsity has, by looking for a vector that contradicts it.

The properties (Hurley & Rickard, arXiv 0811.4706), for a vector w of magnitudes and a measure S that is larger for
sparser vectors:

    Robin Hood   S falls when less than half of what a large entry has over a small one moves to the small one
    Scaling      S stays when all entries are multiplied by the same positive number
    Rising Tide  S falls when all entries gain the same, unless all are equal
    Cloning      S stays when the vector stands beside its own copy
    Bill Gates   from some size of an entry on, S rises as that entry grows
    Babies       S rises when a zero is appended

Scaling and Bill Gates contradict each other where one entry alone is not zero: to let that entry grow is to scale the
vector. Such vectors are therefore not asked about Bill Gates, nor is a vector of zeros about anything.

A contradiction is a proof that a property is lacking. That none was found among many trials is none that it holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from packlight.evidence import Measurement
from packlight.ops.sparsity import gini, hoyer, pq_index, soft_sparsity

Vector = tuple[float, ...]
Change = Literal["falls", "stays", "rises"]

TRIALS = 1000
"""Vectors that each property is tried on."""
NOISE = 1e-11
"""Change of a measure below which it stayed, relative above 1: a thousand times what float64 loses on these vectors."""
SHORTEST_SHOWN = 3
"""Equal entries in a row, from which on they are counted and not written out."""


@dataclass(frozen=True)
class Measure:
    """A measure of sparsity, larger for sparser vectors; `formula` as a user reads it."""

    name: str
    formula: str
    of: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Found:
    """How many of `trials` vectors contradict a property, and the first of them, None where none does."""

    measure: str
    property: str
    trials: int
    contradictions: int
    first: str | None


def _energies(w: torch.Tensor) -> torch.Tensor:
    squares = w.double().square()
    return squares / squares.sum(-1, keepdim=True)


MEASURES: Sequence[Measure] = (
    Measure("PQ Index 0.5, 1", "1 - M_0.5 / M_1", lambda w: pq_index(w, 0.5, 1.0)),
    Measure("PQ Index 1, 2", "1 - M_1 / M_2", lambda w: pq_index(w, 1.0, 2.0)),
    Measure("Gini", "twice the area between Lorenz curve and diagonal", gini),
    Measure("Hoyer", "(sqrt(d) - l1 / l2) / (sqrt(d) - 1)", hoyer),
    Measure("soft sparsity 0.5", "-l0.5 / l1", lambda w: -soft_sparsity(w, 0.5)),
    Measure("PQ Index 0.2, 0.8", "1 - M_0.2 / M_0.8: both orders below 1", lambda w: pq_index(w, 0.2, 0.8)),
    Measure("PQ Index 2, 4", "1 - M_2 / M_4 = 1 - kurtosis^(-1/4)", lambda w: pq_index(w, 2.0, 4.0)),
    Measure("l2 / l1", "l2 / l1", lambda w: w.norm(dim=-1) / w.abs().sum(-1)),
    Measure("kurtosis", "sum w^4 / (sum w^2)^2", lambda w: _energies(w).square().sum(-1)),
    Measure("entropy of energy", "sum e log e, e = w^2 / sum w^2", lambda w: -torch.special.entr(_energies(w)).sum(-1)),
    Measure("share of zeros", "number of zeros / d", lambda w: (w == 0).double().mean(-1)),
    Measure("share below 0.5", "number of |w| < 0.5 / d", lambda w: (w.abs() < 0.5).double().mean(-1)),
    Measure("-l1", "-sum |w|", lambda w: -w.abs().sum(-1)),
    Measure("-l0.5", "-(sum |w|^0.5)^2", lambda w: -w.abs().sqrt().sum(-1).square()),
    Measure("-log", "-sum log(1 + w^2)", lambda w: -torch.log1p(w.square()).sum(-1)),
)


def search(measure: Measure, trials: int = TRIALS, seed: int = 0) -> list[Found]:
    """Every property of one measure, each tried on the same vectors."""
    return [_search_one(measure, name, trials, seed) for name in PROPERTIES]


def rows(measure: Measure, trials: int = TRIALS) -> Iterator[Measurement]:
    """The search as rows of evidence, one a property: contradictions among the trials, and the first of them."""
    for found in search(measure, trials):
        name = row_name(found.property)
        yield Measurement(name, found.contradictions, "vectors", measure.name, n=found.trials, note=found.first)


def row_name(property_name: str) -> str:
    """How `rows` names a property's row."""
    return "against_" + property_name.lower().replace(" ", "_")


def _search_one(measure: Measure, name: str, trials: int, seed: int) -> Found:
    tried = (
        PROPERTIES[name](measure, w, random.Random(number)) for number, w in enumerate(_vectors(trials, seed), start=1)
    )
    against = [text for text in tried if text is not None]
    return Found(measure.name, name, trials, len(against), against[0] if against else None)


def _vectors(trials: int, seed: int) -> Iterator[Vector]:
    """Non-negative vectors, never all zero: short ones of small whole numbers first, which read well where they
    contradict something, then skewed ones with zeros, then a few large entries over many small equal ones."""
    chance = random.Random(seed)
    for trial in range(trials):
        made: Vector = (0.0,)
        while not any(made):
            made = _KINDS[0 if 3 * trial < trials else trial % len(_KINDS)](chance)
        yield made


_KINDS: Sequence[Callable[[random.Random], Vector]] = (
    lambda chance: tuple(float(chance.randint(0, 9)) for _ in range(chance.randint(2, 5))),
    lambda chance: tuple(
        round(chance.lognormvariate(0, 1.5), 2) if chance.random() < 0.8 else 0.0 for _ in range(chance.randint(2, 12))
    ),
    lambda chance: (
        *(float(chance.randint(1, 9)) for _ in range(chance.randint(1, 3))),
        *[10.0 ** -chance.randint(1, 3)] * chance.randint(2, 200),
    ),
)


def _robin_hood(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    levels = sorted(set(w))
    if len(levels) == 1:
        return None
    # Levels, not places: of a few large entries over many small ones, two large ones are then often chosen.
    rich, poor = (w.index(level) for level in sorted(chance.sample(levels, 2), reverse=True))
    moved = (w[rich] - w[poor]) * chance.choice([0.1, 0.25, 0.4])
    after = list(w)
    after[rich] -= moved
    after[poor] += moved
    return _contradiction(measure, w, tuple(after), "falls")


def _scaling(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    factor = chance.choice([0.1, 0.5, 2.0, 10.0])
    return _contradiction(measure, w, tuple(factor * x for x in w), "stays")


def _rising_tide(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    if len(set(w)) == 1:
        return None
    gained = chance.choice([0.5, 1.0, 2.0])
    return _contradiction(measure, w, tuple(x + gained for x in w), "falls")


def _cloning(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    return _contradiction(measure, w, w + w, "stays")


def _babies(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    return _contradiction(measure, w, (*w, 0.0), "rises")


def _bill_gates(measure: Measure, w: Vector, chance: random.Random) -> str | None:
    """A contradiction is that S does not rise above its value at any of several sizes, four decades beyond the rest."""
    place = chance.randrange(len(w))
    if not any(w[:place] + w[place + 1 :]):
        return None
    against = None
    for decade in range(5):
        start = _grown(w, place, 10.0**decade * sum(w))
        farther = (_grown(start, place, factor * start[place]) for factor in (0.5, 1.0, 9.0))
        failures = [found for far in farther if (found := _contradiction(measure, start, far, "rises")) is not None]
        if not failures:
            return None
        against = against or failures[0]
    return against


def _grown(w: Vector, place: int, gained: float) -> Vector:
    return (*w[:place], w[place] + gained, *w[place + 1 :])


PROPERTIES: Mapping[str, Callable[[Measure, Vector, random.Random], str | None]] = {
    "Robin Hood": _robin_hood,
    "Scaling": _scaling,
    "Rising Tide": _rising_tide,
    "Cloning": _cloning,
    "Bill Gates": _bill_gates,
    "Babies": _babies,
}


def _contradiction(measure: Measure, before: Vector, after: Vector, wanted: Change) -> str | None:
    """Both vectors and what the measure gave them, unless it changed as it should."""
    first, second = (float(measure.of(torch.tensor(w, dtype=torch.float64))) for w in (before, after))
    noise = NOISE * max(1.0, abs(first), abs(second))
    change = "stays" if abs(second - first) <= noise else "rises" if second > first else "falls"
    if change == wanted:
        return None
    digits = next((n for n in (4, 6, 8) if f"{first:.{n}g}" != f"{second:.{n}g}"), 4)
    return f"{_text(before)} → {_text(after)}: {first:.{digits}g} → {second:.{digits}g}, {change}"


def _text(w: Vector) -> str:
    """`(4, 3, 0.01 × 40)`: equal neighbours are counted."""
    words = []
    for value, run in groupby(w):
        count = len(list(run))
        words += [f"{value:g} × {count}"] if count >= SHORTEST_SHOWN else [f"{value:g}"] * count
    return f"({', '.join(words)})"
