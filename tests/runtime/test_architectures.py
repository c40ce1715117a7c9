"""Architectures that differ from Llama: loaded, generated from, quantized and cast as transformers would have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import ALL, CONFIGS, CONV1D, RENAMED
from transformers import AutoModelForCausalLM

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError
from packlight.measure.proof import MAX_KL
from packlight.pipeline import Silent, Yardstick, evaluate
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.packed import PackedEmbedding, PackedLinear
from packlight.runtime.sampling import Sampling

ArchitectureDir = Callable[[str], Path]
PROMPT = torch.randint(1, 256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
NEW_TOKENS = 24


@pytest.mark.parametrize("name", ALL)
def test_logits_and_greedy_tokens_are_those_of_transformers(architecture_dir: ArchitectureDir, name: str) -> None:
    directory = architecture_dir(name)
    ours, theirs = load_model(open_checkpoint(directory)), AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert list(complete(ours, PROMPT, Sampling(max_tokens=NEW_TOKENS))) == made[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "symmetric": False},
        {"bits": 8, "group_size": None, "embeddings": 8},
        {"bits": 4, "group_size": 32, "embeddings": 4, "dtype": "float32"},
    ],
    ids=["int4-asym", "int8-all", "int4-all-float32"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_loads_as_what_was_computed(
    architecture_dir: ArchitectureDir, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """The recorded logits come from a walk block by block, the others from the whole model over packed weights."""
    found, model = proof_distance(make_artifact(architecture_dir(name), tmp_path / "out", **options))
    assert found <= MAX_KL[options.get("dtype", "bfloat16")]
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) is ("embeddings" in options)


@pytest.mark.parametrize("name", [*CONFIGS, *CONV1D])
def test_a_cast_model_loads_as_what_was_computed(architecture_dir: ArchitectureDir, tmp_path: Path, name: str) -> None:
    directory = make_artifact(architecture_dir(name), tmp_path / "out", method="cast", dtype="float16")
    found, model = proof_distance(directory)
    assert found <= MAX_KL["float16"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", CONV1D)
def test_conv1d_matrices_are_refused_in_one_sentence(
    architecture_dir: ArchitectureDir, tmp_path: Path, name: str
) -> None:
    with pytest.raises(CheckpointError, match=r"c_attn.weight belongs to a Conv1D, .* cannot be quantized yet$"):
        make_artifact(architecture_dir(name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"bits": 8, "embeddings": 8}, {"method": "cast"}], ids=["rtn", "cast"])
@pytest.mark.parametrize("name", RENAMED)
def test_translated_names_are_refused_in_one_sentence(
    architecture_dir: ArchitectureDir, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"under other names .* such as embed_out.weight: .* this layout yet$"):
        make_artifact(architecture_dir(name), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*CONV1D, *RENAMED])
def test_what_cannot_be_quantized_can_be_evaluated(
    architecture_dir: ArchitectureDir, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("packlight.pipeline.footprint", lambda *arguments, **options: NoFootprint())
    made = evaluate([str(architecture_dir(name))] * 2, Yardstick(window=32, tokens=64), Silent())
    values = [{row.name: row.value for row in rows} for rows in made.rows]
    assert values[0]["perplexity"] == values[1]["perplexity"]
    assert values[1]["kl"] == 0 and values[1]["top1"] == 1


class NoFootprint:
    """Stands for the child process that measures speed and memory."""

    def rows(self, subject: str) -> list[Any]:
        return []
