"""A loaded model is the model that transformers loads, dense or packed, or the checkpoint is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.artifacts import make_artifact
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.packed import packed_names, read_quantized
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.errors import CheckpointError
from packlight.runtime.load import empty_model, load_model
from packlight.runtime.packed import PackedEmbedding, PackedLinear
from packlight.runtime.tokenizer import load_tokenizer

TinyModel = Callable[..., Path]
IDS = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(3))


def logits_of(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits.double()


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_that_of_transformers_bit_for_bit(tiny_model_dir: TinyModel, tied: bool) -> None:
    directory = tiny_model_dir(tied=tied)
    ours, theirs = load_model(open_checkpoint(directory)), AutoModelForCausalLM.from_pretrained(directory)
    assert type(ours) is type(theirs) and not ours.training
    assert torch.equal(logits_of(ours), logits_of(theirs.eval()))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_compute_dtype(tiny_model_dir: TinyModel, dtype: str) -> None:
    directory = tiny_model_dir(tied=True)
    ours = load_model(open_checkpoint(directory), dtype)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    assert {parameter.dtype for parameter in ours.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits_of(ours), logits_of(theirs))


def test_rotary_tables_are_real_and_keep_their_precision(tiny_model_dir: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(tied=True))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    for model in (empty_model(checkpoint, "bfloat16"), load_model(checkpoint, "bfloat16")):
        table = model.model.rotary_emb.inv_freq
        assert not table.is_meta and table.dtype == torch.float32
        assert torch.equal(table, theirs.model.rotary_emb.inv_freq)


def test_an_empty_model_takes_no_memory_and_drops_nothing_out(tiny_model_dir: TinyModel) -> None:
    model = empty_model(open_checkpoint(tiny_model_dir(tied=False)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training


def test_loading_leaves_the_verbosity_of_transformers_alone(tiny_model_dir: TinyModel) -> None:
    before = transformers_logging.get_verbosity()
    load_model(open_checkpoint(tiny_model_dir(tied=True)))
    assert transformers_logging.get_verbosity() == before


# --- packed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_dir(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An artifact of the tiny model, made once for each set of options."""
    made: dict[str, Path] = {}

    def make(tied: bool, **options: Any) -> Path:
        key = json.dumps([tied, options], sort_keys=True)
        if key not in made:
            made[key] = make_artifact(tiny_model_dir(tied=tied), tmp_path_factory.mktemp("packed") / "out", **options)
        return made[key]

    return make


def dense_twin(directory: Path, original: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The original's dense class over the de-quantized matrices of an artifact."""
    checkpoint = open_checkpoint(directory)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original, dtype=dtype).eval()
    packed = packed_names(checkpoint.index)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (base := name.removesuffix(".weight")) in packed:
                parameter.copy_(read_quantized(checkpoint, base).dequantize())
            else:
                parameter.copy_(parameter.to(torch.bfloat16))  # stored in bfloat16
    return model


INT4_SYM: dict[str, Any] = {"bits": 4, "group_size": 32}
INT4_ASYM: dict[str, Any] = {**INT4_SYM, "symmetric": False}
INT8_ROW: dict[str, Any] = {"bits": 8, "group_size": None}
# Keys and values have 32 rows, and the int4 kernel works on 64.
GRIDS: list[tuple[dict[str, Any], set[str]]] = [
    (INT4_SYM, {"int4", "reference"}),
    (INT4_ASYM, {"int4", "reference"}),
    ({**INT4_SYM, "group_size": None}, {"int4", "reference"}),
    ({**INT4_ASYM, "group_size": None}, {"int4", "reference"}),
    ({**INT4_SYM, "group_size": 16}, {"reference"}),
    (INT8_ROW, {"int8"}),
    ({**INT8_ROW, "symmetric": False}, {"int8"}),
    ({**INT8_ROW, "group_size": 32}, {"reference"}),
    ({**INT4_SYM, "embeddings": 4}, {"int4", "reference"}),
    ({**INT4_ASYM, "embeddings": 4}, {"int4", "reference"}),
    ({**INT4_SYM, "group_size": 16, "embeddings": 4}, {"reference"}),
    ({**INT4_SYM, "embeddings": 8}, {"int4", "int8", "reference"}),
    ({**INT4_ASYM, "embeddings": 8}, {"int4", "int8", "reference"}),
    ({**INT8_ROW, "embeddings": 8}, {"int8"}),
]


def identity(options: object) -> str | None:
    if not isinstance(options, dict):
        return ""
    group = options["group_size"] or "row"
    kind = "sym" if options.get("symmetric", True) else "asym"
    return f"int{options['bits']}-{group}-{kind}-embed{options.get('embeddings')}"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("options", "kernels"), GRIDS, ids=identity)
def test_a_packed_model_computes_what_its_dense_twin_computes(
    tiny_model_dir: TinyModel, packed_dir: Callable[..., Path], options: dict[str, Any], kernels: set[str], tied: bool
) -> None:
    """Against the twin in float32, the packed model errs at most twice as much as the twin in bfloat16 does."""
    directory, original = packed_dir(tied, **options), tiny_model_dir(tied=tied)
    model = load_model(open_checkpoint(directory))
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {linear.kernel for linear in linears} == kernels
    is_packed = "embeddings" in options
    assert len(linears) == 2 * 7 + is_packed
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) is is_packed
    exact = logits_of(dense_twin(directory, original, torch.float32))
    rounding = (logits_of(dense_twin(directory, original, torch.bfloat16)) - exact).square().mean().sqrt()
    error = (logits_of(model) - exact).square().mean().sqrt()
    assert float(error) <= 2 * float(rounding)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", [INT4_ASYM | {"embeddings": 4}, INT8_ROW | {"embeddings": 8}], ids=identity)
