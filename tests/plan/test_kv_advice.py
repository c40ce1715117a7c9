"""Bytes of every kind of KV cache, and whether one pays: short prompts, one token, little memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from packlight.checkpoint.config import spec_from_config
from packlight.plan.kv_advice import PAYS, KVAdvice, advise
from packlight.plan.kv_cache import GROUP, RECENT, KVCacheBytes, kind_bytes, value_group
from packlight.plan.memory import kv_cache_bytes, runtime_bytes
from packlight.plan.speed import pass_seconds, read_bytes
from packlight.spec import Budget, Hardware, KernelRate, ModelSpec, Precision

MACHINE = Hardware("cpu", 2, 2, 8 * 10**9, bandwidth_bytes_per_s=20e9, flops_per_s=100e9)
BF16 = Precision("bfloat16")


def spec_of(**changes: Any) -> ModelSpec:
    config = {
        **{"model_type": "llama", "architectures": ["X"], "dtype": "bfloat16", "vocab_size": 1000, "hidden_size": 256},
        **{"intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 4096, **changes},
    }
    return spec_from_config(config, "m")


def advice(prompt: int, new: int, memory: int | None = None, machine: Hardware = MACHINE, **changes: Any) -> KVAdvice:
    return advise(spec_of(**changes), BF16, Budget(memory, prompt + new, 1), machine, prompt, new)


# --- bytes ------------------------------------------------------------------------------------------------------


def test_static_and_growing_hold_every_token() -> None:
    spec = spec_of()
    whole = kv_cache_bytes(spec, 500, users=3)
    assert kind_bytes(spec, "static", 500, 3) == KVCacheBytes(whole, 0)
    assert kind_bytes(spec, "growing", 500, 3) == KVCacheBytes(whole, whole // 2 // 2)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_caches_by_hand(kind: Any, bits: int) -> None:
    spec = spec_of()  # two layers of two heads of 64 channels, keys and values
    tokens = (1000 - RECENT) // GROUP * GROUP
    codes = 2 * 2 * 2 * 64 * tokens * bits // 8
    scales = 2 * 2 * (64 * tokens // GROUP + tokens * 64 // 32) * 2 * 2  # keys, values; scale and least in 2 bytes
    recent = 2 * 2 * 2 * 64 * (RECENT + GROUP) * 2
    assert kind_bytes(spec, kind, 1000).held == codes + scales + recent
    assert kind_bytes(spec, kind, 1000).step == 2 * 2 * 64 * 1000 * 2  # one layer as it is computed with


def test_a_short_cache_has_no_codes() -> None:
    spec = spec_of()
    assert kind_bytes(spec, "int4", 40).held == kind_bytes(spec, "static", 40).held


def test_a_window_bounds_what_is_held() -> None:
    spec = spec_of()
    per_token = kv_cache_bytes(spec, 1)
    assert kind_bytes(spec, "sliding", 1000, window=100).held == 99 * per_token
    assert kind_bytes(spec, "sliding", 50, window=100).held == 50 * per_token
    own = spec_of(model_type="mistral", sliding_window=64)
    assert kind_bytes(own, "sliding", 1000).held == 63 * per_token


@pytest.mark.parametrize(("width", "group"), [(64, 32), (128, 32), (80, 16), (16, 16), (8, 8), (12, None), (7, None)])
def test_groups_of_values_divide_the_heads(width: int, group: int | None) -> None:
    assert value_group(width) == group


# --- advice -----------------------------------------------------------------------------------------------------


def test_a_long_answer_is_advised_a_cache() -> None:
    found = advice(500, 100)
    assert found.use == "static"
    assert found.computed_with == 599
    assert found.computed_without == sum(range(500, 600))
    assert found.seconds_with is not None and found.seconds_without is not None
    assert found.seconds_without > 10 * found.seconds_with
    assert "times as fast" in found.reason


def test_an_answer_of_one_token_needs_none() -> None:
    found = advice(500, 1)
    assert (found.use, found.computed_with, found.computed_without) == (None, 500, 500)
    assert "one token never looks at the cache; nor does training" in found.reason


def test_short_prompts_do_not_pay_where_reading_the_weights_takes_as_long() -> None:
    """20 GB/s and 100 GFLOP/s: reading a weight of 2 bytes takes as long as the arithmetic of five tokens."""
    assert advice(1, 3).use is None
    assert advice(1, 4).use is None
    assert "as long as reading the weights" in advice(1, 4).reason
    assert advice(1, 20).use == "static"


@pytest.mark.parametrize("prompt", [1, 3, 10, 300])
def test_the_break_even_point_is_where_it_begins_to_pay(prompt: int) -> None:
    found = advice(prompt, 2).break_even
    assert found is not None
    for new, pays in ((found - 1, False), (found, True), (found + 50, True)):
        if new > 1:
            made = advice(prompt, new)
            assert made.seconds_with is not None and made.seconds_without is not None
            assert (made.seconds_without >= PAYS * made.seconds_with) is pays
            assert (made.use == "static") is pays


def test_tight_memory_is_advised_a_smaller_kind_or_none() -> None:
    spec = spec_of(num_hidden_layers=12)
    memory = runtime_bytes(spec, BF16, Budget(None, 3000, 1))
    rest = memory.total - memory.kv_cache
    sizes = {kind: kind_bytes(spec, kind, 3000).total for kind in ("static", "int8", "int4", "offloaded")}
    assert sizes["static"] > sizes["int8"] > sizes["int4"] > sizes["offloaded"]
    for kind, size in sizes.items():
        assert advice(2900, 100, rest + size, num_hidden_layers=12).use == kind
    none = advice(2900, 100, rest + sizes["offloaded"] - 1, num_hidden_layers=12)
    assert none.use is None and "no kind of cache fits" in none.reason
    assert all(row.fits is False for row in none.kinds)


def test_without_rates_tokens_are_counted_and_no_time_is_claimed() -> None:
    found = advice(500, 100, machine=Hardware("cpu", 2, 2, 8 * 10**9))
    assert (found.use, found.seconds_with, found.seconds_without, found.break_even) == ("static", None, None, None)
    assert found.computed_without == sum(range(500, 600))


def test_a_window_of_the_user_s_is_not_advised() -> None:
    assert "sliding" not in {row.kind for row in advice(500, 100).kinds}
    own = spec_of(model_type="mistral", sliding_window=64)
    found = advise(own, BF16, Budget(None, 600, 1), MACHINE, 500, 100)
    assert "sliding" in {row.kind for row in found.kinds}


# --- seconds of a pass ------------------------------------------------------------------------------------------


def test_a_pass_takes_its_arithmetic_or_the_reading_of_the_weights() -> None:
    spec = spec_of()
    reading = sum(read_bytes(spec, BF16).values()) / 20e9
    params = sum(tensor.numel for tensor in spec.quantizable)
    pairs = 4 * 2 * 256 * 1000 * 1001 / 2 / 100e9
    assert pass_seconds(spec, BF16, MACHINE, 1) == pytest.approx(reading, rel=1e-3)
    assert pass_seconds(spec, BF16, MACHINE, 1000) == pytest.approx(2 * params * 1000 / 100e9 + pairs)
    cached = pass_seconds(spec, BF16, MACHINE, 1, 800)
    assert cached == pytest.approx(reading + kv_cache_bytes(spec, 800) / 20e9, rel=1e-3)


def test_rates_of_kernels_come_first() -> None:
    spec = spec_of()
    probed = replace(MACHINE, rates={"bfloat16": KernelRate(10e9, 1e-4, 50e9)})
    reading = sum(read_bytes(spec, BF16).values()) / 10e9
    assert pass_seconds(spec, BF16, probed, 1) == pytest.approx(2 * 1e-4 + reading, rel=1e-3)
    assert pass_seconds(spec, BF16, Hardware("cpu", 2, 2, 1), 1) is None
