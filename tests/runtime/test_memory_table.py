"""The benchmark that measures the memory table, small and on a CPU: its models hold the bytes that are planned."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from packlight.checkpoint.config import spec_from_config
from packlight.plan.gpu import BLOCK, gpu_weight_bytes
from packlight.runtime.bitsandbytes import state_bytes

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/memory_table.py"
MOST_PARTS = 3
"""Blocks of the allocator that one tensor becomes."""


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_table"] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


# transformers' file of StarCoder's class is written with it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("loader", [None, "bnb-int8", "bnb-nf4"])
@pytest.mark.parametrize("name", ["StarCoder (OctoCoder)", "MPT-30b", "Llama-2-70b"])
def test_a_model_holds_what_is_planned(table: ModuleType, name: str, loader: str | None) -> None:
    if loader is not None:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
    config = {key: table.SMALL.get(key, value) for key, value in table.CONFIGS[name].items()}
    spec = spec_from_config({**config, "dtype": table.DTYPE}, name)
    model = table.random_model(config, spec, loader, "cpu")
    rounding = gpu_weight_bytes(spec, table.DTYPE, loader) - state_bytes(model)
    assert 0 <= rounding < MOST_PARTS * BLOCK * len(spec.tensors)
    assert table.answer(model) == table.NEW_TOKENS


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("StarCoder (OctoCoder)", 15.5),
        ("MPT-30b", 30.0),
        ("Falcon-40b", 41.3),
        ("Llama-2-7b", 6.7),
        ("Llama-2-13b", 13.0),
        ("Llama-2-70b", 69.0),
    ],
)
def test_the_configs_are_of_the_sizes_that_are_quoted(table: ModuleType, name: str, params: float) -> None:
    spec = spec_from_config({**table.CONFIGS[name], "dtype": "bfloat16"}, name)
    assert spec.num_params / 1e9 == pytest.approx(params, abs=0.06)