def test_a_packed_model_in_float32(
    tiny_model_dir: TinyModel, tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    """No fast kernel computes in float32: the reference does, and float32's own tolerances hold."""
    original = tiny_model_dir(tied=tied)
    directory = make_artifact(original, tmp_path / "out", dtype="float32", **options)
    model = load_model(open_checkpoint(directory))
    kernels = {module.kernel for module in model.modules() if isinstance(module, PackedLinear)}
    assert kernels == {"reference"}
    twin: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original).eval()
    checkpoint = open_checkpoint(directory)
    with torch.no_grad():
        for base in packed_names(checkpoint.index):
            twin.get_submodule(base).weight.copy_(read_quantized(checkpoint, base).dequantize())
    torch.testing.assert_close(logits_of(model).float(), logits_of(twin).float(), rtol=1e-4, atol=1e-4)


def test_a_tied_head_shares_its_codes(packed_dir: Callable[..., Path]) -> None:
    plain = load_model(open_checkpoint(packed_dir(True, **INT8_ROW, embeddings=8)))
    assert plain.lm_head.codes is plain.model.embed_tokens.codes
    words = load_model(open_checkpoint(packed_dir(True, **{**INT4_SYM, "group_size": 16}, embeddings=4)))
    assert words.lm_head.words is words.model.embed_tokens.codes


def test_the_int_quantized_layout_loads_as_the_packed_one(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    for symmetric in (True, False):
        options = {**INT8_ROW, "symmetric": symmetric, "embeddings": 8}
        original = tiny_model_dir(tied=True)
        one = make_artifact(original, tmp_path / f"one{symmetric}", "pack-quantized", **options)
        other = make_artifact(original, tmp_path / f"other{symmetric}", "int-quantized", **options)
        found = [logits_of(load_model(open_checkpoint(directory))) for directory in (one, other)]
        assert torch.equal(*found)


# --- damage -----------------------------------------------------------------------------------------------------


def damaged(directory: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(directory, out)
    tensors = load_file(out / SINGLE_NAME)
    change(tensors)
    save_file(tensors, out / SINGLE_NAME, {"format": "pt"})
    return out


UP = "model.layers.1.mlp.up_proj"


def test_a_missing_tensor_is_named(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    directory = damaged(tiny_model_dir(tied=False), tmp_path / "out", lambda found: found.pop(f"{UP}.weight"))
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of its architecture, the first is {UP}.weight"):
        load_model(open_checkpoint(directory))


def test_a_wrong_shape_is_named(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    directory = damaged(
        tiny_model_dir(tied=False), tmp_path / "out", lambda found: found.update({f"{UP}.weight": torch.zeros(127, 64)})
    )
    with pytest.raises(
        CheckpointError, match=rf"{UP}.weight in .* has shape \(127, 64\), its config implies \(128, 64\)"
    ):
        load_model(open_checkpoint(directory))


def test_a_missing_part_of_a_packed_matrix(packed_dir: Callable[..., Path], tmp_path: Path) -> None:
    source = packed_dir(True, **INT4_ASYM)
    directory = damaged(source, tmp_path / "zero", lambda found: found.pop(f"{UP}.weight_zero_point"))
    with pytest.raises(CheckpointError, match=f"{UP}.weight_zero_point is missing"):
        load_model(open_checkpoint(directory))
    # Without its scale a matrix is known by nothing: its other parts are foreign.
    directory = damaged(source, tmp_path / "scale", lambda found: found.pop(f"{UP}.weight_scale"))
    with pytest.raises(CheckpointError, match=f"foreign to its architecture, such as {UP}.weight_packed"):
        load_model(open_checkpoint(directory))


def test_a_packed_matrix_of_another_shape_than_the_config_says(packed_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(packed_dir(False, **INT4_SYM), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"_proj.weight in .* has shape .*, its config implies"):
        load_model(open_checkpoint(directory))


def test_a_foreign_tensor_in_a_packed_checkpoint(packed_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = damaged(
        packed_dir(True, **INT4_SYM),
        tmp_path / "out",
        lambda found: found.update({"model.extra.weight": torch.ones(3)}),
    )
    with pytest.raises(CheckpointError, match=r"foreign to its architecture, such as model.extra.weight"):
        load_model(open_checkpoint(directory))


def test_a_table_that_is_computed_anyway_is_not_foreign(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    """Checkpoints of old versions store rotary tables."""
    original = tiny_model_dir(tied=True)
    directory = damaged(
        original,
        tmp_path / "out",
        lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}),
    )
    assert torch.equal(
        logits_of(load_model(open_checkpoint(directory))), logits_of(load_model(open_checkpoint(original)))
    )


def test_a_directory_without_a_tokenizer(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(tiny_model_dir(tied=True), directory, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_tokenizer(open_checkpoint(directory))
