"""AWQ: folds are found by structure and change nothing by themselves; what is rounded after them loses less."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import save_byte_tokenizer
from tests.contracts.artifacts import make_artifact, proof_distance
from tests.runtime.architectures import save_architecture
from transformers import LlamaConfig, LlamaForCausalLM

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.checkpoint.tensors import read_tensor
from packlight.compress.listen import Group, input_groups
from packlight.compress.quantize.awq import Awq, Fold, find_folds, fold_
from packlight.compress.quantize.options import GridOptions
from packlight.compress.quantize.rtn import Rtn
from packlight.compress.walk import Activations, Block, Calibration, WalkResult, walk
from packlight.errors import UsageError
from packlight.measure.proof import MAX_KL
from packlight.runtime.load import empty_model

IDS = list(range(1, 40))
TEXT = b"It was in July, 1805, and the speaker was the well-known Anna Pavlovna Scherer, maid of honour and favourite. "
WINDOWS = [list(TEXT[start : start + 48]) for start in range(0, 60, 8)]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA: dict[tuple[str, ...], tuple[str, float] | None] = {
    QKV: ("input_layernorm", 0.0),
    ("self_attn.o_proj",): None,  # two heads share their values
    GATE_UP: ("post_attention_layernorm", 0.0),
    ("mlp.down_proj",): ("mlp.up_proj", 0.0),
}
GEMMA = {**LLAMA, QKV: ("input_layernorm", 1.0), GATE_UP: ("pre_feedforward_layernorm", 1.0)}
FOLDS: dict[str, dict[tuple[str, ...], tuple[str, float] | None]] = {
    "llama": LLAMA,
    "multi-head llama": {**LLAMA, ("self_attn.o_proj",): ("self_attn.v_proj", 0.0)},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        ("self_attn.qkv_proj",): ("input_layernorm", 0.0),
        ("self_attn.o_proj",): None,
        ("mlp.gate_up_proj",): ("post_attention_layernorm", 0.0),
        ("mlp.down_proj",): ("mlp.gate_up_proj", 0.0),
    },
    "opt": {
        QKV: ("self_attn_layer_norm", 0.0),
        ("self_attn.out_proj",): ("self_attn.v_proj", 0.0),
        ("fc1",): ("final_layer_norm", 0.0),
        ("fc2",): ("fc1", 0.0),  # ReLU lets a positive factor through
    },
}


@pytest.fixture(scope="module")
def model_of(tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random model by its architecture."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name == "llama":
            directory: Path = tiny_model_dir(tied=True)
            return directory
        if name not in made:
            made[name] = tmp_path_factory.mktemp("awq") / "model"
            if name == "multi-head llama":
                save_multi_head_llama(made[name])
            else:
                save_architecture(name, made[name])
        return made[name]

    return make


def save_multi_head_llama(directory: Path) -> None:
    """As many heads of values as of queries, and biases."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(directory)
    save_byte_tokenizer(directory)


def blocks(model: Path) -> Iterator[Block]:
    """The decoder blocks on a walk with calibration text."""
    checkpoint = open_checkpoint(model)
    empty = empty_model(checkpoint, "float32")
    text = Calibration(WINDOWS, keeps_targets=False)
    for block in walk(checkpoint, empty, IDS, text, lambda block: None, lambda block: False, WalkResult()):
        if block.activations is not None:
            yield block


def folds_of(block: Block) -> dict[Group, Fold | None]:
    return find_folds(block, input_groups(block, [name for name, _, _ in block.matrices()]))


def output(block: Block) -> torch.Tensor:
    assert block.activations is not None
    return block.activations.run(block.module, block.activations.inputs)


