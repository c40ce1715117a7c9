"""bitsandbytes' loaders: near the original, smaller than it, and refused in a sentence where they cannot be had."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import change_config, save_llama
from tests.cli.driver import assert_refused, call
from tests.cli.stand_ins import put_in
from tests.conftest import TinyModel
from tests.contracts.artifacts import make_artifact
from tests.runtime.architectures import ALL

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, MissingExtraError, UsageError
from packlight.measure.footprint import footprint, random_layer_model
from packlight.pipeline import Silent, Yardstick, evaluate
from packlight.runtime import bitsandbytes
from packlight.runtime.bitsandbytes import check_loader, load_with, quantized, state_bytes
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.loader import LOADERS, split_loader
from packlight.runtime.loader import with_loader as named
from packlight.runtime.sampling import Sampling

IN_MEMORY = r"bytes in memory: quantized by bitsandbytes [\d.]+ while it is loaded, nothing is on disk"
IDS = torch.arange(40)[None]  # (batch, tokens)
ERRORS = {"bnb-int8": 0.06, "bnb-nf4": 0.5}
"""Share of the logits' spread by which a random model may be off: rounding of 8 bits, and of 4."""


@pytest.fixture
def installed() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@torch.inference_mode()
def error(directory: Path, loader: str, dtype: str | None = None) -> float:
    checkpoint = open_checkpoint(directory)
    wanted = load_model(checkpoint)(IDS).logits
    found = load_with(checkpoint, loader, dtype)(IDS).logits
    return float((found - wanted).std() / wanted.std())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("loader", LOADERS)
