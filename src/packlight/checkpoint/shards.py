"""Safetensors files as headers: what is stored where, without reading a weight; and a writer that streams.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). No torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from packlight.errors import CheckpointError, TargetError
from packlight.plan.layout import MAX_SHARD_BYTES, split_shards
from packlight.spec import DTYPE_BYTES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REFUSED = "pickled weights are refused; convert to safetensors first"

Layout = Sequence[tuple[str, str, tuple[int, ...]]]
"""(name, dtype, shape) of every tensor, in the order in which they are to be stored."""

# safetensors' own readers refuse longer headers; a hostile length must not make us read gigabytes of JSON.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from absolute `offset` in `file`. `dtype` is a torch name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_index(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory by name, from the headers alone.

    Reads `model.safetensors`, or the shards of `model.safetensors.index.json`, or a lone file of another name.

    Raises:
        CheckpointError: no weights, only pickled ones, a missing or truncated shard, or a header that does not
            describe its file exactly.
    """
    directory = Path(directory)
    if (directory / SINGLE_NAME).is_file():
        return read_header(directory / SINGLE_NAME)
    if (directory / INDEX_NAME).is_file():
        return _read_sharded(directory)
    return read_header(_lone_file(directory))


def has_weights(directory: Path) -> bool:
    """Whether a directory holds any safetensors file or an index of some."""
    return (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, in the order of its bytes.

    Raises:
        CheckpointError: the header and the file do not agree byte for byte.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = _header_length(path, stream, size)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    fields = _parse_object(path, raw)
    fields.pop("__metadata__", None)
    start = 8 + length
    entries = [_entry(path, name, value, start) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_contiguous(path, entries, start, size)
    return {entry.name: entry for entry in entries}


def write_shards(
    directory: Path,
    layout: Layout,
    read: Callable[[str], Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors one at a time as transformers reads them; the same input gives the same bytes.

    Args:
        directory: must exist; files are written in place, so give a directory that is renamed afterwards.
        layout: names, dtypes and shapes, known before any weight is read.
        read: gives the little-endian bytes of a named tensor, as anything with the buffer protocol. It is
            called once per tensor; one tensor is held at a time.
        max_shard_bytes: a shard is closed before it would grow past this; a larger tensor has its own shard.

    Returns:
        The weight files, in order.

    Raises:
        TargetError: the disk is full or the directory cannot be written.
    """
    sizes = [_nbytes(dtype, shape) for _, dtype, shape in layout]
    shards = [[layout[place] for place in shard] for shard in split_shards(sizes, max_shard_bytes)]
    names = _shard_names(len(shards))
    weight_map: dict[str, str] = {}
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_file(directory / name, shard, read)
            weight_map.update({tensor: name for tensor, _, _ in shard})
        if len(names) > 1:
            total = sum(_nbytes(dtype, shape) for _, dtype, shape in layout)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TargetError(
            f"{directory} cannot be written: {error.strerror}; free space on its disk or choose another place"
        ) from error
    return [directory / name for name in names]


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises CheckpointError where it is not one."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    return _parse_object(path, raw)


def _read_sharded(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_NAME
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to shards; download the checkpoint again")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        # A shard name with a folder in it could reach outside the checkpoint.
        if Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; a shard must lie beside its index")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory} lacks the shard {shard}, which {INDEX_NAME} names; download it again")
        shards[shard] = read_header(directory / shard)
    entries = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{directory / shard} lacks the tensor {name} that {INDEX_NAME} places in it")
        entries[name] = shards[shard][name]
    return entries


def _lone_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a checkpoint directory")
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} safetensors files and no {INDEX_NAME}; add the index or keep one file"
        )
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(f"{directory} holds only {pickled[0]}: {PICKLE_REFUSED}")
    raise CheckpointError(f"{directory} holds no *.safetensors; give a directory with safetensors weights")


def _header_length(path: Path, stream: IO[bytes], size: int) -> int:
    if size < 8:
        raise CheckpointError(f"{path} is truncated: needs at least 8 bytes, has {size}; download it again")
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes; at most {_MAX_HEADER_BYTES} are allowed, "
            f"so this is not a safetensors file or it is damaged"
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: needs {8 + length} bytes for its header, has {size}")
    return int(length)


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    # Nesting deeper than the interpreter's stack is the one way for well-formed JSON to fail here.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds invalid JSON ({error}); download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__} where an object is expected")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) != len(pairs):
        raise ValueError("a key occurs twice")
    return merged


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} describes the tensor {name} by {value!r}; an object is expected")
    code, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{path} stores {name} as {code!r}; packlight reads {', '.join(_DTYPES)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{path} gives {name} the shape {shape!r}; a list of sizes of 0 or more is expected")
    if not _is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise CheckpointError(f"{path} gives {name} the offsets {span!r}; two rising positions are expected")
    expected, nbytes = _nbytes(_DTYPES[code], tuple(shape)), span[1] - span[0]
    if expected != nbytes:
        raise CheckpointError(f"{path} gives {name} {nbytes} bytes, but {code} of shape {shape} needs {expected}")
    return TensorEntry(name, _DTYPES[code], tuple(shape), path, start + span[0], nbytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    end = start
    for entry in entries:
        if entry.offset != end:
            raise CheckpointError(
                f"{path} places {entry.name} at byte {entry.offset}, but the tensor before it ends at {end}: "
                f"tensors must follow each other without gap or overlap"
            )
        end += entry.nbytes
    if size < end:
        raise CheckpointError(f"{path} is truncated: needs {end} bytes, has {size}; download it again")
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, but its header describes {end}; download it again")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_file(path: Path, shard: Layout, read: Callable[[str], Any]) -> None:
    # Widest dtype first, so that every tensor starts at a multiple of its item size: readers view, not copy.
    ordered = sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor[1]])
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        begin, end = end, end + _nbytes(dtype, shape)
        fields[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name, dtype, shape in ordered:
            data = memoryview(read(name))
            if data.nbytes != _nbytes(dtype, shape):
                raise ValueError(f"{name}: {data.nbytes} bytes given, {dtype} of shape {shape} expected")
            stream.write(data)