def random_scale(block: Block, group: Group, seed: int = 0) -> torch.Tensor:
    cols = block.tensor(group.names[0]).shape[1]
    return torch.randn(cols, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize("architecture", FOLDS)
def test_folds_are_found_by_structure(architecture: str, model_of: Callable[[str], Path]) -> None:
    for block in blocks(model_of(architecture)):

        def short(name: str, own: str = f"{block.name}.") -> str:
            return name.removeprefix(own).removesuffix(".weight")

        found = {
            tuple(sorted(map(short, group.names))): None if fold is None else (short(fold.weight), fold.offset)
            for group, fold in folds_of(block).items()
        }
        assert found == {tuple(sorted(names)): fold for names, fold in FOLDS[architecture].items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", FOLDS)
def test_a_fold_alone_changes_nothing(
    architecture: str, dtype: torch.dtype | None, model_of: Callable[[str], Path]
) -> None:
    for block in blocks(model_of(architecture)):
        before = output(block)
        for seed, (group, fold) in enumerate(folds_of(block).items()):
            if fold is not None:
                kept = block.tensor(group.names[0])
                fold_(block, group, fold, random_scale(block, group, seed), dtype)
                assert not torch.equal(block.tensor(group.names[0]), kept)
                norm = block.tensor(fold.weight)
                assert dtype is None or norm.ndim > 1 or torch.equal(norm, norm.to(dtype).float())
        torch.testing.assert_close(output(block), before, rtol=1e-4, atol=1e-4)


def test_a_fold_that_another_matrix_would_see_is_refused(model_of: Callable[[str], Path]) -> None:
    for block in blocks(model_of("llama")):
        alone = [Group((f"{block.name}.{name}.weight",)) for name in (*QKV, *GATE_UP)]
        assert set(find_folds(block, alone).values()) == {None}


def test_looking_for_folds_leaves_the_block_as_it_is(model_of: Callable[[str], Path]) -> None:
    for block in blocks(model_of("gemma2")):
        before = {name: block.tensor(name) for name in block.tensors}
        folds_of(block)
        assert all(block.tensor(name) is not None and torch.equal(block.tensor(name), before[name]) for name in before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())


@pytest.mark.parametrize(("architecture", "nothing"), [("llama", 0.0), ("gemma2", -1.0)])
def test_a_channel_that_its_norm_puts_out_stays_out(
    architecture: str, nothing: float, model_of: Callable[[str], Path]
) -> None:
    for block in blocks(model_of(architecture)):
        group, fold = next(iter(folds_of(block).items()))
        assert fold is not None
        norm = block.tensor(fold.weight).clone()
        norm[3], norm[5] = nothing, nothing + 1e-3  # with an offset, the second is rounded to the first
        block.put_(fold.weight, norm)
        before = output(block)
        fold_(block, group, fold, random_scale(block, group).clamp(min=1.0) * 3, torch.bfloat16)
        assert float(block.tensor(fold.weight)[3]) == nothing
        assert all(bool(torch.isfinite(block.tensor(name)).all()) for name in block.tensors)
        torch.testing.assert_close(output(block), before, rtol=1e-4, atol=1e-4)


def errors(step: GridOptions, model: Path) -> list[float]:
    """Mean squared error of every block's output, on what enters the block in the walk of `step`."""
    found: list[float] = []

    def watched() -> Iterator[Block]:
        for block in blocks(model):
            before = output(block)
            yield block
            found.append(float((output(block) - before).square().mean()))

    list(step.apply_(watched()))
    return found


def options(bits: int, clip: str) -> dict[str, Any]:
    return {"bits": bits, "group_size": 32, "symmetric": False, "clip": clip}


@pytest.fixture(scope="module")
def salient(tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a few channels of its norms eight times as large."""
    directory = tmp_path_factory.mktemp("salient") / "model"
    shutil.copytree(tiny_model_dir(tied=True), directory)
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if "layernorm" in name:
            tensors[name][[7, 20, 41]] *= 8
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [3, 4])
def test_salient_channels_are_spared(bits: int, clip: str, salient: Path) -> None:
    nearest = errors(Rtn(**options(bits, clip)), salient)
    aware = errors(Awq(**options(bits, clip), guided=False, sample=2), salient)
    assert aware[0] < 0.75 * nearest[0]  # the first block, which the same inputs enter whatever the method


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(
    ("architecture", "bits"), [("llama", 2), ("llama", 4), ("multi-head llama", 3), ("gemma2", 4), ("opt", 3)]
)
def test_it_is_no_worse_than_rounding_to_nearest(
    architecture: str, bits: int, clip: str, model_of: Callable[[str], Path]
) -> None:
    model = model_of(architecture)
    nearest = errors(Rtn(**options(bits, clip)), model)
    aware = errors(Awq(**options(bits, clip), guided=False, sample=1), model)
    assert aware[0] <= nearest[0]


def test_without_an_exponent_above_zero_nothing_is_scaled(model_of: Callable[[str], Path]) -> None:
    model = model_of("llama")
    one, other = Awq(**options(4, "minmax"), exponents=1, guided=False), Rtn(**options(4, "minmax"))
    assert errors(one, model) == errors(other, model)


def test_a_tensor_without_a_grid_is_scaled_with_its_group(salient: Path, tmp_path: Path) -> None:
    name, norm = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
    original = open_checkpoint(salient)
    options = {"dtype": "float32", "bits": 3, "guided": False, "grids": [[name, None]]}
    made = make_artifact(salient, tmp_path / "out", method="awq", **options)
    artifact = open_checkpoint(made)
    scale = read_tensor(original.index[norm]) / read_tensor(artifact.index[norm])
    assert not torch.equal(scale, torch.ones_like(scale))
    torch.testing.assert_close(read_tensor(artifact.index[name]), read_tensor(original.index[name]) * scale)
    assert proof_distance(made)[0] <= MAX_KL["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", ["multi-head llama", "qwen2", "gemma2", "phi3", "opt"])
def test_the_artifact_computes_what_was_in_memory(
    architecture: str, dtype: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_of(architecture)
    made = make_artifact(model, tmp_path / "out", method="awq", bits=3, symmetric=False, dtype=dtype)
    assert proof_distance(made)[0] <= MAX_KL[dtype]
    changed = changed_vectors(open_checkpoint(model), open_checkpoint(made), getattr(torch, dtype))
    assert changed and all("norm" in name or name.endswith(".bias") for name in changed)


def changed_vectors(original: Checkpoint, artifact: Checkpoint, dtype: torch.dtype) -> list[str]:
    """Names of norms' weights and of biases that differ by more than the rounding to `dtype`."""
    vectors = [name for name, entry in original.index.items() if len(entry.shape) == 1]
    stored = {name: read_tensor(artifact.index[name]) for name in vectors}
    return [name for name in vectors if not torch.equal(read_tensor(original.index[name]).to(dtype), stored[name])]


def test_rows_name_the_exponents(model_of: Callable[[str], Path]) -> None:
    rows = list(Awq(bits=3, guided=False).apply_(blocks(model_of("llama"))))
    assert [row.name for row in rows] == ["relative_output_error"] * 2
    assert all(0 < float(row.value or 0) < 1 for row in rows)
    assert all(re.search(r"self_attn\.\w_proj 0\.\d\d, .*mlp\.down_proj 0\.\d\d$", row.note or "") for row in rows)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"exponents": 0}, "exponents must be at least 1, not 0"),
        ({"exponents": 2.5}, "exponents must be at least 1, not 2.5"),
        ({"sample": 0}, "sample must be at least 1, not 0"),
        ({"clip": "max"}, "clip is minmax or mse"),
    ],
)
def test_it_checks_its_ranges(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Awq(**bad)


def test_passes_are_those_that_are_made(model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Activations.run, 0

    def counted(self: Activations, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(hidden)
        return run(self, module, hidden)

    monkeypatch.setattr(Activations, "run", counted)
    step = Awq(guided=False, sample=2)
    list(step.apply_(blocks(model_of("multi-head llama"))))
    # Passes that end early are counted whole here, and single windows are run to find groups and folds.
    assert step.reading.passes <= seen / (2 * len(WINDOWS)) <= 1.25 * step.reading.passes
    assert Awq(sample=2).reading.passes == step.reading.passes + 3
