"""GGUF files as headers: metadata and tensor infos, every read checked against the file before it is made.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. No torch.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from packlight.checkpoint.ggml import GGML_TYPES, GgmlType
from packlight.errors import CheckpointError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "an array"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. `shape` is outermost first, as in torch (GGUF stores it reversed); `offset` is absolute."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel // self.type.block_elements * self.type.block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights. Arrays of strings are lists, arrays of numbers numpy arrays."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", str))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value of the Python type `kind`; `default` where absent.

        Raises:
            CheckpointError: another type, or absent without a default.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path} lacks the metadata key {key}; convert the model to GGUF again")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind and not (kind is list and isinstance(value, np.ndarray)):
            raise CheckpointError(f"{self.path} gives {key} the value {str(value)[:40]!r}; {_NAMES[kind]} is expected")
        return value

    def read(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """The stored bytes of a tensor, uint8 of shape (nbytes,), in memory of their own."""
        try:
            data = np.fromfile(self.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}; check the path") from error
        if data.size != tensor.nbytes:
            raise CheckpointError(f"{self.path} became shorter while it was read; download it again")
        return data


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        CheckpointError: not a GGUF file, an unknown version or type, or any length, count, offset or alignment
            that does not fit the file.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
            if start != _MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it starts with {start!r} in place of b'GGUF'")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


class _Reader:
    """A position in a mapped file. Every method checks that what it reads lies inside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 4

    def header(self) -> GgufHeader:
        version = self._version()
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        # The smallest tensor info is 24 bytes and the smallest metadata pair 13: a count beyond that is a lie.
        self._need(num_tensors, 24, "tensors")
        self._need(num_values, 13, "metadata values")
        metadata = self._collect(num_values, self._pair, "metadata key")
        infos = self._collect(num_tensors, self._info, "tensor")
        start = self._data_start(metadata)
        tensors = {name: self._place(name, start, *info) for name, info in infos.items()}
        self._check_overlap(list(tensors.values()))
        return GgufHeader(self.path, version, metadata, tensors)

    def _version(self) -> int:
        version = int(self._scalar("<I"))
        if version in (2, 3):
            return version
        if version in (2 << 24, 3 << 24):
            raise CheckpointError(f"{self.path} is a big-endian GGUF file; packlight reads little-endian ones")
        raise CheckpointError(f"{self.path} has GGUF version {version}; packlight reads versions 2 and 3")

    def _collect(self, count: int, read: Callable[[], tuple[str, Any]], what: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name, value = read()
            if name in found:
                raise CheckpointError(f"{self.path} holds the {what} {name!r} twice; convert the model to GGUF again")
            found[name] = value
        return found

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        kind = self._scalar("<I")
        return key, self._array(key) if kind == _ARRAY else self._value(key, kind)

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} gives {key} the unknown value type {kind}; types 0 to 12 exist")
        return self._scalar(_SCALARS[kind])

    def _array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            self._need(count, 8, f"strings in {key}")
            return self._strings(count)
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path} gives {key} an array of type {kind}; arrays of numbers or strings exist"
            )
        dtype = np.dtype(_SCALARS[kind])
        self._need(count, dtype.itemsize, f"values in {key}")
        values = np.frombuffer(self.data[self.at : self.at + count * dtype.itemsize], dtype)
        self.at += count * dtype.itemsize
        return values

    def _strings(self, count: int) -> list[str]:
        # The hot loop: a vocabulary is hundreds of thousands of strings, so one slice and one decode for each.
        data, size, at = self.data, self.size, self.at
        strings = []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            if at > size:
                raise self._truncated(at)
            strings.append(data[begin:at])
        self.at = at
        return [self._text(raw) for raw in strings]

    def _info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._string()
        num_dims = self._scalar("<I")
        if num_dims > _MAX_DIMS:
            raise CheckpointError(f"{self.path} gives {name} {num_dims} dimensions; at most {_MAX_DIMS} are allowed")
        dims = tuple(self._scalar("<Q") for _ in range(num_dims))
        return name, (dims[::-1], self._scalar("<I"), self._scalar("<Q"))

    def _place(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in GGML_TYPES:
            raise CheckpointError(f"{self.path} stores {name} in the unknown ggml type {kind}; use a newer packlight")
        if shape and shape[-1] % GGML_TYPES[kind].block_elements:
            raise CheckpointError(
                f"{self.path} gives {name} rows of {shape[-1]} values, which {GGML_TYPES[kind].name} cannot hold: "
                f"its blocks are {GGML_TYPES[kind].block_elements} wide"
            )
        tensor = GgufTensor(name, shape, GGML_TYPES[kind], start + offset)
        if tensor.offset + tensor.nbytes > self.size:
            raise self._truncated(tensor.offset + tensor.nbytes)
        return tensor

    def _data_start(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > self.size:
            raise CheckpointError(f"{self.path} has the alignment {alignment!r}; a small power of two is expected")
        return -(-self.at // alignment) * alignment

    def _check_overlap(self, tensors: list[GgufTensor]) -> None:
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        for first, second in pairwise(tensors):
            if first.offset + first.nbytes > second.offset:
                raise CheckpointError(f"{self.path} places {second.name} inside {first.name}; convert it again")

    def _scalar(self, form: str) -> Any:
        end = self.at + struct.calcsize(form)
        if end > self.size:
            raise self._truncated(end)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        self._need(length, 1, "characters")
        self.at += length
        return self._text(self.data[self.at - length : self.at])

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} holds a string that is not UTF-8: {raw[:20]!r}") from error

    def _need(self, count: int, each: int, what: str) -> None:
        if count * each > self.size - self.at:
            raise CheckpointError(
                f"{self.path} claims {count} {what} with {self.size - self.at} bytes left in the file: "
                f"it is truncated or damaged; download it again"
            )

    def _truncated(self, needed: int) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated: needs {needed} bytes, has {self.size}; download it again")
