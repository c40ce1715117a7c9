"""Every kind of source opens, and every wrong one is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.gguf_bytes import model, write

from packlight.checkpoint.open import open_checkpoint, read_spec, resolve
from packlight.errors import CheckpointError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, tiny_model_dir: Any) -> Path:
    return Path(shutil.copytree(tiny_model_dir(tied=True), tmp_path / "tiny"))


def change(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | fields
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def test_a_directory_opens_as_itself(tiny: Path) -> None:
    opened = open_checkpoint(tiny)
    assert opened.path == tiny and opened.source == str(tiny)
    assert opened.spec.is_tied and opened.spec.num_layers == 2
    assert {tensor.name for tensor in opened.spec.tensors} == set(opened.index)
    assert opened.spec == read_spec(tiny)


def test_a_config_alone_gives_the_spec_of_the_weights(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny / "config.json", bare)
    whole = {(t.name, t.shape, t.dtype, t.kind) for t in read_spec(tiny).tensors}
    for source in (bare, bare / "config.json"):
        assert {(t.name, t.shape, t.dtype, t.kind) for t in read_spec(source).tensors} == whole
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        open_checkpoint(bare)


def test_a_gguf_file_is_converted_once_by_content(tmp_path: Path, cache: Path) -> None:
    first = write(tmp_path / "a.gguf", *model())
    second = Path(shutil.copy(first, tmp_path / "b.gguf"))
    opened = open_checkpoint(first)
    assert opened.path.parent == cache / "converted"
    assert resolve(second) == opened.path
    write(first, *model(llama__context_length=128))
    assert resolve(first) != opened.path
    assert len(list(opened.path.parent.iterdir())) == 2


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_the_spec_of_a_gguf_header_is_that_of_its_conversion(tmp_path: Path, cache: Path, dtype: str) -> None:
    path = write(tmp_path / "a.gguf", *model(dtype=dtype))
    spec = read_spec(path)
    assert not cache.exists()
    assert sorted(spec.tensors, key=str) == sorted(open_checkpoint(path).spec.tensors, key=str)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.gguf", *model(tokenizer__ggml__model="strange"))
    with pytest.raises(CheckpointError, match="'strange'"):
        resolve(path)
    assert list((cache / "converted").iterdir()) == []


@pytest.mark.data
def test_a_llama2c_file_opens(data_dir: Path, cache: Path) -> None:
    path = data_dir / "stories260K" / "stories260K.bin"
    opened = open_checkpoint(path)
    assert opened.spec.num_params == 260_032 and opened.spec.is_tied
    assert sorted(read_spec(path).tensors, key=str) == sorted(opened.spec.tensors, key=str)


@pytest.mark.demo
def test_the_demo_opens_quickly(demo_dir: Path) -> None:
    start = time.perf_counter()
    opened = open_checkpoint("demo")
    assert time.perf_counter() - start < 10
    assert opened.path == demo_dir and opened.spec.num_params == 134_515_008


@pytest.mark.demo
def test_a_spec_of_the_demo_needs_no_torch(demo_dir: Path) -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from packlight.checkpoint.open import read_spec\n"
        "spec = read_spec('demo')\n"
        "assert time.perf_counter() - start < 1.0\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'gguf'} & set(sys.modules)\n"
        "assert spec.num_params == 134515008\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_quantized_directory_tells_its_dense_tensors(tiny: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    dense = read_spec(tiny)
    tensors = load_file(tiny / "model.safetensors")
    for name in [tensor.name for tensor in dense.quantizable]:
        weight = tensors.pop(name)
        base = name.removesuffix(".weight")
        tensors[f"{base}.weight_packed"] = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
        tensors[f"{base}.weight_scale"] = torch.ones(weight.shape[0], weight.shape[1] // 32)
        tensors[f"{base}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, tiny / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    change(tiny, quantization_config=method | {"ignore": ["lm_head"]})
    opened = open_checkpoint(tiny)
    assert {(t.name, t.shape) for t in opened.spec.tensors} == {(t.name, t.shape) for t in dense.tensors}
    assert str(opened.spec.stored) == "int4-g32-sym"
    assert opened.spec.num_params == dense.num_params
    (tiny / "model.safetensors").unlink()
    assert read_spec(tiny).stored == opened.spec.stored


def both_refuse(source: object, match: str) -> None:
    for function in (open_checkpoint, read_spec):
        with pytest.raises(CheckpointError, match=match) as caught:
            function(str(source))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"auto_map": {"AutoModel": "modeling.X"}}, "remote code"),
        ({"architectures": None}, "names no architectures"),
        ({"architectures": []}, "names no architectures"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ],
)
def test_a_config_that_is_refused(tiny: Path, fields: dict[str, Any], match: str) -> None:
    change(tiny, **fields)
    both_refuse(tiny, match)


@pytest.mark.parametrize("text", ["{", "", "[]", "\xff"])
def test_a_config_that_is_no_object(tiny: Path, text: str) -> None:
    (tiny / "config.json").write_bytes(text.encode("latin-1"))
    both_refuse(tiny, r"invalid JSON|JSON list")


def test_directories_that_are_refused(tmp_path: Path, tiny: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    both_refuse(empty, "is empty: give a checkpoint directory")
    (empty / "notes.txt").touch()
    both_refuse(empty, "has no config.json")
    (empty / "m.gguf").touch()
    both_refuse(empty, r"it holds m.gguf: give that file")
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are refused"):
        open_checkpoint(tiny)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.bin", b"PK\x03\x04rest"),
        ("model.bin", b"\x80\x02rest"),
        ("pytorch_model.bin", b"anything"),
        ("model.pt", b""),
        ("model.pth", b"x"),
        ("model.ckpt", b"x"),
    ],
)
def test_pickled_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    both_refuse(tmp_path / name, "pickled weights are refused; convert to safetensors first")


@pytest.mark.parametrize(
    "source", ["no/such/place", "./absent", "absent.gguf", "org/absent.gguf", "absent", "", "a b/c"]
)
def test_a_missing_source_is_named_with_what_is_allowed(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    both_refuse(source, "does not exist: give a checkpoint directory")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    both_refuse(tmp_path / "model.safetensors", "unknown kind")
