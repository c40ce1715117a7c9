"""The integer program against trying everything, and allocations against their budgets."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.plan.allocate import (
    END_GRIDS,
    INNER_GRIDS,
    Option,
    allocate,
    allocate_within,
    least_precision,
    options_for,
    resident_bytes_of,
    stored_bytes,
)
from packlight.plan.layout import tensor_layout, total_bytes
from packlight.plan.memory import resident_bytes, runtime_bytes
from packlight.plan.recipes import grid_error
from packlight.plan.speed import decode_speed
from packlight.spec import Budget, Grid, Hardware, KernelRate, ModelSpec, Precision, TensorSpec

RATES = {
    "int4": KernelRate(10e9, 1e-5, 1e11),
    "int8": KernelRate(10e9, 1e-5, 1e11),
    "reference": KernelRate(1e9, 1e-5, 1e11),
    "bfloat16": KernelRate(10e9, 1e-5, 1e11),
}
MACHINE = Hardware("test", 2, 2, 10**10, 1e10, RATES)


def spec_of(layers: int = 3, is_tied: bool = True) -> ModelSpec:
    tensors = [TensorSpec("model.embed_tokens.weight", (1024, 256), "float32", "embedding")]
    for place in range(layers):
        base = f"model.layers.{place}"
        tensors.append(TensorSpec(f"{base}.self_attn.q_proj.weight", (256, 256), "float32", "linear"))
        tensors.append(TensorSpec(f"{base}.mlp.down_proj.weight", (256, 768), "float32", "linear"))
        tensors.append(TensorSpec(f"{base}.input_layernorm.weight", (256,), "float32", "other"))
    if not is_tied:
        tensors.append(TensorSpec("lm_head.weight", (1024, 256), "float32", "head"))
    return ModelSpec(
        **{"name": "m", "architecture": "M", "model_type": "llama", "dtype": "float32", "is_tied": is_tied},
        **{"hidden_size": 256, "intermediate_size": 768, "num_layers": layers, "num_heads": 4, "num_kv_heads": 4},
        **{"head_dim": 64, "vocab_size": 1024, "max_context": 512, "tensors": tuple(tensors)},
    )


def losses_of(spec: ModelSpec) -> dict[str, dict[str, float]]:
    """The later a matrix comes, the more an error in it costs."""
    found = {}
    for place, tensor in enumerate(spec.tensors):
        if tensor.kind != "other":
            grids = [g for g in (END_GRIDS if tensor.is_end else INNER_GRIDS) if g.fits(tensor.shape[1])]
            found[tensor.name] = {str(grid): (1 + place) * grid_error(grid, tensor.shape[1]) for grid in grids}
    return found


options = st.lists(
    st.builds(Option, st.just(None), st.integers(0, 1000).map(float), st.integers(1, 50), st.integers(1, 9).map(float)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(options, min_size=1, max_size=4), st.integers(1, 120), st.none() | st.integers(1, 25))
def test_it_is_as_good_as_trying_everything(several: list[list[Option]], most: int, seconds: int | None) -> None:
    best = math.inf
    for choice in itertools.product(*several):
        is_short = seconds is None or sum(option.seconds for option in choice) <= seconds
        if is_short and sum(option.nbytes for option in choice) <= most:
            best = min(best, sum(option.loss for option in choice))
    found = allocate({str(place): each for place, each in enumerate(several)}, most, seconds)
    assert (found is None) == math.isinf(best)
    if found is not None:
        assert found.loss <= best * 1.001 + 1e-6
        assert found.nbytes <= most
        assert found.nbytes == sum(option.nbytes for option in found.chosen.values())


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_allocation_keeps_to_its_memory_and_more_memory_buys_less_loss(is_tied: bool) -> None:
    spec = spec_of(is_tied=is_tied)
    least = runtime_bytes(spec, least_precision(spec), Budget(context=64)).total
    losses = []
    for memory in range(int(least * 1.03), int(least * 1.6), least // 20):
        budget = Budget(memory, 64)
        found = allocate_within(spec, losses_of(spec), budget, MACHINE)
        assert found is not None
        precision = Precision.of("bfloat16", found.grids, spec.tensors)
        assert runtime_bytes(spec, precision, budget).total <= memory
        assert found.nbytes == resident_bytes(spec, precision) - sum(
            2 * tensor.numel for tensor in spec.tensors if tensor.kind == "other"
        )
        losses.append(found.loss)
    assert losses[0] > losses[-1]
    # Up to the solver's gap, and to the step from slow grids to fast ones, which is not the cheapest in loss.
    assert all(after <= before * 1.2 for before, after in itertools.pairwise(losses))
    assert allocate_within(spec, losses_of(spec), Budget(int(least * 0.9), 64), MACHINE) is None


def test_what_matters_more_gets_more_bits() -> None:
    spec = spec_of()
    budget = Budget(
        int(runtime_bytes(spec, Precision("bfloat16", Grid(4, 64, False), Grid(8)), Budget(None, 64)).total), 64
    )
    found = allocate_within(spec, losses_of(spec), budget, MACHINE)
    assert found is not None
    bits = [found.grids[f"model.layers.{place}.mlp.down_proj.weight"].bits for place in range(3)]  # type: ignore[union-attr]
    assert bits == sorted(bits)


def test_slow_grids_come_in_only_where_memory_leaves_no_choice() -> None:
    spec = spec_of()
    least = runtime_bytes(spec, least_precision(spec), Budget(context=64)).total
    for memory, is_slow in ((int(least * 1.05), True), (int(least * 1.8), False)):
        found = allocate_within(spec, losses_of(spec), Budget(memory, 64), MACHINE)
        assert found is not None
        used = {grid.bits for grid in found.grids.values() if grid is not None}
        assert (not used <= {4, 8}) is is_slow


def test_a_speed_that_is_asked_for_is_kept() -> None:
    spec = spec_of()
    least = runtime_bytes(spec, least_precision(spec), Budget(context=64)).total
    budget = Budget(int(least * 1.3), 64)
    free = allocate_within(spec, losses_of(spec), budget, MACHINE)
    assert free is not None
    fastest = decode_speed(
        spec, Precision("bfloat16", Grid(4, 128, False), Grid(4, 128, False)), MACHINE, 64
    ).tokens_per_s
    assert fastest is not None
    wanted = Budget(2 * int(least), 64, min_tps=0.9 * fastest)
    found = allocate_within(spec, losses_of(spec), wanted, MACHINE)
    assert found is not None
    speed = decode_speed(spec, Precision.of("bfloat16", found.grids, spec.tensors), MACHINE, 64).tokens_per_s
    assert speed is not None and speed >= 0.9 * fastest
    assert allocate_within(spec, losses_of(spec), Budget(2 * int(least), 64, min_tps=100 * fastest), MACHINE) is None


def test_stored_bytes_are_those_of_the_layout() -> None:
    spec = spec_of()
    grid = Grid(3, 32, False, 6)
    precision = Precision("bfloat16", grid, grid)
    sizes = sum(stored_bytes(tensor, precision) for tensor in spec.tensors)
    assert sizes == total_bytes(tensor_layout(spec, precision))


def test_a_matrix_whose_grids_no_allowed_kernel_serves_keeps_its_choice() -> None:
    spec = spec_of()
    name = "model.layers.0.mlp.down_proj.weight"
    found = options_for(spec, {name: {"int3-g64-asym": 1.0}}, resident_bytes_of(spec), is_allowed=lambda kernel: False)
    assert [str(option.grid) for option in found[name]] == ["int3-g64-asym"]


def test_two_bits_are_a_last_resort() -> None:
    """They look cheap here, and are taken where nothing else fits, by as few matrices as the sum then asks for."""
    options = {
        name: [Option(Grid(2, 32), 0.2, 10), Option(Grid(3, 32), 0.11, 15), Option(Grid(4, 32), 0.0, 20)]
        for name in ("a", "b")
    }
    found = allocate(options, 30)
    assert found is not None and [option.grid for option in found.chosen.values()] == [Grid(3, 32), Grid(3, 32)]
    found = allocate(options, 29)
    assert found is not None and sorted(option.grid.bits for option in found.chosen.values() if option.grid) == [2, 3]
    assert allocate(options, 19) is None