class TestLoaded:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_it_is_near_the_original(self, loader: str, dtype: str, tied: bool, tiny_model_dir: TinyModel) -> None:
        assert 0.001 < error(tiny_model_dir(tied=tied), loader, dtype) < ERRORS[loader]

    def test_four_bits_are_worse_than_eight(self, loader: str, tiny_model_dir: TinyModel) -> None:
        errors = {name: error(tiny_model_dir(), name) for name in LOADERS}
        assert errors["bnb-int8"] < errors["bnb-nf4"] / 3

    @pytest.mark.parametrize("architecture", ALL)
    def test_other_architectures(self, loader: str, architecture: str, architecture_dir: Callable[..., Path]) -> None:
        assert error(architecture_dir(architecture), loader) < ERRORS[loader]

    @pytest.mark.parametrize("sizes", [(72, 101), (64, 100), (36, 33)])
    def test_widths_that_no_kernel_divides(self, loader: str, sizes: tuple[int, int], tmp_path: Path) -> None:
        hidden, intermediate = sizes
        odd = save_llama(tmp_path / "odd", hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=2)
        assert error(odd, loader) < ERRORS[loader]

    def test_it_generates_greedily(self, loader: str, tiny_model_dir: TinyModel) -> None:
        model = load_with(open_checkpoint(tiny_model_dir()), loader)
        made = list(complete(model, [72, 105], Sampling(max_tokens=6)))
        with torch.inference_mode():
            logits = model(torch.tensor([[72, 105, *made]])).logits[0, 1:-1]
        near = logits.max(dim=-1).values - logits.gather(1, torch.tensor(made)[:, None])[:, 0]
        assert len(made) == 6
        assert float(near.max()) < 0.2 * float(logits.std()), "int8 rounds inputs by the row, so that ties may break"

    def test_a_tied_head_is_left_alone(self, loader: str, tiny_model_dir: TinyModel) -> None:
        model = load_with(open_checkpoint(tiny_model_dir(tied=True)), loader, "bfloat16")
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert head is embedding
        assert head.dtype == torch.bfloat16
        assert type(model.get_output_embeddings()) is torch.nn.Linear

    @pytest.mark.parametrize("tied", [False, True])
    def test_its_bytes_are_those_of_codes_scales_and_what_is_left(
        self, loader: str, tied: bool, tiny_model_dir: TinyModel
    ) -> None:
        checkpoint = open_checkpoint(tiny_model_dir(tied=tied))
        matrices = checkpoint.spec.quantizable
        left = 4 * (checkpoint.spec.num_params - sum(tensor.numel for tensor in matrices))
        if loader == "bnb-int8":
            claimed = sum(tensor.numel + 4 * tensor.shape[0] for tensor in matrices)
        else:
            claimed = sum(tensor.numel // 2 + 4 * (tensor.numel // 64) + 4 * 16 for tensor in matrices)
        assert state_bytes(load_with(checkpoint, loader)) == left + claimed < 4 * checkpoint.spec.num_params

    def test_a_small_model_is_quantized_in_memory_as_on_loading(self, loader: str, tiny_model_dir: TinyModel) -> None:
        checkpoint = open_checkpoint(tiny_model_dir(tied=True))
        dense = load_model(checkpoint)
        made, loaded = quantized(dense, loader), load_with(checkpoint, loader)
        with torch.inference_mode():
            assert torch.equal(made(IDS).logits, loaded(IDS).logits)

    def test_the_warm_up_runs_its_kernels(self, loader: str, architecture_dir: Callable[..., Path]) -> None:
        small = quantized(random_layer_model(open_checkpoint(architecture_dir("gemma3"))), loader)
        kinds = {type(module).__name__ for module in small.modules()}
        assert kinds & {"Linear8bitLt", "Linear4bit"}

    def test_the_command_line_says_what_it_is(
        self, loader: str, tiny_model_dir: TinyModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_in(monkeypatch.setattr)
        ended = call("eval", tiny_model_dir(), f"{tiny_model_dir()}@{loader}", "--context", 32, "--tokens", 64, "-q")
        assert (ended.code, ended.err) == (0, "")
        assert re.fullmatch(rf"\S+@{loader}: {IN_MEMORY}", ended.out.splitlines()[-1])

    def test_generate(self, loader: str, tiny_model_dir: TinyModel) -> None:
        flags = ("--prompt", "hi", "--max-tokens", 3, "--json")
        by_name = call("generate", f"{tiny_model_dir()}@{loader}", *flags)
        by_flag = call("generate", tiny_model_dir(), "--method", loader, *flags)
        assert by_name.code == 0, by_name.err
        assert by_name.err == ""
        first, second = (json.loads(ended.out) for ended in (by_name, by_flag))
        assert first["model"] == second["model"] == f"{tiny_model_dir()}@{loader}"
        assert first["tokens"] == second["tokens"]

    def test_a_spoiled_checkpoint_is_named_as_without_a_loader(self, loader: str, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(change_config(save_llama(tmp_path / "spoiled"), intermediate_size=96))
        with pytest.raises(CheckpointError, match="its config implies"):
            load_with(checkpoint, loader)


@pytest.mark.usefixtures("installed")
def test_it_is_measured_in_the_same_child(tiny_model_dir: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model_dir())
    found = footprint(checkpoint.path, 32, threads=1, loader="bnb-int8")
    assert found.state_bytes == state_bytes(load_with(checkpoint, "bnb-int8"))
    assert found.peak_bytes > 0 and found.decode_tps > 0
    size, bits = found.state_rows("a", checkpoint.spec.num_params)
    assert (size.name, size.value) == ("disk_bytes", found.state_bytes)
    assert bits.name == "bits_per_weight"
    assert size.note == bits.note
    assert re.fullmatch(IN_MEMORY, str(size.note))
    assert bits.value == pytest.approx(8 * found.state_bytes / checkpoint.spec.num_params)


@pytest.mark.usefixtures("installed")
def test_eval_json_has_the_same_fields(tiny_model_dir: TinyModel) -> None:
    """With measuring children and all; the flag is for all but the first."""
    tiny = str(tiny_model_dir())
    flags = ("--context", 32, "--tokens", 64, "--threads", 1, "--method", "bnb-nf4", "--json", "-q")
    ended = call("eval", tiny, tiny, *flags)
    assert ended.code == 0, ended.err
    dense, packed = json.loads(ended.out)["rows"]
    assert list(packed) == list(dense)
    assert {name: type(value) for name, value in packed.items()} == {n: type(v) for n, v in dense.items()}
    assert (dense["model"], packed["model"]) == (tiny, f"{tiny}@bnb-nf4")
    assert packed["bytes"] == state_bytes(load_with(open_checkpoint(tiny), "bnb-nf4")) < dense["bytes"]
    assert packed["bits_per_weight"] < dense["bits_per_weight"]
    assert packed["kl"] > 0


@pytest.mark.usefixtures("installed")
def test_a_path_that_is_called_like_a_loader_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(save_llama(tmp_path / "tiny@bnb-nf4"))
    assert split_loader(directory) == (directory, None)
    assert split_loader(f"{directory}@bnb-int8") == (directory, "bnb-int8")
    put_in(monkeypatch.setattr)
    compared = evaluate([directory], Yardstick(window=32, tokens=64), Silent())
    assert next(row.note for row in compared.rows[0] if row.name == "disk_bytes") is None
    with pytest.raises(UsageError, match="rename the path"):
        named(str(tmp_path / "tiny"), "bnb-nf4")


def test_names() -> None:
    assert split_loader("demo") == ("demo", None)
    assert split_loader("org/name@bnb-int8") == ("org/name", "bnb-int8")
    assert split_loader("a@b/c") == ("a@b/c", None)
    assert named("demo", None) == "demo"
    assert named("demo", "bnb-nf4") == "demo@bnb-nf4" == named("demo@bnb-nf4", "bnb-nf4")


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_without_bitsandbytes_nothing_is_read(
    verb: str, tiny_model_dir: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object, **options: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("packlight.pipeline.load_with", read)
    monkeypatch.setattr("packlight.runtime.model_answer.load_with", read)
    tiny = tiny_model_dir()
    line = ["eval", tiny, f"{tiny}@bnb-int8"] if verb == "eval" else ["generate", f"{tiny}@bnb-int8", "--prompt", "hi"]
    says = "loading with bnb-int8 needs bitsandbytes, which is not installed: pip install 'packlight[bnb]'"
    assert_refused(line, tmp_path, says=says)


@pytest.mark.usefixtures("absent")
def test_without_bitsandbytes_the_loader_itself_says_so(tiny_model_dir: TinyModel) -> None:
    with pytest.raises(MissingExtraError):
        load_with(open_checkpoint(tiny_model_dir()), "bnb-nf4")


def test_an_old_bitsandbytes_is_named(tiny_model_dir: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "find_spec", lambda package: object())
    monkeypatch.setattr(bitsandbytes, "version", lambda package: "0.40.0")
    monkeypatch.setattr(bitsandbytes, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match=r"bitsandbytes 0\.40\.0 is older .* pip install --upgrade bitsandbytes"):
        check_loader(open_checkpoint(tiny_model_dir()), "bnb-nf4")


def test_a_quantized_model_is_refused(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    packed = make_artifact(tiny_model_dir(), tmp_path / "int4")
    says = "bnb-nf4 starts from the original"
    assert_refused(["eval", tiny_model_dir(), f"{packed}@bnb-nf4"], tmp_path, says=says)
    assert_refused(["eval", tiny_model_dir(), packed, "--method", "bnb-nf4"], tmp_path, says=says)
    assert_refused(["generate", f"{packed}@bnb-nf4", "--prompt", "hi"], tmp_path, says=says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["eval", "TINY", "TINY@bnb-int4"], "there is no loader 'bnb-int4'"),
        (["eval", "TINY@nf4"], "MODEL@bnb-int8 or MODEL@bnb-nf4"),
        (["eval", "TINY@"], "there is no loader ''"),
        (["eval", "TINY", "TINY", "--method", "gptq"], "there is no loader 'gptq'"),
        (["eval", "TINY", "--method", "bnb-nf4"], "every MODEL but the first"),
        (["eval", "TINY", "TINY@bnb-int8", "--method", "bnb-nf4"], "leave one of them out"),
        (["eval", "@bnb-nf4"], "does not exist"),
        (["eval", "nowhere@bnb-nf4"], "'nowhere' does not exist"),
        (["generate", "TINY@bnb", "--prompt", "hi"], "there is no loader 'bnb'"),
        (["generate", "TINY", "--method", "rtn", "--prompt", "hi"], "there is no loader 'rtn'"),
        (["quantize", "TINY", "--method", "bnb-nf4", "--out", "OUT"], "saves nothing: use eval or generate with"),
        (["quantize", "TINY", "--method", "bnb-int8", "--out", "OUT"], "saves nothing: use eval or generate with"),
    ],
)
def test_mistakes(line: list[str], says: str, tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    names = {"TINY": str(tiny_model_dir()), "OUT": str(tmp_path / "out")}
    given = [word.replace("TINY", names["TINY"]) if "TINY" in word else names.get(word, word) for word in line]
    assert_refused(given, tmp_path, says=says)
