"""Tokens per second from bytes and rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from packlight.checkpoint.config import spec_from_config
from packlight.plan.memory import PREFILL_CHUNK, kv_cache_bytes
from packlight.plan.speed import decode_speed, prefill_speed, read_bytes
from packlight.spec import Grid, Hardware, KernelRate, ModelSpec, Precision

BARE = Hardware("cpu", 2, 2, 8 * 10**9)
PROBED = replace(
    BARE,
    bandwidth_bytes_per_s=20e9,
    rates={
        "bfloat16": KernelRate(10e9, 1e-4, 100e9),
        "int8": KernelRate(8e9, 1e-4, 80e9),
        "int4": KernelRate(5e9, 1e-4, 60e9),
    },
)


def spec_of(**changes: Any) -> ModelSpec:
    config = {
        **{"model_type": "llama", "architectures": ["X"], "dtype": "bfloat16", "vocab_size": 1000, "hidden_size": 256},
        **{"intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, **changes},
    }
    return spec_from_config(config, "m")


def test_an_untied_embedding_is_not_read() -> None:
    untied, tied = spec_of(), spec_of(tie_word_embeddings=True)
    assert read_bytes(untied, Precision()) == read_bytes(tied, Precision())
    assert read_bytes(untied, Precision())["bfloat16"] == (untied.num_params - 256_000) * 2


def test_mixed_precision_is_summed_by_kernel() -> None:
    spec = spec_of()
    read = read_bytes(spec, Precision(linear=Grid(4, 32), embedding=Grid(8)))
    linear = sum(tensor.numel for tensor in spec.quantizable)
    assert read == {"int4": linear // 2 + linear // 32 * 4, "int8": 256_000 + 2000, "bfloat16": 5 * 256 * 2}


def test_decode_with_rates() -> None:
    spec = spec_of()
    speed = decode_speed(spec, Precision(), PROBED, context=100)
    seconds = 2 * 1e-4 + (read_bytes(spec, Precision())["bfloat16"] + kv_cache_bytes(spec, 100)) / 10e9
    assert (speed.tokens_per_s, speed.is_upper_bound) == (pytest.approx(1 / seconds), False)


def test_decode_without_rates_is_bounded_by_bandwidth() -> None:
    spec = spec_of()
    only_bandwidth = replace(BARE, bandwidth_bytes_per_s=20e9)
    speed = decode_speed(spec, Precision(), only_bandwidth, context=100)
    assert speed.is_upper_bound
    assert "no rate is known for bfloat16" in speed.reason
    read = read_bytes(spec, Precision())["bfloat16"] + kv_cache_bytes(spec, 100)
    assert speed.tokens_per_s == pytest.approx(20e9 / read)


def test_nothing_known_is_no_number() -> None:
    speed = decode_speed(spec_of(), Precision(), BARE, context=100)
    assert (speed.tokens_per_s, speed.is_upper_bound) == (None, False)
    assert "nor the memory bandwidth" in speed.reason
    assert prefill_speed(spec_of(), Precision(), BARE, 100).tokens_per_s is None


def test_a_missing_kernel_falls_back() -> None:
    speed = decode_speed(spec_of(), Precision(linear=Grid(3, 32)), PROBED, context=100)
    assert speed.is_upper_bound
    assert "reference" in speed.reason


def test_norms_need_no_rate_of_their_own() -> None:
    rates = {"int8": PROBED.rates["int8"]}
    hardware = replace(PROBED, rates=rates)
    speed = decode_speed(spec_of(), Precision(linear=Grid(8), embedding=Grid(8)), hardware, context=1)
    assert not speed.is_upper_bound


def test_longer_contexts_and_more_users_are_slower() -> None:
    spec = spec_of()
    speeds = [
        decode_speed(spec, Precision(), PROBED, context, users).tokens_per_s or 0
        for context, users in ((1, 1), (1000, 1), (1000, 8))
    ]
    assert speeds == sorted(speeds, reverse=True)


def test_prefill() -> None:
    spec = spec_of()
    linear = sum(tensor.numel for tensor in spec.quantizable)
    speed = prefill_speed(spec, Precision(), PROBED, 1024)
    seconds = 1024 / PREFILL_CHUNK * 2 * 1e-4 + 2 * linear * 1024 / 100e9
    assert speed.tokens_per_s == pytest.approx(1024 / seconds)


def test_a_mixture_reads_the_experts_that_are_used() -> None:
    spec = spec_of(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    experts = sum(tensor.nbytes for tensor in spec.tensors if tensor.kind == "expert")
    everything = read_bytes(spec, Precision(), users=4)["bfloat16"]
    assert everything - read_bytes(spec, Precision(), users=1)["bfloat16"] == experts * 3 // 4
