"""Measures of sparsity: their values where they are known, their six properties, and what they say about pruning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packlight.errors import UsageError
from packlight.ops import sparsity as ops
from packlight.ops.sparsity import (
    enough_kept,
    gini,
    hoyer,
    least_kept,
    num_needed,
    pq_index,
    soft_sparsity,
    tail_ratio,
)

Measure = Callable[[torch.Tensor], torch.Tensor]
ALL: list[Measure] = [pq_index, gini, hoyer, soft_sparsity]
LEAST = 1e-12
"""A change this small is none: float64 loses a hundredth of it on vectors of these lengths."""


def vector(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def value(measure: Measure, *entries: float) -> float:
    return float(measure(vector(*entries)))


# --- values ------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    assert value(pq_index, 1, 4) == pytest.approx(1 - 0.5 * 9 / 5)
    assert value(lambda w: pq_index(w, 1, 2), 3, 4) == pytest.approx(1 - 7 / (5 * math.sqrt(2)))
    assert value(gini, 1, 2, 3, 4) == pytest.approx(0.25)
    assert value(hoyer, 3, 4) == pytest.approx((math.sqrt(2) - 7 / 5) / (math.sqrt(2) - 1))
    assert value(soft_sparsity, 1, 4) == pytest.approx(9 / 5)


@pytest.mark.parametrize("w", [vector(2, -2, 2), vector(0, 0, 0, 0), vector(1e-3), vector(*[0.1] * 1001)])
def test_equal_magnitudes_are_as_little_sparse_as_can_be(w: torch.Tensor) -> None:
    d = len(w)
    assert [float(measure(w)) for measure in (pq_index, gini, hoyer)] == pytest.approx([0, 0, 0], abs=1e-15)
    assert float(soft_sparsity(w)) == pytest.approx(d)
    assert float(least_kept(w)) == pytest.approx(d)


@pytest.mark.parametrize("d", [2, 7, 1000])
def test_one_entry_alone_is_as_sparse_as_can_be(d: int) -> None:
    w = torch.zeros(d, dtype=torch.float64)
    w[d // 2] = -3
    for p, q in ((0.5, 1), (1, 2), (0.1, 3)):
        assert float(pq_index(w, p, q)) == pytest.approx(1 - d ** (1 / q - 1 / p))
        assert float(least_kept(w, p, q)) == pytest.approx(1)
    assert [float(gini(w)), float(hoyer(w)), float(soft_sparsity(w))] == pytest.approx([1 - 1 / d, 1, 1])
    assert int(num_needed(w, 0.0)) == 1


@pytest.mark.parametrize(
    ("law", "half_one", "one_two"),
    [
        (torch.distributions.Uniform(-1, 1), 0.1111, 0.1340),
        (torch.distributions.Normal(0, 1), 0.1528, 0.2021),
        (torch.distributions.Laplace(0, 1), 0.2146, 0.2929),
    ],
)
def test_known_laws(law: torch.distributions.Distribution, half_one: float, one_two: float) -> None:
    torch.manual_seed(0)
    w = law.sample((1_000_000,))
    d = len(w)
    assert float(pq_index(w, 0.5, 1)) == pytest.approx(half_one, abs=1e-3)
    assert float(pq_index(w, 1, 2)) == pytest.approx(one_two, abs=1e-3)
    assert float(least_kept(w, 0.5, 1)) / d == pytest.approx(1 - half_one, abs=1e-3)
    assert float(least_kept(w, 1, 2)) / d == pytest.approx((1 - one_two) ** 2, abs=2e-3)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-9, 9), min_size=2, max_size=30), st.floats(0.1, 0.9))
def test_the_measures_are_functions_of_the_quotients_they_are_said_to_be(entries: list[float], q: float) -> None:
    assume(any(abs(x) > 1e-3 for x in entries))
    w, d = vector(*entries), len(entries)
    l1, l2 = float(w.norm(1)), float(w.norm(2))
    assert float(hoyer(w)) == pytest.approx((math.sqrt(d) - l1 / l2) / (math.sqrt(d) - 1), abs=1e-12)
    assert float(soft_sparsity(w, q)) == pytest.approx(d ** (1 / q - 1) * (1 - float(pq_index(w, q, 1))))
    ordered = sorted(abs(x) for x in entries)
    published = 1 - 2 * sum(c / l1 * (d - k + 0.5) / d for k, c in enumerate(ordered, start=1))
    assert float(gini(w)) == pytest.approx(published, abs=1e-12)


# --- numbers that computers find hard ------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1e160, 1e300])
def test_scales_at_the_ends_of_float64(measure: Measure, factor: float) -> None:
    w = vector(1, 2, -3, 0, 5)
    assert float(measure(w * factor)) == pytest.approx(float(measure(w)), rel=1e-12)


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_floats_are_computed_wide(measure: Measure, dtype: torch.dtype) -> None:
    """Squares of 300 overflow float16, and a sum of ten thousand entries has no digits left in bfloat16."""
    w = (torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    found = measure(w)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(measure(w.double())), rel=1e-13)


def test_extreme_orders_neither_overflow_nor_vanish() -> None:
    w = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.01
    assert 0 < float(pq_index(w, 0.001, 500)) < 1
    assert float(pq_index(w, 1e-4, 1e-3)) == pytest.approx(0, abs=1e-3)
    spike = vector(1, *[0.0] * 999)
    assert float(pq_index(spike, 0.002, 1)) == 1  # 1 - 1000^-499


@pytest.mark.parametrize("measure", [*ALL, least_kept, enough_kept, lambda w: num_needed(w, 0.1)])
def test_the_last_axis_is_measured_and_the_input_left_alone(measure: Measure) -> None:
    w = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w[1, 2] = 0
    before = w.clone()
    rows = torch.stack([measure(row) for row in w.flatten(0, 1)]).reshape(2, 3)
    assert torch.allclose(measure(w), rows, rtol=1e-13)
    assert torch.equal(w, before)


@pytest.mark.parametrize("measure", [*ALL, lambda w: num_needed(w, 0.1), lambda w: tail_ratio(w, 40, 1)])
def test_parts_give_what_the_whole_gives(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    whole = measure(w)
    monkeypatch.setattr(ops, "PART_ELEMENTS", 30)
    assert torch.allclose(measure(w), whole, rtol=1e-13)


@pytest.mark.parametrize("measure", [*ALL, least_kept, lambda w: num_needed(w, 0.1), lambda w: tail_ratio(w, 1, 1)])
@pytest.mark.parametrize(
    ("w", "said"),
    [
        (torch.zeros(0), "empty in the shape"),
        (torch.zeros(3, 0), "empty in the shape"),
        (torch.tensor(1.0), "empty in the shape"),
        (torch.tensor([1, 2]), "floating-point tensors"),
        (torch.tensor([1.0, math.nan]), "infinity or NaN"),
        (torch.tensor([1.0, -math.inf]), "infinity or NaN"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure: Measure, w: torch.Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        measure(w)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w: pq_index(w, 1, 1), "0 < p < q"),
        (lambda w: pq_index(w, 2, 1), "0 < p < q"),
        (lambda w: pq_index(w, 0, 1), "positive number"),
        (lambda w: pq_index(w, 1, math.inf), "positive number"),
        (lambda w: soft_sparsity(w, 1.5), "0 < p < q"),
        (lambda w: least_kept(w, eta=-0.1), "number from 0 on"),
        (lambda w: enough_kept(w, error=1), "between 0 and 1"),
        (lambda w: num_needed(w, 1.0), "from 0 up to 1"),
        (lambda w: num_needed(w, 0.1, p=-1), "positive number"),
        (lambda w: tail_ratio(w, 0, 1), "1 to 2 can be kept"),
        (lambda w: tail_ratio(w, 3, 1), "1 to 2 can be kept"),
    ],
)
def test_orders_and_shares_that_do_not_exist(call: Measure, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(vector(1, 2))


# --- the six properties: PQ Index with p <= 1 <= q, and Gini, have them all ------------------------------------------

# Hundredths: entries far enough apart for a change to be seen above rounding.
MAGNITUDES = st.lists(st.integers(0, 10_000).map(lambda n: n / 100), min_size=2, max_size=40).filter(any)
ORDERS = st.tuples(st.floats(0.05, 1), st.floats(1, 6)).filter(lambda orders: orders[1] - orders[0] > 0.05)
WHOLE = st.one_of(st.just(gini), ORDERS.map(lambda orders: lambda w: pq_index(w, *orders)))
"""Measures that have all six."""

each = settings(deadline=None, max_examples=150)


def robin_hood(w: torch.Tensor, rich: int, poor: int, share: float) -> torch.Tensor:
    after = w.clone()
    moved = share * (w[rich] - w[poor])
    after[rich] -= moved
    after[poor] += moved
    return after


@each
@given(WHOLE, MAGNITUDES, st.data(), st.floats(0.1, 0.45))
def test_robin_hood(measure: Measure, entries: list[float], data: st.DataObject, share: float) -> None:
    w = vector(*entries)
    rich, poor = (data.draw(st.integers(0, len(w) - 1)) for _ in range(2))
    assume(float(w[rich] - w[poor]) >= 0.01 * float(w.max()))
    assert float(measure(robin_hood(w, rich, poor, share))) < float(measure(w)) - LEAST


@each
@given(WHOLE, MAGNITUDES, st.floats(1e-6, 1e6))
def test_scaling(measure: Measure, entries: list[float], factor: float) -> None:
    w = vector(*entries)
    assert float(measure(factor * w)) == pytest.approx(float(measure(w)), abs=LEAST)


@each
@given(WHOLE, MAGNITUDES, st.floats(0.1, 100))
def test_rising_tide(measure: Measure, entries: list[float], gained: float) -> None:
    w = vector(*entries)
    assume(float(w.max() - w.min()) >= 0.01 * float(w.max()))
    assert float(measure(w + gained)) < float(measure(w)) - LEAST


@each
@given(WHOLE, MAGNITUDES, st.integers(2, 5))
def test_cloning(measure: Measure, entries: list[float], copies: int) -> None:
    w = vector(*entries)
    assert float(measure(w.repeat(copies))) == pytest.approx(float(measure(w)), abs=LEAST)


@each
@given(WHOLE, MAGNITUDES, st.data(), st.floats(0.1, 10))
def test_bill_gates(measure: Measure, entries: list[float], data: st.DataObject, farther: float) -> None:
    """The entry is larger than all others from the start on: there every further growth must count."""
    w = vector(*entries)
    place = data.draw(st.integers(0, len(w) - 1))
    others = float(w.sum() - w[place])
    assume(others > 0)  # an entry alone only scales the vector when it grows
    w[place] = 2 * others
    after = w.clone()
    after[place] *= 1 + farther
    assert float(measure(after)) > float(measure(w)) + LEAST


@each
@given(WHOLE, MAGNITUDES, st.integers(1, 5))
def test_babies(measure: Measure, entries: list[float], zeros: int) -> None:
    w = vector(*entries)
    assert float(measure(torch.cat((w, torch.zeros(zeros))))) > float(measure(w)) + LEAST


# --- and the others lack some -----------------------------------------------------------------------------------------


def test_orders_on_one_side_of_1_lose_robin_hood() -> None:
    """Below 1: many small entries fill the sum of the lower order, and the large ones hardly show in it."""
    below = vector(4, 3, *[0.001] * 200)
    assert float(pq_index(robin_hood(below, 0, 1, 0.4), 0.2, 0.8)) > float(pq_index(below, 0.2, 0.8)) + 1e-6
    above = vector(6, 0, 8)
    assert float(pq_index(robin_hood(above, 0, 1, 0.25), 2, 4)) > float(pq_index(above, 2, 4)) + 1e-2


@each
@given(MAGNITUDES)
def test_hoyer_lacks_cloning(entries: list[float]) -> None:
    """The same vector twice is called less sparse, always but for equal entries."""
    w = vector(*entries)
    assume(float(w.max() - w.min()) >= 0.01 * float(w.max()))
    assert float(hoyer(w.repeat(2))) < float(hoyer(w)) - LEAST


def test_hoyer_lacks_babies_where_one_entry_is_alone() -> None:
    assert [value(hoyer, 1, 0), value(hoyer, 1, 0, 0)] == pytest.approx([1, 1])
    assert value(hoyer, 2, 1) < value(hoyer, 2, 1, 0)


@each
@given(MAGNITUDES, st.floats(0.2, 0.8))
def test_soft_sparsity_lacks_cloning_and_babies(entries: list[float], q: float) -> None:
    w = vector(*entries)
    found = float(soft_sparsity(w, q))
    assert float(soft_sparsity(w.repeat(2), q)) == pytest.approx(found * 2 ** (1 / q - 1))
    assert float(soft_sparsity(torch.cat((w, torch.zeros(3))), q)) == pytest.approx(found)


# --- how many weights must stay ---------------------------------------------------------------------------------------

REALS = st.lists(st.floats(-100, 100), min_size=1, max_size=40).filter(lambda w: any(abs(x) > 1e-6 for x in w))
TWO_ORDERS = st.tuples(st.floats(0.1, 3), st.floats(0.1, 5)).filter(lambda orders: orders[1] - orders[0] > 0.05)
"""The bound asks for p < q alone, on either side of 1."""


@settings(deadline=None, max_examples=400)
@given(REALS, TWO_ORDERS, st.data())
def test_no_number_kept_is_below_its_bound(
    entries: list[float], orders: tuple[float, float], data: st.DataObject
) -> None:
    w = vector(*entries)
    kept = data.draw(st.integers(1, len(w)))
    eta = float(tail_ratio(w, kept, orders[0]))
    assert kept >= float(least_kept(w, *orders, eta=eta)) * (1 - 1e-9)


@settings(deadline=None, max_examples=400)
@given(REALS, st.floats(0.0, 0.9), st.floats(0.2, 3))
def test_as_many_as_are_needed_and_not_one_less(entries: list[float], lost: float, p: float) -> None:
    w = vector(*entries)
    kept = int(num_needed(w, lost, p))
    powers = sorted((abs(x) / 100) ** p for x in entries)
    share = [sum(powers[: len(w) - r]) / sum(powers) for r in (kept, kept - 1)]
    assert share[0] <= lost + 1e-9
    assert kept == 1 or share[1] > lost - 1e-9


@settings(deadline=None, max_examples=200)
@given(REALS, st.floats(0.2, 0.8), st.floats(0.01, 0.9))
def test_enough_is_enough_and_the_two_bounds_share_a_factor(entries: list[float], q: float, error: float) -> None:
    w, d = vector(*entries), len(entries)
    enough = float(enough_kept(w, q, error))
    assert int(num_needed(w, error, 1.0)) <= math.ceil(enough - 1e-9)
    shared = float(least_kept(w, q, 1.0))
    assert shared == pytest.approx(d * (1 - float(pq_index(w, q, 1))) ** (q / (1 - q)))
    assert enough == pytest.approx(min(d, shared * error ** (-q / (1 - q))))
