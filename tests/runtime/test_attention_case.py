"""Which backend refuses what, on devices that a test machine need not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packlight.errors import MissingExtraError, UsageError
from packlight.plan.attention import BACKEND_NAMES
from packlight.runtime.attention_case import Case, check_case

PLAIN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "value_dim": 64}
ON_CUDA = {**PLAIN, "device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _flash_attn_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.runtime.attention_case.find_spec", lambda name: object())


def takers(base: dict[str, Any], **changes: Any) -> set[str]:
    """The backends that take a case."""
    found = set()
    for name in BACKEND_NAMES:
        try:
            check_case(name, Case(**{**base, **changes}))
        except UsageError as error:
            assert f"the attention backend {name} does not take " in str(error)
            instead = str(error).rpartition(": use ")[2]
            check_case(instead, Case(**{**base, **changes}))  # what is advised does take it
        else:
            found.add(name)
    return found


ALL = set(BACKEND_NAMES)
OWN_FORMULA = {"auto", "eager"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ALL - {"flash-attn"}),
        ({"dtype": torch.float64}, ALL - {"flash-attn", "flex"}),
        ({"dtype": torch.float16}, ALL - {"flash-attn"}),
        ({"head_dim": 512, "value_dim": 512}, ALL - {"flash-attn"}),
        ({"value_dim": 32}, ALL - {"flash-attn", "flash"}),
        ({"dropout": 0.1}, OWN_FORMULA | {"math"}),
        ({"softcap": 50.0}, OWN_FORMULA | {"flex", "tiled"}),
        ({"has_sinks": True}, OWN_FORMULA),
        ({"has_dense_mask": True}, ALL - {"flash-attn"}),
        ({"has_position_bias": True}, OWN_FORMULA | {"flex"}),
        ({"is_paged": True}, OWN_FORMULA),
        ({"needs_weights": True}, OWN_FORMULA),
        ({"needs_grad": True}, ALL - {"flash-attn", "flex"}),
        ({"device": "mps"}, ALL - {"flash-attn", "flash"}),
    ],
)
def test_on_a_cpu(changes: dict[str, Any], wanted: set[str]) -> None:
    assert takers(PLAIN, **changes) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ALL),
        ({"dtype": torch.float32}, ALL - {"flash", "flash-attn"}),
        ({"head_dim": 512, "value_dim": 512}, ALL - {"flash", "flash-attn"}),
        ({"head_dim": 256, "value_dim": 256}, ALL),
        ({"has_dense_mask": True}, ALL - {"flash"}),
        ({"dropout": 0.1}, OWN_FORMULA | {"math", "flash", "flash-attn"}),
        ({"softcap": 50.0}, OWN_FORMULA | {"flex", "tiled", "flash-attn"}),
        ({"has_sinks": True}, OWN_FORMULA | {"flex"}),
        ({"needs_grad": True}, ALL),
    ],
)
def test_on_cuda(changes: dict[str, Any], wanted: set[str]) -> None:
    assert takers(ON_CUDA, **changes) == wanted


def test_a_missing_package_comes_after_what_it_could_not_do_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.runtime.attention_case.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        check_case("flash-attn", Case(**ON_CUDA))
    with pytest.raises(UsageError, match="only cuda"):
        check_case("flash-attn", Case(**PLAIN))
