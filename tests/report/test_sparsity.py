"""The sentence about zeros claims no more than the rows say."""

from __future__ import annotations

import pytest

from packlight.evidence import Measurement
from packlight.report.sparsity import what_zeros_saved


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
