"""Rows of repeated runs; the runs themselves are in tests/export, beside the package that they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from packlight.errors import MeasurementError
from packlight.measure.first_token import first_token, first_token_rows


def answer(first: float, rate: float) -> dict[str, object]:
    return {
        "first_token_s": first,
        "second_token_s": first + 1,
        "decode_tps": rate,
        "num_prompt_tokens": 7,
        "tokens": [1, 2, 3],
    }


def test_rows_are_medians_with_half_the_range() -> None:
    rows = {row.name: row for row in first_token_rows("eager", [answer(2, 10), answer(5, 30), answer(3, 20)])}
    assert rows["first_token_s"].value == 3
    assert rows["first_token_s"].spread == 1.5
    assert rows["second_token_s"].value == 4
    assert (rows["decode_tps"].value, rows["decode_tps"].unit) == (20, "tokens/s")
    assert {row.n for row in rows.values()} == {3}
    assert {row.subject for row in rows.values()} == {"eager"}


def test_one_run_has_no_spread() -> None:
    assert [row.spread for row in first_token_rows("eager", [answer(2, 10)])] == [None] * 3


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="ended with code 1"):
        first_token("package", tmp_path, "text")


def test_the_process_is_measured_from_its_start(tiny_model_dir: Callable[..., Path]) -> None:
    found = first_token("eager", tiny_model_dir(tied=False), "The quick brown fox", num_tokens=4, context=64)
    assert len(found["tokens"]) == 4 and found["num_prompt_tokens"] == len("The quick brown fox")
    assert found["second_token_s"] > found["first_token_s"] > 0.3  # importing torch alone takes longer
    assert found["decode_tps"] > 1
