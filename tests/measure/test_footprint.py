"""What a model costs while it runs, measured in a child process on a model whose cost is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.contracts.artifacts import make_artifact
from transformers import LlamaConfig, LlamaForCausalLM

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import MeasurementError
from packlight.measure.footprint import DECODED, REPEATS, footprint, random_layer_model, split_context
from packlight.runtime.packed import PackedLinear


def test_a_model_of_known_size(tmp_path: Path) -> None:
    """64 MB of embedding and head, nearly nothing else: the peak holds them and not twice as much."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights > 64e6
    found = footprint(tmp_path, context=64, threads=2)
    assert weights < found.peak_bytes < 1.5 * weights
    assert found.base_bytes > 50e6  # interpreter and torch
    assert (found.context, found.users, found.repeats) == (64, 1, REPEATS)
    assert 0 < found.load_s < 60
    assert found.prefill_tps > found.decode_tps > 0  # a prompt is read many tokens at a time
    assert found.prefill_spread >= 0 and found.decode_spread >= 0
    rows = {row.name: row for row in found.rows("packed")}
    assert set(rows) == {"peak_bytes", "base_bytes", "load_s", "prefill_tps", "decode_tps"}
    assert rows["peak_bytes"].value == found.peak_bytes and rows["decode_tps"].spread == found.decode_spread
    assert {row.subject for row in rows.values()} == {"packed"}


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"ended with code 1: .*CheckpointError: .* does not exist"):
        footprint(tmp_path / "absent", context=16)


@pytest.mark.parametrize("context", [2, 3, 40, 4 * DECODED, 1024])
def test_prompt_and_answer_fill_the_context(context: int) -> None:
    prompt, decoded = split_context(context)
    assert prompt + decoded == context
    assert prompt >= 1 and 1 <= decoded <= DECODED


def test_the_warm_up_runs_the_kernels_of_the_checkpoint(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    dense = random_layer_model(open_checkpoint(tiny_model_dir(tied=True)))
    assert not any(isinstance(module, PackedLinear) for module in dense.modules())
    packed = random_layer_model(open_checkpoint(make_artifact(tiny_model_dir(tied=True), tmp_path / "out")))
    kernels = [module.kernel for module in packed.modules() if isinstance(module, PackedLinear)]
    assert sorted(kernels) == ["int4"] * 5 + ["reference"] * 2  # of one layer; keys and values have 32 rows
    with torch.inference_mode():
        assert torch.isfinite(packed(torch.zeros(1, 4, dtype=torch.int64)).logits).all()
