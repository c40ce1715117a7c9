"""Every method of the registry keeps the contract, with its defaults and with some other hyper-parameters."""

from __future__ import annotations

from typing import Any

import pytest
from tests.contracts.step_contract import StepContract

from packlight.compress.registry import METHODS, build
from packlight.compress.step import Step

OTHERS: list[dict[str, Any]] = [
    {"method": "cast", "dtype": "float16"},
    {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "embeddings": 4},
    {"method": "rtn", "bits": 8, "group_size": None, "embeddings": 8, "dtype": "float32"},
    {"method": "rtn", "bits": 4, "group_size": None, "embeddings": 8},
    {"method": "magnitude", "sparsity": 0.7, "scope": "row", "storage": "bitmask"},
    {"method": "wanda", "scope": "2:4", "storage": "bitmask", "dtype": "float32"},
    {"method": "sparsegpt", "sparsity": 0.3, "scope": "row", "block_size": 24},
    {"method": "blocks", "sparsity": 0.5, "dtype": "float32"},
    {"method": "flap", "sparsity": 0.5, "score": "wanda", "repair": "affine", "dtype": "float32"},
    {"method": "flap", "repair": "least-squares", "multiple": 24},
    {"method": "flap", "repair": "none", "sparsity": 0.0},
]
STEPS = [*({"method": name} for name in METHODS), *OTHERS]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", STEPS, ids=name_of)
class TestSteps(StepContract):
    """The contract, once for each entry of `STEPS`."""

    @pytest.fixture
    def step(self, options: dict[str, Any]) -> Step:
        return build(options)
