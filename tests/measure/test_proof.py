"""Proof on save: an artifact that is not what was computed is found out, and one that is loads anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import save_architecture

from packlight import pipeline
from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.compress.registry import build
from packlight.errors import CheckpointError, ProofError
from packlight.measure import proof
from packlight.measure.proof import MAX_KL, PROOF_NAME, distance, read_proof, record
from packlight.runtime import packed
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.packed import PackedLinear
from packlight.runtime.sampling import Sampling
from packlight.runtime.tokenizer import load_tokenizer, prompt_ids

ALL_INT4: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "embeddings": 4}
LIMIT = MAX_KL["bfloat16"]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def artifact(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied tiny model in 4 bits with zero points, embeddings included: not proved yet."""
    return make_artifact(tiny_model_dir(tied=True), tmp_path_factory.mktemp("proof") / "out", **ALL_INT4)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole proofs without the seconds that two processes take: packlight's runtime answers for both."""

    def answer(arguments: list[str], asked: dict[str, Any]) -> dict[str, Any]:
        return {**proof._answer(**asked), "imported": False}

    monkeypatch.setattr(proof.child, "ask", answer)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE_NAME)
    change(tensors)
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


# --- the distance -----------------------------------------------------------------------------------------------


def recorded(directory: Path, logits: torch.Tensor) -> dict[str, Any]:
    record(directory, [1, 2, 3], logits, {})
    return read_proof(directory)


def asked_about(logits: torch.Tensor, made: dict[str, Any]) -> list[list[float]]:
    found: list[list[float]] = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(made["top_ids"])).tolist()
    return found


def test_the_distance_is_the_divergence_where_all_tokens_are_recorded(tmp_path: Path) -> None:
    logits, others = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)).double()
    made = recorded(tmp_path, logits)
    wanted = torch.nn.functional.kl_div(
        torch.log_softmax(others, -1), torch.log_softmax(logits, -1), log_target=True, reduction="batchmean"
    )
    # Log-probabilities are written with five decimals.
    assert distance(made, asked_about(others, made)) == pytest.approx(float(wanted), abs=1e-4)
    assert 0 <= distance(made, asked_about(logits, made)) < 1e-9


def test_the_distance_is_never_negative_and_never_more_than_the_divergence(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 1.0, 10.0):
        logits = torch.randn(30, 500, generator=generator) * 3
        others = logits + scale * torch.randn(30, 500, generator=generator)
        made = recorded(tmp_path, logits)
        assert len(made["top_ids"]) == proof.POSITIONS and len(made["top_ids"][0]) == proof.RECORDED
        p, q = (torch.log_softmax(x[-proof.POSITIONS :].double(), dim=-1) for x in (logits, others))
        divergence = float((p.exp() * (p - q)).sum(dim=-1).mean())
        assert 0 <= distance(made, asked_about(others[-proof.POSITIONS :], made)) <= divergence + 1e-4


def test_the_distance_of_nonsense_is_no_small_number(tmp_path: Path) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 3
    made = recorded(tmp_path, logits)
    assert distance(made, asked_about(logits.flip(1), made)) > 1
    assert not distance(made, asked_about(logits * float("nan"), made)) <= LIMIT


