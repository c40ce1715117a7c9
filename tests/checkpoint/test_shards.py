"""Safetensors headers are read exactly, wrong ones refused in a sentence, and what is written others read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from packlight.checkpoint.shards import INDEX_NAME, SINGLE_NAME, read_header, read_index, write_shards
from packlight.errors import CheckpointError, TargetError

LAYOUT = [
    ("b.int", "int8", (3,)),
    ("a.weight", "float32", (4, 5)),
    ("c.half", "bfloat16", (2, 3, 4)),
    ("d.scalar", "int64", ()),
    ("e.empty", "float16", (0, 7)),
]
ITEM = {"int8": 1, "float32": 4, "bfloat16": 2, "int64": 8, "float16": 2}


def content(name: str) -> bytes:
    _, dtype, shape = next(tensor for tensor in LAYOUT if tensor[0] == name)
    size = int(np.prod(shape)) * ITEM[dtype]
    return bytes((len(name) + index) % 60 for index in range(size))


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60, 1])
def test_written_shards_read_back_here_and_in_safetensors(tmp_path: Path, max_shard_bytes: int) -> None:
    files = write_shards(tmp_path, LAYOUT, content, max_shard_bytes)
    index = read_index(tmp_path)
    assert set(index) == {name for name, _, _ in LAYOUT}
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, dtype, shape in LAYOUT:
        entry = index[name]
        assert (entry.dtype, entry.shape) == (dtype, shape)
        assert entry.file.read_bytes()[entry.offset :][: entry.nbytes] == content(name)
        assert theirs[name].dtype == getattr(torch, dtype) and tuple(theirs[name].shape) == shape
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == content(name)


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    files = write_shards(tmp_path, LAYOUT, content, 81)
    assert [file.name for file in files] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(len(content(name)) for name, _, _ in LAYOUT)
    assert index["weight_map"]["a.weight"] == files[1].name


def test_the_same_input_gives_the_same_aligned_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (file,) = write_shards(tmp_path / name, LAYOUT, content)
        written.append(file.read_bytes())
    assert written[0] == written[1]
    assert all(entry.offset % ITEM[entry.dtype] == 0 for entry in read_index(tmp_path / "one").values())


def test_one_tensor_is_read_at_a_time_and_each_once(tmp_path: Path) -> None:
    asked: list[str] = []
    write_shards(tmp_path, LAYOUT, lambda name: asked.append(name) or content(name))  # type: ignore[func-returns-value]
    assert sorted(asked) == sorted(name for name, _, _ in LAYOUT)


def test_transformers_own_shards_are_read(tmp_path: Path, tiny_model_dir: Any) -> None:
    index = read_index(tiny_model_dir())
    assert index["model.embed_tokens.weight"].shape == (256, 64)
    assert index["model.embed_tokens.weight"].dtype == "float32"


def test_a_lone_file_of_any_name_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert read_index(tmp_path)["x"].numel == 2


@pytest.mark.parametrize("part", range(10))
def test_a_truncated_file_is_refused_with_its_sizes(tmp_path: Path, part: int) -> None:
    (file,) = write_shards(tmp_path, LAYOUT, content)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * part // 10])
    with pytest.raises(CheckpointError, match=r"truncated: needs .*\d+ bytes.* has \d+"):
        read_index(tmp_path)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (entry("F12"), "as 'F12'; packlight reads"),
        (entry(["F32"]), "packlight reads"),
        (entry(shape=[-1]), "the shape \\[-1\\]"),
        (entry(shape=[True]), "the shape"),
        (entry(shape=[1.0]), "the shape"),
        (entry(shape=3), "the shape 3"),
        (entry(shape=[2]), "4 bytes, but F32 of shape \\[2\\] needs 8"),
        (entry(shape=[2**62, 2**62]), "needs"),
        (entry(offsets=[4, 0]), "two rising positions"),
        (entry(offsets=[0]), "two rising positions"),
        (entry(offsets=None), "two rising positions"),
        (entry(offsets=[4, 8]), "without gap or overlap"),
        (entry() | {"y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "without gap or overlap"),
        (entry() | {"y": 3}, "by 3; an object is expected"),
        ({}, "has .* bytes, but its header describes"),
        ([], "JSON list where an object"),
        (b"{", "invalid JSON"),
        (b"\xff\xff", "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"x":1,"x":2}', "a key occurs twice"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, match: str) -> None:
    file = raw_file(tmp_path / SINGLE_NAME, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [2**64 - 1, 2**62, 100_000_001])
def test_a_hostile_header_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="claims a header"):
        read_header(raw_file(tmp_path / SINGLE_NAME, b"{}", length=length))


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    (file,) = write_shards(tmp_path, LAYOUT, content)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="its header describes"):
        read_index(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = write_shards(tmp_path, LAYOUT, content, 60)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {files[1].name}"):
        read_index(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=r"must lie beside|lacks the shard"):
        read_index(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    files = write_shards(tmp_path, LAYOUT, content, 60)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = files[0].name
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the tensor ghost"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_alone_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=f"{name}: pickled weights are refused; convert to safetensors first"):
        read_index(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        read_index(tmp_path)


def test_an_unwritable_directory_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be written"):
        write_shards(tmp_path / "absent", LAYOUT, content)


def test_wrong_byte_counts_are_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        write_shards(tmp_path, LAYOUT, lambda name: b"1234567")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_crash_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    (file,) = write_shards(tmp_path, LAYOUT, content)
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole)
    try:
        read_index(tmp_path)
    except CheckpointError as error:
        assert "\n" not in str(error)
