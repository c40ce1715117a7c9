"""Bytes of weights, cache, activations and the job, against published and hand-made numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from packlight.checkpoint.config import spec_from_config
from packlight.plan.kernels import int4_group, kernel_of, resident_tensor_bytes
from packlight.plan.memory import (
    JobRates,
    activation_bytes,
    bits_per_weight,
    disk_bytes,
    job_plan,
    kv_cache_bytes,
    kv_elements_per_token,
    logits_bytes,
    resident_bytes,
    runtime_bytes,
)
from packlight.spec import Budget, Grid, ModelSpec, Precision, TensorSpec

SMOLLM2: dict[str, Any] = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"},
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def smollm2() -> ModelSpec:
    return spec_from_config(SMOLLM2, "SmolLM2-135M")


def deepseek_v2(**changes: Any) -> ModelSpec:
    config = {
        **{"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "dtype": "bfloat16"},
        **{"vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 60},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536},
        **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 160},
        **{"n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1536, "first_k_dense_replace": 1},
        **changes,
    }
    return spec_from_config(config, "DeepSeek-V2")


def test_kv_cache_of_published_models(smollm2: ModelSpec) -> None:
    assert kv_cache_bytes(smollm2, context=1) == 23_040  # GQA: 30 layers x 2 x 3 heads x 64 x 2 bytes
    assert kv_cache_bytes(smollm2, context=1024, users=4, dtype="float32") == 23_040 * 2 * 1024 * 4
    assert kv_elements_per_token(deepseek_v2()) == 34_560  # MLA: (512 + 64) x 60, arXiv 2405.04434 table 1
    lite = deepseek_v2(num_hidden_layers=27, hidden_size=2048, num_attention_heads=16, q_lora_rank=None)
    assert kv_elements_per_token(lite) == 15_552


def test_kv_cache_of_multi_head_attention(smollm2: ModelSpec) -> None:
    mha = replace(smollm2, num_layers=27, num_heads=16, num_kv_heads=16, head_dim=128)
    assert kv_elements_per_token(mha) == 110_592


def test_a_sliding_window_caps_its_layers_only_when_asked(smollm2: ModelSpec) -> None:
    sliding = replace(smollm2, sliding_window=100, num_sliding_layers=20)
    full = kv_cache_bytes(sliding, context=1000)
    assert full == kv_cache_bytes(smollm2, context=1000)
    assert kv_cache_bytes(sliding, context=1000, is_windowed=True) == full * (20 * 100 + 10 * 1000) // (30 * 1000)
    assert kv_cache_bytes(sliding, context=50, is_windowed=True) == kv_cache_bytes(smollm2, context=50)


def test_dense_weights_are_parameters_times_size(smollm2: ModelSpec) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        precision = Precision(dtype)
        assert disk_bytes(smollm2, precision).total == resident_bytes(smollm2, precision) == 134_515_008 * size
        assert bits_per_weight(smollm2, precision) == 8 * size


def test_packed_weights_by_hand(smollm2: ModelSpec) -> None:
    disk = disk_bytes(smollm2, Precision(linear=Grid(4, 32)))
    linear = sum(tensor.numel for tensor in smollm2.quantizable)
    assert linear == 106_168_320
    assert (disk.codes, disk.scales, disk.zero_points) == (linear // 2, linear // 32 * 2, 0)
    assert disk.shapes == 30 * 7 * 16
    assert disk.left_alone == (134_515_008 - linear) * 2
    asymmetric = disk_bytes(smollm2, Precision(linear=Grid(4, 32, symmetric=False)))
    assert asymmetric.zero_points == linear // 32 // 2
    assert asymmetric.total == disk.total + asymmetric.zero_points


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_more_bits_are_more_bytes(smollm2: ModelSpec, group: int | None, is_symmetric: bool) -> None:
    totals = [disk_bytes(smollm2, Precision(linear=Grid(bits, group, is_symmetric))).total for bits in range(2, 9)]
    assert totals == sorted(set(totals))
    assert totals[-1] < disk_bytes(smollm2, Precision()).total


def test_smaller_groups_are_more_bytes(smollm2: ModelSpec) -> None:
    totals = [disk_bytes(smollm2, Precision(linear=Grid(4, group))).total for group in (None, 64, 32)]
    assert totals == sorted(set(totals))


@pytest.mark.parametrize(
    ("grid", "rows", "cols", "kernel"),
    [
        (Grid(8), 5, 7, "int8"),
        (Grid(8, symmetric=False), 5, 7, "int8"),
        (Grid(8, 32), 64, 64, "reference"),
        (Grid(4, 32), 64, 64, "int4"),
        (Grid(4, 16), 64, 64, "reference"),
        (Grid(4, 32), 63, 64, "reference"),
        (Grid(4), 64, 576, "int4"),
        (Grid(4), 64, 40, "reference"),
        (Grid(3, 32), 64, 64, "reference"),
    ],
)
def test_kernel_of(grid: Grid, rows: int, cols: int, kernel: str) -> None:
    assert kernel_of(grid, rows, cols) == kernel


def test_one_scale_per_row_takes_the_largest_group_of_the_kernel() -> None:
    assert [int4_group(Grid(4), cols) for cols in (512, 384, 576, 96, 40)] == [256, 128, 64, 32, None]


def _held(grid: Grid, kind: Any, is_tied: bool = False, dtype: str = "bfloat16") -> int:
    tensor = TensorSpec("w.weight", (128, 96), "float32", kind)
    return resident_tensor_bytes(tensor, Precision(dtype, grid, grid), is_tied)


def test_what_each_kernel_holds() -> None:
    codes = 128 * 96
    assert _held(Grid(4, 32), "linear") == codes // 2 + 128 * 3 * 4
    assert _held(Grid(4), "linear") == codes // 2 + 128 * 3 * 4  # one scale a row, repeated over groups of 32
    assert _held(Grid(8), "linear") == codes + 128 * 2
    assert _held(Grid(8, symmetric=False), "linear") == codes + 128 * 4
    assert _held(Grid(8, 32), "linear") == codes + 128 * 3 * 2  # the reference keeps the file's layout
    assert _held(Grid(4, 32), "linear", dtype="float32") == codes // 2 + 128 * 3 * 4  # no kernel in float32


def test_a_tied_embedding_is_held_for_lookup_and_head() -> None:
    codes = 128 * 96
    lookup, head = codes // 2 + 128 * 3 * 2, codes // 2 + 128 * 3 * 4
    assert _held(Grid(4, 32), "embedding", is_tied=True) == lookup + head
    assert _held(Grid(4, 32), "embedding") == lookup
    assert _held(Grid(4, 32), "head") == head
    assert _held(Grid(8), "embedding", is_tied=True) == codes + 128 * 2  # shared codes


def test_activations_grow_with_tokens_and_not_with_their_square(smollm2: ModelSpec) -> None:
    one, two = activation_bytes(smollm2, 100), activation_bytes(smollm2, 200)
    assert (two.attention, two.mlp) == (2 * one.attention, 2 * one.mlp)
    assert one.attention == 100 * 2 * (2 * 576 + 576 + 2 * 192 + 576)
    assert one.mlp == 100 * 2 * (2 * 576 + 3 * 1536)
    assert one.total == max(one.attention, one.mlp, one.logits)
    assert logits_bytes(smollm2, 512) == 512 * 49152 * 4


def test_the_runtime_plan_adds_up_and_grows_with_the_budget(smollm2: ModelSpec) -> None:
    small = runtime_bytes(smollm2, Precision(), Budget(context=256))
    large = runtime_bytes(smollm2, Precision(), Budget(context=256, users=4))
    assert small.total == small.weights + small.kv_cache + small.activations + small.overhead
    assert small.weights == large.weights
    assert large.kv_cache == 4 * small.kv_cache
    assert small.total < large.total


def test_the_job_needs_its_largest_block_and_not_the_model(smollm2: ModelSpec) -> None:
    precision = Precision(linear=Grid(4, 32))
    plan = job_plan(smollm2, precision)
    block = sum(tensor.nbytes for tensor in smollm2.tensors if ".layers.0." in tensor.name)
    outside = 49152 * 576 + 576  # embedding and final norm: more than any layer
    assert plan.peak_bytes == outside * (2 + 2)  # as stored in bfloat16, and as written
    assert plan.peak_bytes < 134_515_008 * 2
    with_embedding = job_plan(smollm2, Precision(linear=Grid(4, 32), embedding=Grid(4, 32)))
    assert with_embedding.peak_bytes == outside * 2 + 49152 * 576 * (1 + 2) + 576 * 2 > block  # codes, and their values
    slow = JobRates(quantize_weights_per_s=1e6)
    assert job_plan(smollm2, precision, rates=slow).minutes > plan.minutes > 0
