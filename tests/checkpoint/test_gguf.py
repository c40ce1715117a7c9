"""GGUF headers are read exactly, and no file makes the reader crash or allocate."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.checkpoint.gguf_bytes import STRING, gguf, model, text

from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.gguf import read_gguf
from packlight.checkpoint.gguf_convert import convert_gguf
from packlight.errors import CheckpointError

SMALL: dict[str, Any] = {
    "general.architecture": "llama",
    "n": 7,
    "f": 0.5,
    "t": True,
    "words": ["a", "é"],
    "i": [1, -2],
}
TENSOR = ("x.weight", (2, 4), 0, np.arange(8, dtype="<f4").tobytes())


def saved(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read(tmp_path: Path, version: int) -> None:
    header = read_gguf(saved(tmp_path, gguf(SMALL, [TENSOR], version)))
    assert (header.version, header.architecture) == (version, "llama")
    assert header.metadata["n"] == 7 and header.metadata["f"] == 0.5 and header.metadata["t"] is True
    assert header.metadata["words"] == ["a", "é"] and header.metadata["i"].tolist() == [1, -2]
    tensor = header.tensors["x.weight"]
    assert (tensor.shape, tensor.numel, tensor.nbytes) == ((2, 4), 8, 32)
    assert header.read(tensor).tobytes() == TENSOR[3]


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path, gguf(*model()))
    header, theirs = read_gguf(path), GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors] or set(header.tensors) == {
        tensor.name for tensor in theirs.tensors
    }
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(int(size) for size in tensor.shape[::-1])


def test_a_wanted_value_of_another_type_or_absent_is_an_error(tmp_path: Path) -> None:
    header = read_gguf(saved(tmp_path, gguf(SMALL, [])))
    assert header.get("n", float) == 7.0 and header.get("absent", int, 3) == 3
    with pytest.raises(CheckpointError, match="lacks the metadata key absent"):
        header.get("absent", int)
    for key, kind in (("t", int), ("n", str), ("f", bool), ("words", str)):
        with pytest.raises(CheckpointError, match="is expected"):
            header.get(key, kind)


@pytest.mark.parametrize("part", range(10))
def test_truncation_anywhere_is_refused(tmp_path: Path, part: int) -> None:
    whole = gguf(*model())
    with pytest.raises(CheckpointError, match=r"truncated|not a GGUF file"):
        read_gguf(saved(tmp_path, whole[: len(whole) * part // 10]))


def head(tensors: int, values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def info(dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text("x") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**64 - 1
LIES = {
    "magic": (b"GGML" + b"\0" * 60, "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version 1": (head(0, 0, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (head(HUGE, 0), "claims 18446744073709551615 tensors"),
    "value count": (head(0, 2**60), "metadata values"),
    "key length": (head(0, 1, struct.pack("<Q", HUGE) + b"k" * 40), "claims .* characters"),
    "value type": (head(0, 1, text("k") + struct.pack("<II", 99, 0)), "unknown value type 99"),
    "array count": (head(0, 1, text("k") + struct.pack("<IIQ", 9, 4, HUGE)), "values in k"),
    "string count": (head(0, 1, text("k") + struct.pack("<IIQ", 9, STRING, 2**61)), "strings in k"),
    "string length": (head(0, 1, text("k") + struct.pack("<IIQQ", 9, STRING, 1, HUGE)), "truncated"),
    "nested array": (head(0, 1, text("k") + struct.pack("<IIQQ", 9, 9, 1, 0)), "array of type 9"),
    "not utf-8": (head(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 0)), "not UTF-8"),
    "twice a key": (head(0, 2, (text("k") + struct.pack("<II", 4, 0)) * 2), "'k' twice"),
    "twice a tensor": (head(2, 0, info((1,)) * 2 + b"\0" * 64), "'x' twice"),
    "dimensions": (head(1, 0, info((1,) * 5) + b"\0" * 64), "5 dimensions"),
    "overflow": (head(1, 0, info((2**62, 2**62)) + b"\0" * 64), "truncated: needs"),
    "offset": (head(1, 0, info((1,), offset=2**63) + b"\0" * 64), "truncated: needs"),
    "ggml type": (head(1, 0, info((1,), kind=77) + b"\0" * 64), "unknown ggml type 77"),
    "row width": (head(1, 0, info((31, 2), kind=2) + b"\0" * 64), "rows of 31 values"),
    "alignment": (gguf({"general.alignment": 3}, []), "alignment 3"),
    "alignment 0": (gguf({"general.alignment": 0}, []), "alignment 0"),
    "alignment huge": (gguf({"general.alignment": 2**31}, []), "alignment"),
    "alignment text": (gguf({"general.alignment": "x"}, []), "alignment 'x'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_without_allocating(tmp_path: Path, lie: str) -> None:
    data, match = LIES[lie]
    path = saved(tmp_path, data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=match) as caught:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert "\n" not in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    infos = text("x") + struct.pack("<IQIQ", 1, 16, 0, 0) + text("y") + struct.pack("<IQIQ", 1, 16, 0, 32)
    with pytest.raises(CheckpointError, match="places y inside x"):
        read_gguf(saved(tmp_path, head(2, 0, infos + b"\0" * 200)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_end_in_success_or_in_a_sentence(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(gguf(*model()))
    start = len(whole) - sum(len(raw) for *_, raw in model()[1])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, start))] = data.draw(st.integers(0, 255))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    try:
        convert_gguf(saved(tmp_path, bytes(whole)), out)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.demo
def test_the_demo_header_is_read_in_under_half_a_second() -> None:
    path = demo_file()
    start = time.perf_counter()
    header = read_gguf(path)
    assert time.perf_counter() - start < 0.5
    assert len(header.tensors) == 272 and len(header.metadata["tokenizer.ggml.tokens"]) == 49152
