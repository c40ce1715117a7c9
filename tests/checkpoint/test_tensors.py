"""Tensors come into memory of their own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packlight.checkpoint.shards import SINGLE_NAME, TensorEntry, read_index
from packlight.checkpoint.tensors import check_architecture, has_nan, read_tensor
from packlight.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "f32": torch.randn(7, 3),
        "bf16": torch.randn(5, 2, 2).to(torch.bfloat16),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "i8": torch.arange(-5, 6, dtype=torch.int8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / SINGLE_NAME)
    return tensors


def test_every_dtype_and_shape_is_read_exactly(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    index = read_index(tmp_path)
    assert set(index) == set(saved)
    for name, tensor in saved.items():
        read = read_tensor(index[name])
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_the_memory_is_its_own(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    entry = read_index(tmp_path)["f32"]
    read_tensor(entry).zero_()
    assert torch.equal(read_tensor(entry), saved["f32"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_found(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    good = torch.ones(100)
    spoiled = good.clone()
    spoiled[77] = bad
    save_file({"good": good.to(dtype), "spoiled": spoiled.to(dtype)}, tmp_path / SINGLE_NAME)
    index = read_index(tmp_path)
    assert not has_nan(index["good"]) and has_nan(index["spoiled"])


def test_integers_and_nothing_have_no_nan(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    index = read_index(tmp_path)
    assert not has_nan(index["i8"]) and not has_nan(index["empty"])


def test_a_file_that_shrank_is_an_error(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    last = max(read_index(tmp_path).values(), key=lambda entry: entry.offset)
    gone = TensorEntry("x", "float32", (100,), last.file, last.offset, 400)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_tensor(gone)


def test_only_causal_language_models_pass() -> None:
    check_architecture({"model_type": "llama"})
    for config in ({"model_type": "t5"}, {"model_type": "nothing"}, {}):
        with pytest.raises(CheckpointError, match="no causal language model class"):
            check_architecture(config)
