"""Linears in oneDNN's layout: the same products, and none that depends on what stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from packlight.checkpoint.open import open_checkpoint
from packlight.runtime.load import load_model
from packlight.runtime.serving.prepacked import PrepackedLinear, can_prepack, prepack_

pytestmark = pytest.mark.skipif(not can_prepack(), reason="this torch has no packed products of oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 48), (33, 257), (192, 576)])
def test_the_product_is_that_of_the_linear(rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias)
    packed = PrepackedLinear(linear)
    with torch.inference_mode():
        for shape in ((1,), (7,), (2, 3), (1, 0)):
            x = torch.randn(*shape, columns)
            torch.testing.assert_close(packed(x), linear(x))


def test_a_row_is_the_same_whatever_the_others_are() -> None:
    """To the last bit: an answer must not depend on who is answered beside it."""
    torch.manual_seed(0)
    packed = PrepackedLinear(nn.Linear(576, 1536))
    x = torch.randn(100, 576)
    with torch.inference_mode():
        whole = packed(x)
        for count in (1, 2, 5, 16, 33, 64):
            assert torch.equal(packed(x[:count]), whole[:count])


def test_a_model_keeps_its_logits_and_its_embedding(tiny_model_dir: Callable[..., Path]) -> None:
    for tied in (True, False):
        model = load_model(open_checkpoint(tiny_model_dir(tied=tied)))
        ids = torch.arange(20)[None]
        with torch.inference_mode():
            wanted = model(ids).logits
            assert prepack_(model) == 2 * 7 + 1
            assert prepack_(model) == 0
            torch.testing.assert_close(model(ids).logits, wanted)
        assert isinstance(model.get_input_embeddings(), nn.Embedding)


def test_other_types_stay_as_they_are(tiny_model_dir: Callable[..., Path]) -> None:
    assert prepack_(load_model(open_checkpoint(tiny_model_dir(tied=False)), "bfloat16")) == 0
