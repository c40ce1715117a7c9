"""What each method says about its own hyper-parameters, and the numbers in its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.artifacts import make_artifact

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.checkpoint.tensors import read_tensor
from packlight.compress import run as compress
from packlight.compress.cast import Cast
from packlight.compress.quantize.options import embedding_grid
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.step import Step
from packlight.compress.walk import WalkResult
from packlight.errors import UsageError
from packlight.ops.grid import quantize
from packlight.runtime.load import load_model
from packlight.spec import Grid, Precision

IDS = list(range(1, 40))


@pytest.fixture
def checkpoint(tiny_model_dir: Any) -> Checkpoint:
    return open_checkpoint(tiny_model_dir(tied=True))


def rows_of(step: Step, checkpoint: Checkpoint, work: Path) -> dict[str, float]:
    rows = compress.run(step, checkpoint, work, "pack-quantized", IDS, None, WalkResult())
    return {row.subject: row.value for row in rows}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"bits": 9}, "bits must be 2 to 8, not 9"),
        ({"bits": None}, "bits must be 2 to 8, not None"),
        ({"embeddings": 1}, "bits must be 2 to 8, not 1"),
        ({"scale_bits": 3}, "scale bits must be 4 to 8, not 3"),
        ({"scale_bits": 6, "group_size": None}, "give a group size"),
        ({"clip": "max"}, "clip is minmax or mse, not 'max'"),
        ({"grids": ["x"]}, "grids are pairs"),
        ({"grids": [["x", "int4"]]}, "a grid is written like"),
        ({"group_size": 0}, "group size must be 'row' or a positive number of columns, not 0"),
        ({"group_size": -32}, "not -32"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, not 'float64'"),
    ],
)
def test_rtn_checks_its_ranges(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Rtn(**bad)


def test_cast_checks_its_dtype() -> None:
    with pytest.raises(UsageError, match="dtype must be one of"):
        Cast("int8")


def test_a_group_that_divides_no_row_is_refused_by_the_plan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a group of 48 columns does not divide a row of (64|128)"):
        compress.check(Rtn(4, 48), checkpoint)
    with pytest.raises(UsageError, match="a group of 48 columns"):
        make_artifact(checkpoint.path, tmp_path / "out", group_size=48)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("linear", "bits", "wanted"),
    [
        (Grid(4, 32), None, None),
        (Grid(4, 32, False), 4, Grid(4, 32, False)),
        (Grid(4, 32, False), 8, Grid(8, None, False)),
        (Grid(8, None), 8, Grid(8, None)),
        (Grid(8, 64), 8, Grid(8, 64)),
        (Grid(8, 64), 4, Grid(4, 64)),
    ],
)
def test_the_grid_of_the_embeddings(linear: Grid, bits: int | None, wanted: Grid | None) -> None:
    assert embedding_grid(linear, bits) == wanted
    assert Rtn(linear.bits, linear.group_size, linear.symmetric, bits).precision == Precision(
        "bfloat16", linear, wanted
    )


def test_a_row_of_rtn_is_the_relative_error_of_its_block(checkpoint: Checkpoint, tmp_path: Path) -> None:
    step = Rtn(4, 32, symmetric=False)
    rows = rows_of(step, checkpoint, tmp_path)
    assert rows["embedding"] == rows["head"] == 0.0  # left alone
    error = norm = 0.0
    for spec in checkpoint.spec.quantizable:
        if spec.name.startswith("model.layers.1."):
            weight = read_tensor(checkpoint.index[spec.name])
            rounded = quantize(weight, Grid(4, 32, False), torch.bfloat16).dequantize()
            error += float((rounded.double() - weight.double()).square().sum())
            norm += float(weight.double().square().sum())
    assert rows["model.layers.1"] == pytest.approx(error / norm, rel=1e-4)  # sums in float32 against float64
    assert 0 < rows["model.layers.1"] < 0.05


def test_more_bits_and_smaller_groups_err_less(checkpoint: Checkpoint, tmp_path: Path) -> None:
    steps = [Rtn(4, None), Rtn(4, 64), Rtn(4, 16), Rtn(8, None)]
    errors = [rows_of(step, checkpoint, tmp_path / str(place))["model.layers.0"] for place, step in enumerate(steps)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


def test_a_row_of_cast_is_the_rounding_of_its_dtype(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = rows_of(Cast("bfloat16"), checkpoint, tmp_path / "bf16")
    # A rounding error is at most half an epsilon of the value.
    assert 0 < rows["model.layers.0"] <= (torch.finfo(torch.bfloat16).eps / 2) ** 2
    assert set(rows_of(Cast("float32"), checkpoint, tmp_path / "f32").values()) == {0.0}


def test_a_cast_model_is_the_original_rounded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = load_model(open_checkpoint(make_artifact(checkpoint.path, tmp_path / "out", method="cast")))
    original = load_model(checkpoint)
    for name, parameter in original.named_parameters():
        assert torch.equal(made.get_parameter(name), parameter.to(torch.bfloat16))
