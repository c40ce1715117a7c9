"""Pruning as steps: exact zeros, planned bytes that are the written ones, a global count that is a sort's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import change_weight, save_llama
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import save_architecture
from transformers import AutoModelForCausalLM

from packlight.checkpoint.masked import masked_names, read_masked
from packlight.checkpoint.open import open_checkpoint, read_spec
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.checkpoint.tensors import read_tensor
from packlight.compress.prune.magnitude import Magnitude
from packlight.compress.prune.options import PruneOptions
from packlight.compress.prune.share import counted, needs_counts
from packlight.compress.prune.sparsegpt import SparseGpt
from packlight.compress.prune.wanda import Wanda
from packlight.compress.registry import build
from packlight.errors import CheckpointError, UsageError
from packlight.measure.size import disk_size
from packlight.plan.layout import artifact_bytes
from packlight.plan.memory import disk_bytes
from packlight.runtime.load import load_model
from packlight.spec import Precision

METHODS = ("magnitude", "wanda", "sparsegpt")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def tiny(tiny_model_dir: Any) -> Path:
    directory: Path = tiny_model_dir(tied=False)
    return directory


def zeros_of(directory: Path) -> dict[str, torch.Tensor]:
    """Where the zeros are, of every matrix inside the blocks of a loaded artifact."""
    model = load_model(open_checkpoint(directory))
    spec = read_spec(directory)
    return {t.name: model.get_parameter(t.name) == 0 for t in spec.tensors if t.kind == "linear"}


@pytest.mark.parametrize("storage", ["dense", "bitmask"])
@pytest.mark.parametrize("scope", ["layer", "row", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_the_zeros_of_an_artifact_are_those_that_were_asked_for(
    method: str, scope: str, storage: str, tiny: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "scope": scope, "storage": storage, "dtype": "float32"}
    out = make_artifact(tiny, tmp_path / "out", **options)
    step = build(options)
    assert isinstance(step, PruneOptions)
    found, spec = zeros_of(out), read_spec(out)
    for tensor in spec.tensors:
        if tensor.name not in found:
            continue
        zeros = found[tensor.name]
        assert int(zeros.sum()) == step.zeros.num_zeros(tensor) == tensor.numel // 2
        if scope == "row":
            assert bool((zeros.sum(dim=1) == zeros.shape[1] // 2).all())
        if scope == "2:4":
            assert bool((zeros.reshape(-1, 4).sum(dim=1) == 2).all())
    original = load_file(tiny / SINGLE_NAME)
    stored = open_checkpoint(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(read_tensor(stored.index[name]), original[name])


@pytest.mark.parametrize("scope", ["layer", "row", "1:4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planned_bytes_are_written_bytes(dtype: str, scope: str, tiny: Path, tmp_path: Path) -> None:
    share = None if ":" in scope else 0.37
    options = {"sparsity": share, "scope": scope, "storage": "bitmask", "dtype": dtype}
    out = make_artifact(tiny, tmp_path / "out", method="magnitude", **options)
    step, spec = Magnitude(**options), read_spec(tiny)  # type: ignore[arg-type]
    assert artifact_bytes(spec, step.precision) == disk_size(open_checkpoint(out))
    opened = read_spec(out)
    assert opened.stored == step.precision
    assert artifact_bytes(opened, step.precision) == disk_size(open_checkpoint(out))


@pytest.mark.parametrize(("dtype", "breaks_even"), [("float32", 1 / 32), ("bfloat16", 1 / 16)])
def test_a_bitmask_saves_from_one_bit_a_weight_on(dtype: str, breaks_even: float, tiny: Path) -> None:
    spec = read_spec(tiny)
    dense = disk_bytes(spec, Precision(dtype)).total
    shapes = 16 * len(spec.quantizable)
    for share, sign in ((breaks_even - 0.01, 1), (breaks_even + 0.01, -1)):
        stored = disk_bytes(spec, Magnitude(sparsity=share, storage="bitmask", dtype=dtype).precision)
        assert stored.shapes == shapes
        assert (stored.total - shapes - dense) * sign > 0


@pytest.mark.parametrize("method", METHODS)
def test_no_sparsity_is_no_change(method: str, tiny: Path, tmp_path: Path) -> None:
    out = make_artifact(tiny, tmp_path / "out", method=method, sparsity=0, dtype="float32")
    original, made = load_file(tiny / SINGLE_NAME), load_file(out / SINGLE_NAME)
    assert original.keys() == made.keys()
    assert all(torch.equal(original[name], made[name]) for name in original)


def test_wanda_differs_from_magnitude_by_what_the_inputs_say(tiny: Path, tmp_path: Path) -> None:
    """A channel made a thousand times larger by the norm before it keeps its weights."""
    loud = tmp_path / "loud"
    shutil.copytree(tiny, loud)
    change_weight(loud, "model.layers.0.post_attention_layernorm.weight", 1000.0)  # of channel 3
    found = {
        method: zeros_of(make_artifact(loud, tmp_path / method, method=method, scope="row", dtype="float32"))
        for method in METHODS
    }
    assert not bool(found["wanda"][f"{UP}.weight"][:, 3].any())
    assert not bool(found["sparsegpt"][f"{UP}.weight"][:, 3].any())
    assert bool(found["magnitude"][f"{UP}.weight"][:, 3].any())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_global_count_is_that_of_a_sort(share: float, dtype: str, tmp_path: Path) -> None:
    """Also with ties, of which bfloat16 has many."""
    directory = save_llama(tmp_path / "model", dtype)
    checkpoint = open_checkpoint(directory)
    ticks: list[None] = []
    step = counted(Magnitude(sparsity=share, scope="global"), checkpoint, lambda: ticks.append(None))
    assert (isinstance(step, Magnitude) and not needs_counts(step)) or share == 0
    weights = {t.name: read_tensor(checkpoint.index[t.name]).float() for t in checkpoint.spec.quantizable}
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    names = [name for name, weight in weights.items() for _ in range(weight.numel())]
    wanted = dict.fromkeys(weights, 0)
    for place in flat.argsort(stable=True)[: int(share * len(flat) + 0.5)].tolist():
        wanted[names[place]] += 1
    assert dict(step.counts) == wanted
    assert len(ticks) == 2


def test_a_global_artifact_has_one_threshold(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    asked = Magnitude(sparsity=0.4, scope="global", storage="bitmask", dtype="float32")
    assert needs_counts(asked)
    with pytest.raises(UsageError, match="of a global share has not been counted"):
        asked.plan(checkpoint.spec)
    step = counted(asked, checkpoint, lambda: None)
    assert build(json.loads(json.dumps(step.to_dict()))) == step
    out = make_artifact(tiny, tmp_path / "out", **step.to_dict())
    original, spec = load_file(tiny / SINGLE_NAME), read_spec(out)
    zeros = zeros_of(out)
    gone = torch.cat([original[name][mask].abs() for name, mask in zeros.items()])
    stay = torch.cat([original[name][~mask].abs() for name, mask in zeros.items()])
    assert len(gone) == int(0.4 * (len(gone) + len(stay)) + 0.5) and gone.max() < stay.min()
    assert len({float(mask.float().mean()) for mask in zeros.values()}) > 1
    assert artifact_bytes(spec, step.precision) == disk_size(open_checkpoint(out))


def test_zeros_of_the_original_count(tiny: Path, tmp_path: Path) -> None:
    """A matrix with more zeros than asked for keeps them, and takes the bytes that were planned."""
    empty = tmp_path / "empty"
    shutil.copytree(tiny, empty)
    tensors = load_file(empty / SINGLE_NAME)
    tensors[f"{UP}.weight"][:100] = 0
    save_file(tensors, empty / SINGLE_NAME, {"format": "pt"})
    step = SparseGpt(sparsity=0.25, storage="bitmask", dtype="float32")
    out = make_artifact(empty, tmp_path / "out", **step.to_dict())
    checkpoint = open_checkpoint(out)
    assert int((read_masked(checkpoint, UP) == 0).sum()) == 100 * 64
    row = list(step.measure(read_spec(empty), checkpoint))[-1]
    assert row.name == "sparsity" and isinstance(row.value, float) and row.predicted is not None
    assert row.predicted == pytest.approx(0.25) and row.value > row.predicted
    assert artifact_bytes(read_spec(empty), step.precision) == disk_size(checkpoint)
    assert proof_distance(out)[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_bitmask_in_transformers_is_a_plain_model(method: str, tmp_path: Path) -> None:
    """With biases, which lie in the modules that are filled later; it can be saved dense and is the same."""
    save_architecture("qwen2", original := tmp_path / "original")
    out = make_artifact(original, tmp_path / "out", method=method, storage="bitmask", dtype="float32")
    dense = make_artifact(original, tmp_path / "dense", method=method, dtype="float32")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(load_model(open_checkpoint(out))(ids).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").spec.stored is None
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, wanted)


def damage(directory: Path, name: str, change: Any) -> None:
    tensors = load_file(directory / SINGLE_NAME)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("weight_values", lambda values: values[1:].clone(), r"keeps 4096 weights and 4095 are stored"),
        ("weight_values", lambda values: None, r"weight_values is missing"),
        ("weight_mask", lambda mask: mask[1:].clone(), r"weight_mask has shape \(127, 8\)"),
        ("weight_mask", torch.zeros_like, r"keeps 0 weights and 4096 are stored"),
        ("weight_shape", lambda shape: None, r"without a weight_shape"),
        ("weight_shape", lambda shape: shape.flip(0), r"shape"),
    ],
)
def test_damage_is_named(part: str, change: Any, says: str, tiny: Path, tmp_path: Path) -> None:
    out = make_artifact(tiny, tmp_path / "out", method="magnitude", storage="bitmask")
    assert UP in masked_names(open_checkpoint(out).index)
    damage(out, f"{UP}.{part}", change)
    with pytest.raises(CheckpointError, match=says):
        load_model(open_checkpoint(out))


@pytest.mark.parametrize(("field", "value"), [("share", 2), ("scope", "rows"), ("zeros", [1]), ("share", None)])
def test_a_damaged_config_is_named(field: str, value: Any, tiny: Path, tmp_path: Path) -> None:
    out = make_artifact(tiny, tmp_path / "out", method="magnitude", storage="bitmask")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"][field] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_checkpoint(out)


def test_a_bitmask_is_no_start_for_another_method(tiny: Path, tmp_path: Path) -> None:
    out = make_artifact(tiny, tmp_path / "out", method="magnitude", storage="bitmask")
    with pytest.raises(UsageError, match=r"stored without its zeros .*: prune with --storage dense"):
        make_artifact(out, tmp_path / "again", method="rtn")
    dense = make_artifact(tiny, tmp_path / "dense", method="magnitude")
    make_artifact(dense, tmp_path / "both", method="rtn")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Magnitude(sparsity=1), "from 0 to below 1, not 1"),
        (lambda: Wanda(scope="global"), "wanda counts zeros by layer, row or N:M, not global"),
        (lambda: SparseGpt(scope="global"), "sparsegpt counts zeros by layer, row or N:M, not global"),
        (lambda: Magnitude(storage="zip"), "storage is dense or bitmask"),  # type: ignore[arg-type]
        (lambda: Magnitude(counts=(("x", 1),)), "for the scope global, not for layer"),
        (lambda: Magnitude(scope="global", counts=("x",)), "pairs of a tensor's name and its zeros"),  # type: ignore
        (lambda: SparseGpt(damping=0), "damping is above 0"),
        (lambda: SparseGpt(block_size=0), "at least one column"),
    ],
)
def test_values_outside_their_range_are_refused(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_counts_that_do_not_fit_the_model_are_refused(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    step = counted(Magnitude(scope="global"), checkpoint, lambda: None)
    assert isinstance(step, Magnitude)
    (first, _), *rest = step.counts
    with pytest.raises(UsageError, match="has no such matrix"):
        replace(step, counts=(*step.counts, ("nowhere.weight", 1))).plan(checkpoint.spec)
    with pytest.raises(UsageError, match="cannot take the zeros"):
        replace(step, counts=((first, 10**9), *rest)).plan(checkpoint.spec)


def test_groups_that_divide_no_row_are_refused_before_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2:5 does not divide a row of 128"):
        make_artifact(tiny, tmp_path / "a" / "out", method="magnitude", scope="2:5")
    assert not (tmp_path / "a").exists()


def test_matrices_that_are_not_linears_are_refused(tmp_path: Path) -> None:
    save_architecture("gpt2", original := tmp_path / "original")
    with pytest.raises(CheckpointError, match="belongs to a Conv1D"):
        make_artifact(original, tmp_path / "out", method="magnitude")
