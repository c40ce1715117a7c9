"""Every bad checkpoint, through every verb that reads it: one sentence, exit 2, no traceback, nothing left behind."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.gguf_bytes import model, write
from tests.cli.conftest import change_config, change_weight, save_llama
from tests.cli.driver import assert_one_sentence, assert_refused, call, run

pytestmark = pytest.mark.usefixtures("stand_ins")

WRITERS = ("quantize", "fit")
READERS = ("eval", "generate")
ALL = (*WRITERS, *READERS)


def arguments(verb: str, source: object, out: Path) -> list[object]:
    """A command line that would succeed in a moment with a good source."""
    more: dict[str, list[object]] = {
        "quantize": ["-q", "--out", out],
        "fit": ["-q", "--memory", "1GB", "--context", 64, "--window", 32, "--tokens", 256, "--out", out],
        "eval": ["-q", "--context", 32, "--tokens", 128],
        "generate": ["--prompt", "hi", "--max-tokens", 4],
        "plan": [],
    }
    return [verb, source, *more[verb]]


def refused(source: object, out: Path, verbs: tuple[str, ...], says: str = "") -> None:
    for verb in verbs:
        assert_refused(arguments(verb, source, out), out.parents[1], says=says)


def test_a_good_model_passes_where_bad_ones_are_refused(tiny: Path, out: Path) -> None:
    for verb in (*ALL, "plan"):
        ended = call(*arguments(verb, tiny, out))
        assert ended.code == 0, ended.err
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "./a/b", "", "demo.gguf", "model.safetensors"])
def test_missing_path(source: str, out: Path) -> None:
    refused(source, out, (*ALL, "plan"), "does not exist")


def test_a_hub_id_out_of_reach(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("no-such-org/no-such-model", out, (*ALL, "plan"))


def test_empty_directory(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, (*ALL, "plan"), "is empty")


def test_directory_without_a_config(tiny: Path, out: Path) -> None:
    (tiny / "config.json").unlink()
    refused(tiny, out, (*ALL, "plan"), "no config.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": None}, "names no architectures"),
        ({"architectures": []}, "names no architectures"),
        ({"architectures": "LlamaForCausalLM"}, "a list of class names"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "give a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "remote code"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"dtype": "nosuch"}, "dtype"),
    ],
)
def test_config_that_says_something_else(changes: dict[str, Any], says: str, tiny: Path, out: Path) -> None:
    refused(change_config(tiny, **changes), out, (*ALL, "plan"), says)


def test_config_that_is_no_json(tiny: Path, out: Path) -> None:
    (tiny / "config.json").write_text("{")
    refused(tiny, out, (*ALL, "plan"), "invalid JSON")


@pytest.mark.parametrize("model_type", ["nosuch", None])
def test_unknown_architecture(model_type: str | None, tiny: Path, out: Path) -> None:
    change_config(tiny, model_type=model_type, architectures=["NoSuchForCausalLM"])
    refused(tiny, out, ALL, "no causal language model class")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 128}, "its config implies"),
        ({"vocab_size": 300}, "its config implies"),
        ({"num_key_value_heads": 4}, "its config implies"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"attention_bias": True}, "lacks 8 tensors"),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"hidden_act": "nosuch"}, "cannot build the model"),
        ({"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}}, "cannot build the model"),
        ({"head_dim": 15}, ""),
    ],
)
def test_config_and_weights_that_do_not_belong_together(
    changes: dict[str, Any], says: str, tiny: Path, out: Path
) -> None:
    refused(change_config(tiny, **changes), out, ALL, says)


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_safetensors(tenth: int, tiny: Path, out: Path) -> None:
    weights = tiny / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) * tenth // 10])
    refused(tiny, out, (*ALL, "plan"))


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_gguf(tenth: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "converted").mkdir(parents=True)
    path = write(tmp_path / "cut.gguf", *model())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * tenth // 10])
    refused(path, out, (*ALL, "plan"))


def test_truncated_inside_the_header(tiny: Path, out: Path) -> None:
    weights = tiny / "model.safetensors"
    data = weights.read_bytes()
    for length in (1, 7, 8, 9, 100):
        weights.write_bytes(data[:length])
        refused(tiny, out, ("quantize", "plan"))


@pytest.mark.parametrize(
    ("written", "instead"),
    [(b"[64,128]", b"[64,127]"), (b"[64,128]", b"[640,12]"), (b'"F32"', b'"F16"'), (b'"F32"', b'"X99"')],
)
def test_header_that_lies_about_sizes(written: bytes, instead: bytes, tiny: Path, out: Path) -> None:
    weights = tiny / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(written, instead, 1)
    weights.write_bytes(data[:8] + header + data[8 + length :])
    refused(tiny, out, (*ALL, "plan"))


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 1])
def test_header_that_lies_about_its_own_length(length: int, tiny: Path, out: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    refused(tiny, out, (*ALL, "plan"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.layers.1.mlp.up_proj.weight", float("inf")),
        ("model.layers.1.input_layernorm.weight", float("nan")),
        ("model.norm.weight", float("nan")),
        ("model.embed_tokens.weight", float("nan")),
        ("lm_head.weight", float("nan")),
    ],
)
def test_nan_weights(name: str, value: float, tiny: Path, out: Path) -> None:
    change_weight(tiny, name, value)
    refused(tiny, out, ("quantize", "fit", "eval"), name)
    cast = ["quantize", tiny, "-q", "--method", "cast", "--dtype", "float32", "--out", out]
    assert_refused(cast, out.parents[1], says=name)


def test_generate_says_so_when_a_model_computes_nan(tiny: Path, out: Path) -> None:
    change_weight(tiny, "model.norm.weight", float("nan"))
    refused(tiny, out, ("generate",), "NaN")


@pytest.mark.parametrize("method", ["cast", "rtn"])
def test_weights_that_the_dtype_cannot_hold(method: str, tiny: Path, out: Path) -> None:
    change_weight(tiny, "model.layers.0.mlp.up_proj.weight", 1e30)
    line = ["quantize", tiny, "-q", "--method", method, "--dtype", "float16", "--out", out]
    assert_refused(line, out.parents[1], says="not finite in float16")


def test_a_pickle(tiny: Path, out: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    refused(tiny, out, ALL, "pickled weights are refused")
    refused(tiny / "pytorch_model.bin", out, (*ALL, "plan"), "pickled weights are refused")


def test_a_file_of_another_kind(tiny: Path, out: Path) -> None:
    refused(tiny / "tokenizer.json", out, ALL, "unknown kind")


def test_directory_without_a_tokenizer(tiny: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).unlink()
    refused(tiny, out, ALL, "has no tokenizer")


def test_damaged_tokenizer(tiny: Path, out: Path) -> None:
    (tiny / "tokenizer.json").write_text("{")
    refused(tiny, out, ALL, "has no tokenizer")


def test_quantized_already(tiny: Path, out: Path, tmp_path: Path) -> None:
    assert call("quantize", tiny, "-q", "--bits", 8, "--out", tmp_path / "int8").code == 0
    refused(tmp_path / "int8", out, WRITERS, "already quantized")


def test_models_of_different_vocabularies(tiny: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", vocab_size=260)
    assert_refused(["eval", "-q", tiny, other, "--context", 32], tmp_path, says="same tokenizer")


def test_a_shard_that_is_not_there(tmp_path: Path, out: Path) -> None:
    sharded = save_llama(tmp_path / "sharded", max_shard_size="100KB")
    next(iter(sorted(sharded.glob("model-00002-*")))).unlink()
    refused(sharded, out, (*ALL, "plan"), "lacks the shard")


@pytest.mark.parametrize("verb", ["prove", "report"])
def test_a_directory_that_is_no_artifact(verb: str, tiny: Path, tmp_path: Path) -> None:
    for directory in (tiny, tmp_path, tmp_path / "nowhere", tiny / "config.json"):
        assert_refused([verb, directory], tmp_path, says="artifact that packlight saved")


def test_damaged_evidence(tmp_path: Path) -> None:
    for damage in (b"garbage\n", b'{"x": 1}\n', b"\xff\xfe\n"):
        (tmp_path / "evidence.jsonl").write_bytes(damage)
        assert_refused(["report", tmp_path], tmp_path, says="is damaged")


def test_a_process_of_its_own_ends_the_same_way(tmp_path: Path) -> None:
    for verb, source in (("plan", tmp_path / "nowhere"), ("fit", tmp_path)):
        assert_one_sentence(run(*arguments(verb, source, tmp_path / "out")))
    assert not list(tmp_path.iterdir())
