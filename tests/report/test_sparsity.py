"""The sentence about zeros claims no more than the rows say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packlight.evidence import Measurement
from packlight.report.sparsity import sentences, what_removal_saved, what_was_measured, what_zeros_saved


def rows(stored: int, dense: int) -> list[Measurement]:
    return [
        Measurement("sparsity", 0.5, "1", "packed"),
        Measurement("disk_bytes", 9_000, "bytes", "original"),
        Measurement("disk_bytes", stored, "bytes", "packed"),
        Measurement("dense_bytes", dense, "bytes", "packed"),
    ]


@pytest.mark.parametrize(
    ("stored", "says"), [(4000, "save nothing"), (3000, "3 kB instead of 4 kB, 25 % less"), (5000, "25 % more")]
)
def test_what_is_said(stored: int, says: str) -> None:
    said = what_zeros_saved(rows(stored, 4000))
    assert said is not None and said.startswith("50 % of the weights") and says in said
    assert "no memory and no time are saved" in said


def test_without_a_sparsity_there_is_nothing_to_say() -> None:
    assert what_zeros_saved(rows(3000, 4000)[1:]) is None
    assert what_zeros_saved([]) is None


def removed(decode_tps: float) -> list[Measurement]:
    return [
        Measurement("removed", 0.25, "1", "packed", note="2 of 8 blocks"),
        Measurement("disk_bytes", 3000, "bytes", "packed"),
        Measurement("whole_bytes", 4000, "bytes", "packed"),
        Measurement("peak_bytes", 5000, "bytes", "original"),
        Measurement("peak_bytes", 4000, "bytes", "packed"),
        Measurement("decode_tps", 10.0, "tokens/s", "original"),
        Measurement("decode_tps", decode_tps, "tokens/s", "packed"),
    ]


@pytest.mark.parametrize(
    ("decode_tps", "says"),
    [
        (12.5, "decode 12.5 tokens/s instead of 10 tokens/s, 25 % more"),
        (9.0, "decode 9 tokens/s instead of 10 tokens/s, 10 % less"),
        (10.0, "decode 10 tokens/s instead of 10 tokens/s, as much"),
    ],
)
def test_what_removal_saved_is_said_as_it_was_measured(decode_tps: float, says: str) -> None:
    rows = removed(decode_tps)
    assert what_zeros_saved(rows) is None
    bytes_alone = what_removal_saved(rows)
    assert bytes_alone == (
        "25 % of all parameters are gone (2 of 8 blocks): the weight files have 3 kB instead of 4 kB, 25 % less."
    )
    measured = what_was_measured(rows)
    assert measured is not None and says in measured and "peak memory 4 kB instead of 5 kB, 20 % less" in measured
    assert "prefill" not in measured
    assert sentences(rows) == {"removed": f"{bytes_alone} {measured}"}


def test_nothing_is_said_about_what_was_not_measured() -> None:
    assert what_was_measured(removed(1.0)[:3]) is None
    assert sentences(removed(1.0)[:3]).keys() == {"removed"}
    assert sentences([]) == {}


def test_a_difference_within_the_spread_is_none() -> None:
    rows = [row if row.name != "decode_tps" else replace(row, spread=2.0) for row in removed(13.0)]
    assert "decode 13 tokens/s instead of 10 tokens/s, no difference beyond the spread of 4 tokens/s" in str(
        what_was_measured(rows)
    )
    rows = [row if row.name != "decode_tps" else replace(row, spread=1.0) for row in removed(13.0)]
    assert "30 % more" in str(what_was_measured(rows))