def test_a_record_asks_for_no_more_tokens_than_there_are(tmp_path: Path) -> None:
    made = recorded(tmp_path, torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    assert made["ids"] == [1, 2, 3]
    assert [sorted(ids) for ids in made["top_ids"]] == [[0, 1, 2, 3, 4]] * 2
    assert all(row == sorted(row, reverse=True) for row in made["top_log_probs"])


# --- damage, as packlight's runtime sees it ---------------------------------------------------------------------


def change_every(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        change_tensors(
            directory,
            lambda tensors: tensors.update(
                {name: change(tensor).contiguous() for name, tensor in tensors.items() if name.endswith(part)}
            ),
        )

    return apply


def swap_nibbles(words: torch.Tensor) -> torch.Tensor:
    data = words.view(torch.uint8)
    return ((data >> 4) | (data << 4)).view(torch.int32)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "the order of nibbles": change_every("weight_packed", swap_nibbles),
    "the highest bit of one code in eight": change_every("weight_packed", lambda words: words ^ 0x8),
    "the scales of other rows": change_every("weight_scale", lambda scale: scale.flip(0)),
    "zero points off by one": change_every("weight_zero_point", lambda words: words ^ 0x11111111),
    "a norm": change_every("model.norm.weight", lambda norm: norm * 1.25),
}


def test_untouched_it_is_the_model_that_was_computed(artifact: Path) -> None:
    assert proof_distance(artifact)[0] <= LIMIT / 10  # the limit leaves room, and little of it is used


@pytest.mark.usefixtures("in_process")
def test_a_proof_of_what_is_untouched_passes_in_process_too(artifact: Path) -> None:
    assert {row.name for row in pipeline.prove(artifact)} >= {"proof_runtime_kl", "proof_transformers_kl"}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_farther_away_than_rounding(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    with pytest.raises(ProofError, match=r"is not the model that was computed: they differ by .* nats"):
        pipeline.prove(copy)


def flip_one_nibble(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight_packed"][3, 5] ^= 0x8


def swap_two_scales(tensors: dict[str, torch.Tensor]) -> None:
    scale = tensors[f"{DOWN}.weight_scale"]
    scale[[3, 4]] = scale[[4, 3]]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("damage", [flip_one_nibble, swap_two_scales])
def test_the_smallest_damage_is_found(copy: Path, damage: Callable[[dict[str, torch.Tensor]], None]) -> None:
    change_tensors(copy, damage)
    with pytest.raises(ProofError):
        pipeline.prove(copy)


def symmetric(config: dict[str, Any]) -> None:
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["symmetric"] = True


@pytest.mark.usefixtures("in_process")
def test_a_changed_symmetric_flag_is_farther_away_than_rounding(copy: Path) -> None:
    change_config(copy, symmetric)
    with pytest.raises(ProofError, match="is not the model that was computed"):
        pipeline.prove(copy)


def test_a_changed_group_size_does_not_fit(copy: Path) -> None:
    def halve(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16

    change_config(copy, halve)
    with pytest.raises(CheckpointError, match="its grid implies"):
        proof_distance(copy)


def test_a_truncated_file_is_refused_when_it_is_opened(copy: Path) -> None:
    weights = copy / SINGLE_NAME
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1)
    with pytest.raises(CheckpointError):
        pipeline.prove(copy)


def test_a_lost_proof(copy: Path) -> None:
    (copy / PROOF_NAME).unlink()
    with pytest.raises(ProofError, match=r"holds no proof.json: only artifacts that packlight saved can be proved"):
        pipeline.prove(copy)


def test_other_bytes_than_were_saved(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ProofError, match=r"are \d+ bytes and were saved as \d+"):
        pipeline.prove(copy)


# --- whole proofs, in fresh processes ---------------------------------------------------------------------------


def test_an_untouched_artifact_passes(artifact: Path) -> None:
    rows = {row.name: row for row in pipeline.prove(artifact)}
    assert rows["disk_bytes"].value == (artifact / SINGLE_NAME).stat().st_size
    for name in ("proof_runtime_kl", "proof_transformers_kl"):
        value = rows[name].value
        assert isinstance(value, float) and 0 <= value <= LIMIT
    assert rows["packed_modules"].value == 16  # 14 linears, the embedding and the tied head
    assert rows["packed_modules"].note == "kernels: int4, reference"
    assert rows["greedy_agreement"].n == proof.GREEDY_TOKENS


def test_a_damaged_artifact_fails(copy: Path) -> None:
    DAMAGE["the order of nibbles"](copy)
    wanted = r"as packlight's runtime loads it is not the model that was computed: .* nats"
    with pytest.raises(ProofError, match=wanted):
        pipeline.prove(copy)


def test_an_artifact_that_does_not_load_fails(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({f"{DOWN}.weight_scale": torch.ones(2, 2)}))
    with pytest.raises(ProofError, match=r"packlight's runtime does not load .*down_proj.weight_.* has shape"):
        list(proof.prove(copy))


def test_stock_transformers_is_held_to_the_same(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What packlight's runtime reads by itself may still be missing for others: the flag that makes them decode."""
    recorded = read_proof(copy)
    ours = {"log_probs": recorded["top_log_probs"], "digests": recorded["digests"], "tokens": [0] * 16}
    ours |= {"packed_modules": 16, "kernels": "int4"}
    ask = proof.child.ask
    monkeypatch.setattr(
        proof.child, "ask", lambda arguments, asked: ours if "-m" in arguments else ask(arguments, asked)
    )
    change_config(copy, lambda config: config["quantization_config"].pop("dequantize"))
    with pytest.raises(ProofError, match="stock transformers"):
        list(proof.prove(copy))


def test_packlights_own_layout_is_proved_with_packlight_imported(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_artifact(tiny_model_dir(tied=True), tmp_path / "out", **{**ALL_INT4, "bits": 3})
    rows = {row.name: row for row in pipeline.prove(directory)}
    row = rows["proof_transformers_kl"]
    assert isinstance(row.value, float) and 0 <= row.value <= LIMIT
    assert row.note == f"limit {LIMIT:g}; with packlight imported"
    assert rows["greedy_agreement"].value == 1  # the same modules run the same kernels
    assert "transformers with packlight imported" in str(rows["greedy_agreement"].note)


@pytest.mark.usefixtures("in_process")
def test_what_transformers_cannot_load_is_a_row_without_a_value(artifact: Path) -> None:
    rows = {row.name: row for row in proof.prove(artifact, is_portable=False)}
    assert rows["proof_transformers_kl"].value is None
    assert rows["proof_transformers_kl"].note == "the installed transformers cannot load this"
    assert "greedy_agreement" not in rows


def test_stock_transformers_alone_may_not_import_packlight(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof.child, "ask", lambda arguments, asked: {**proof._answer(**asked), "imported": True})
    with pytest.raises(ProofError, match="was to use stock transformers alone imported packlight"):
        list(proof.prove(artifact))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_other_architectures_are_proved(tmp_path: Path, name: str) -> None:
    save_architecture(name, tmp_path / name)
    made = pipeline.quantize(
        str(tmp_path / name), tmp_path / "out", build({"method": "rtn", **ALL_INT4}), pipeline.Silent()
    )
    found = {row.name: row.value for row in made.rows}
    assert found["proof_runtime_kl"] <= LIMIT and found["proof_transformers_kl"] <= LIMIT  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_int_quantized_layout_is_proved(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, symmetric: bool
) -> None:
    step = build({"method": "rtn", "bits": 8, "group_size": None, "symmetric": symmetric, "embeddings": 8})
    made = pipeline.quantize(str(tiny_model_dir(tied=True)), tmp_path / "out", step, pipeline.Silent(), "int-quantized")
    found = {row.name: row.value for row in made.rows}
    assert found["proof_runtime_kl"] <= LIMIT and found["proof_transformers_kl"] <= LIMIT  # type: ignore[operator]


# --- other programs ---------------------------------------------------------------------------------------------

STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                      eos_token_id=None, pad_token_id=0)
assert not any(name.split(".")[0] == "packlight" for name in sys.modules)
print(json.dumps(made[0, ids.shape[1]:].tolist()))
"""


def by_stock_transformers(directory: Path, ids: list[int]) -> list[int]:
    """24 greedy tokens in a process that never imports packlight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STOCK, str(directory), json.dumps(ids)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def by_reference(directory: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """24 greedy tokens of packlight's runtime without fast kernels, which round as dense matrices do."""
    monkeypatch.setattr(packed, "choose_kernel", lambda weight: "reference")
    model = load_model(open_checkpoint(directory))
    kernels = {module.kernel for module in model.modules() if isinstance(module, PackedLinear)}
    assert kernels == {"reference"}
    return list(complete(model, ids, Sampling(max_tokens=24)))


def test_the_tiny_model_says_the_same_elsewhere(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(b"Well, Prince")
    found = by_stock_transformers(artifact, ids)
    assert found == by_reference(artifact, ids, monkeypatch)
    assert len(found) == 24


@pytest.mark.demo
def test_the_demo_says_the_same_elsewhere(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is slow on a real model, so it judges all the tokens of the other program in one pass.

    A token is best up to one rounding of a bfloat16 logit: prefill and decoding sum in another order.
    """
    directory = make_artifact(demo_dir, tmp_path / "out", **ALL_INT4)
    tokenizer = load_tokenizer(open_checkpoint(directory))
    ids = prompt_ids(tokenizer, "What is the capital of France?")
    found = by_stock_transformers(directory, ids)
    assert len(found) == 24 and "Paris" in tokenizer.decode(found)
    monkeypatch.setattr(packed, "choose_kernel", lambda weight: "reference")
    with torch.inference_mode():
        logits = (
            load_model(open_checkpoint(directory))(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].float()
        )
    logits = logits.float()
    chosen = logits.gather(1, torch.tensor(found).unsqueeze(1))[:, 0]
    best = logits.amax(dim=-1)
    assert bool((best - chosen <= torch.finfo(torch.bfloat16).eps * best.abs()).all())


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_generates_the_same_elsewhere(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_artifact(demo_dir, tmp_path / "out", **ALL_INT4)
    ids = prompt_ids(load_tokenizer(open_checkpoint(directory)), "What is the capital of France?")
    assert by_stock_transformers(directory, ids) == by_reference(directory, ids, monkeypatch)
