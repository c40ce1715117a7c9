"""The rule of thumb and the rows that everybody quotes."""

from __future__ import annotations

import pytest

from packlight.errors import UsageError
from packlight.plan.thumb import parse_params, thumb_bytes


@pytest.mark.parametrize(
    ("params", "gigabytes"),
    [("175B", 350), ("176B", 352), ("70e9", 140), ("40B", 80), ("30B", 60), ("15.5B", 31)],
    ids=["GPT-3", "BLOOM", "Llama-2-70b", "Falcon-40b", "MPT-30b", "StarCoder"],
)
def test_published_rows(params: str, gigabytes: int) -> None:
    sizes = thumb_bytes(parse_params(params))
    assert sizes["bfloat16"] == sizes["float16"] == gigabytes * 10**9
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"] == 8 * sizes["int4"]


@pytest.mark.parametrize(
    ("text", "params"),
    [("70e9", 70 * 10**9), ("7B", 7 * 10**9), ("135M", 135 * 10**6), ("1.5b", 15 * 10**8), (" 12 k ", 12000), ("1", 1)],
)
def test_parse_params(text: str, params: int) -> None:
    assert parse_params(text) == params


@pytest.mark.parametrize("text", ["", "B", "-7B", "7GB", "seven", "0", "1e99", "1e9999", "nan", "inf", "7 B B", "0.1"])
def test_what_is_no_number_of_parameters(text: str) -> None:
    with pytest.raises(UsageError, match="70e9"):
        parse_params(text)


def test_no_parameters() -> None:
    with pytest.raises(UsageError, match="at least one"):
        thumb_bytes(0)
