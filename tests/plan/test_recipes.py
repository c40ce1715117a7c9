"""Candidates, their order, and the plan that is printed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from packlight.checkpoint.config import spec_from_config
from packlight.plan.plan import make_plan
from packlight.plan.recipes import candidates, grid_error, loads_in_transformers, loss_proxy, rank, smallest
from packlight.spec import Budget, Grid, Hardware, KernelRate, ModelSpec, Precision

HARDWARE = Hardware("cpu", 2, 2, 8 * 10**9, 20e9)


def spec_of(**changes: Any) -> ModelSpec:
    config = {
        **{"model_type": "llama", "architectures": ["X"], "dtype": "float32", "vocab_size": 8192, "hidden_size": 576},
        **{"intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"tie_word_embeddings": True, **changes},
    }
    return spec_from_config(config, "m")


def test_only_grids_that_fit_every_row() -> None:
    names = {str(precision) for precision in candidates(spec_of())}
    assert {"float32", "bfloat16", "int8-row-sym", "int4-g64-sym", "int4-g32-asym", "int4-row-sym"} <= names
    assert not any("g128" in name for name in names)  # 576 is no multiple of 128
    wide = spec_of(hidden_size=640, num_attention_heads=10, num_key_value_heads=2)
    assert "int4-g128-sym" in {str(precision) for precision in candidates(wide)}


def test_portable_candidates_have_one_grid() -> None:
    spec = spec_of()
    assert all(loads_in_transformers(precision, spec) for precision in candidates(spec))
    everything = candidates(spec, is_portable_only=False)
    two_grids = Precision(linear=Grid(4, 32), embedding=Grid(8))
    assert two_grids in everything
    assert two_grids not in candidates(spec)
    assert len(set(everything)) == len(everything)


def test_what_does_not_load_in_transformers() -> None:
    packed = Precision(linear=Grid(8))
    assert loads_in_transformers(packed, spec_of())
    assert loads_in_transformers(Precision(embedding=Grid(8)), spec_of())
    assert not loads_in_transformers(packed, replace(spec_of(), model_type="gpt2"))
    assert not loads_in_transformers(packed, spec_of(model_type="mixtral", num_local_experts=2))


def test_a_packed_checkpoint_stays_what_it_is() -> None:
    stored = Precision(linear=Grid(4, 32))
    assert candidates(replace(spec_of(), stored=stored)) == [stored]


def test_a_narrow_source_is_not_widened() -> None:
    assert str(candidates(spec_of(dtype="bfloat16"))[0]) == "bfloat16"
    assert "float32" not in {str(p) for p in candidates(spec_of(dtype="bfloat16"))}


@pytest.mark.parametrize(
    "grid", [Grid(4, 32), Grid(4, 32, symmetric=False), Grid(8, 128), Grid(4, 128, symmetric=False)]
)
def test_grid_error_is_that_of_rounding_gaussian_weights(grid: Grid) -> None:
    count, groups = grid.group_size or 0, 1500
    draw, error, power = random.Random(0), 0.0, 0.0
    for _ in range(groups):
        values = [draw.gauss(0, 1) for _ in range(count)]
        width = 2 * max(map(abs, values)) if grid.symmetric else max(values) - min(values)
        step = width / (2**grid.bits - 1)
        error += sum((value - step * round(value / step)) ** 2 for value in values)
        power += sum(value * value for value in values)
    assert grid_error(grid, 10**6) == pytest.approx(
        error / power, rel=0.08
    )  # the largest weight falls between two codes


def test_grid_error_orders_grids() -> None:
    errors = [grid_error(grid, 576) for grid in (Grid(8), Grid(4, 32), Grid(4, 64), Grid(4))]
    assert errors == sorted(set(errors))
    assert grid_error(Grid(4, 32, symmetric=False), 576) < grid_error(Grid(4, 32), 576)
    assert loss_proxy(spec_of(), Precision("float32")) == 0
    assert 0 < loss_proxy(spec_of(), Precision("bfloat16")) < loss_proxy(spec_of(), Precision(linear=Grid(8)))


def test_the_best_that_fits_comes_first() -> None:
    spec = spec_of()
    unlimited = rank(spec, Budget(), HARDWARE)
    assert str(unlimited[0].precision) == "float32"
    assert all(candidate.is_feasible for candidate in unlimited)
    assert [c.loss_proxy for c in unlimited] == sorted(c.loss_proxy for c in unlimited)
    limit = next(c for c in unlimited if str(c.precision) == "int8-row-sym").memory.total
    limited = rank(spec, Budget(memory_bytes=limit), HARDWARE)
    assert limited[0].memory.total <= limit
    assert limited[0].precision.linear is not None and limited[0].precision.linear.bits == 8
    assert [c.is_feasible for c in limited] == sorted((c.is_feasible for c in limited), reverse=True)


def test_a_budget_that_nothing_meets_names_the_smallest() -> None:
    judged = rank(spec_of(), Budget(memory_bytes=1000), HARDWARE)
    assert not any(candidate.is_feasible for candidate in judged)
    assert "of the 1 kB allowed" in judged[0].reasons[0]
    assert smallest(judged) is judged[0]


def test_speed_and_context_are_checked() -> None:
    fast = rank(spec_of(), Budget(min_tps=1e9), HARDWARE)
    assert all("tokens/s" in candidate.reasons[0] for candidate in fast)
    unknown = rank(spec_of(), Budget(min_tps=1), replace(HARDWARE, bandwidth_bytes_per_s=None))
    assert all("cannot be predicted" in candidate.reasons[0] for candidate in unknown)
    long = rank(spec_of(), Budget(context=10**6), HARDWARE)
    assert all("beyond the model's 2048" in candidate.reasons[0] for candidate in long)


def test_the_plan_is_plain_json() -> None:
    rates = {"bfloat16": KernelRate(1e10, 1e-5, 1e11)}
    plan = make_plan(spec_of(), Budget(memory_bytes=10**8), replace(HARDWARE, rates=rates))
    data = json.loads(json.dumps(plan.to_json()))
    assert [row["precision"] for row in data["rows"]][:4] == ["float32", "bfloat16", "float16", "int8-row-sym"]
    for row in data["rows"]:
        parts = row["memory"]
        assert parts["total"] == sum(parts[key] for key in ("weights", "kv_cache", "activations", "overhead"))
        assert row["fits"] == (not row["reasons"]) == (parts["total"] <= 10**8)
    assert data["budget"]["memory_bytes"] == 10**8


def test_notes_tell_of_windows_and_experts() -> None:
    sliding = replace(spec_of(), sliding_window=128, num_sliding_layers=2)
    assert "2 of 4 layers look back 128 tokens" in make_plan(sliding, Budget(), HARDWARE).notes[0]
    mixture = spec_of(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert "2 of 4 experts" in make_plan(mixture, Budget(), HARDWARE).notes[0]


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, packlight.plan.plan, packlight.plan.thumb;"
        "import packlight.checkpoint.config, packlight.measure.bandwidth;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
