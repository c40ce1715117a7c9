"""Rotation changes the weights and not the function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import change_config, save_llama
from tests.contracts.artifacts import make_artifact

from packlight.checkpoint.open import open_checkpoint
from packlight.compress import run as compress
from packlight.compress.convert.rotate import Rotate
from packlight.errors import UsageError
from packlight.runtime.load import load_model

IDS = torch.tensor([list(range(1, 60))])


def logits_of(directory: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_model(open_checkpoint(directory))(IDS).logits
        return logits


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "attention_bias": True},
        {"tie_word_embeddings": False, "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_the_logits_stay(changes: dict[str, Any], tmp_path: Path) -> None:
    original = save_llama(tmp_path / "model", **changes)
    spoil_norms(original)
    out = make_artifact(original, tmp_path / "out", method="rotate")
    before, after = logits_of(original), logits_of(out)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
    name = "model.layers.0.self_attn.v_proj.weight"
    changed, kept = load_model(open_checkpoint(out)), load_model(open_checkpoint(original))
    assert not torch.allclose(changed.get_parameter(name), kept.get_parameter(name), atol=1e-3)
    is_turned = not changes["tie_word_embeddings"]
    embedding = "model.embed_tokens.weight"
    assert torch.equal(changed.get_parameter(embedding), kept.get_parameter(embedding)) is not is_turned


def spoil_norms(directory: Path) -> None:
    """Gains and biases that are not all one and zero, so that folding them matters."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(3)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_outliers_are_spread(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = save_llama(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:, 5] *= 30
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    rows = compress.run(Rotate(), open_checkpoint(original), tmp_path / "work", "packlight", [1, 2, 3], None, _result())
    row = next(row for row in rows if row.subject == "model.layers.0")
    assert isinstance(row.value, float) and row.predicted is not None
    assert row.value < 0.5 * row.predicted


def _result() -> Any:
    from packlight.compress.walk import WalkResult

    return WalkResult()


def test_a_seed_decides_and_another_gives_other_weights_of_the_same_function(tmp_path: Path) -> None:
    original = save_llama(tmp_path / "model", tie_word_embeddings=False)
    outs = [make_artifact(original, tmp_path / str(seed), method="rotate", seed=seed) for seed in (1, 2)]
    again = make_artifact(original, tmp_path / "again", method="rotate", seed=1)
    files = [(out / "model.safetensors").read_bytes() for out in (*outs, again)]
    assert files[0] == files[2] != files[1]
    torch.testing.assert_close(logits_of(outs[0]), logits_of(outs[1]), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_rotated_is_refused(tmp_path: Path) -> None:
    odd = save_llama(tmp_path / "odd", hidden_size=60, num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(UsageError, match="no Hadamard matrix"):
        make_artifact(odd, tmp_path / "out", method="rotate")
    other = change_config(save_llama(tmp_path / "other"), model_type="gemma", architectures=["GemmaForCausalLM"])
    with pytest.raises(UsageError, match="rotate knows the families llama"):
        make_artifact(other, tmp_path / "out", method="rotate")
    with pytest.raises(UsageError, match="a seed is a number"):
        Rotate(seed=-1)
