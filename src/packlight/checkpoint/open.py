"""Any source a user may name, as an opened checkpoint or as a spec. The door to this room. No torch.

A source is a directory, a hub id (`org/name`), a `.gguf` file, a llama2.c `.bin` file, or `demo`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packlight.checkpoint import gguf_convert, llama2c
from packlight.checkpoint.cache import build_once, cache_root, file_sha256
from packlight.checkpoint.config import classify, spec_from_config, spec_from_tensors
from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.gguf import read_gguf
from packlight.checkpoint.hub import snapshot
from packlight.checkpoint.shards import (
    INDEX_NAME,
    PICKLE_REFUSED,
    PICKLE_SUFFIXES,
    TensorEntry,
    has_weights,
    load_json,
    read_index,
)
from packlight.checkpoint.stored import logical_tensors, stored_precision
from packlight.errors import CheckpointError
from packlight.spec import ModelSpec, TensorSpec

DEMO = "demo"
CONFIG_NAME = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w*$")
"""What transformers calls classes for other tasks: ForMaskedLM, ForSequenceClassification and so on."""
_FILE_SUFFIXES = (".gguf", ".json", ".safetensors", *PICKLE_SUFFIXES)
_ALLOWED = "give a checkpoint directory, a .gguf file, a llama2.c .bin file, a hub id such as org/name, or demo"
# A zip archive, and the first two bytes of pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing of its weights is in memory.

    Args:
        source: what the user named.
        path: the directory that holds it, as transformers reads it.
        config: its `config.json`.
        index: where every stored tensor lies.
        spec: what it is as a model; for a quantized checkpoint, its dense tensors.
    """

    source: str
    path: Path
    config: dict[str, Any]
    index: dict[str, TensorEntry]
    spec: ModelSpec


def short_name(source: str) -> str:
    """A name for cards and recipes that does not depend on where a directory lies."""
    is_path = source.startswith((".", "/", "~")) or Path(source).exists()
    return Path(source).resolve().name if is_path else source


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint with weights: fetched and converted to a directory where need be, headers checked.

    Raises:
        CheckpointError: missing, damaged, pickled, with remote code, or of a kind that is not read.
        TargetError: the cache cannot be written.
    """
    path = resolve(source)
    config = read_config(path / CONFIG_NAME)
    index = read_index(path)
    return Checkpoint(str(source), path, config, index, _spec_from_index(config, index, str(source)))


def resolve(source: str | Path) -> Path:
    """The checkpoint directory of a source. `demo` is the demo model even where a directory has that name.

    Raises:
        CheckpointError: the source is missing, refused or of an unknown kind.
        TargetError: the cache cannot be written.
    """
    place = _locate(source)
    if place is None:
        return snapshot(str(source))
    if place.is_dir():
        _check_directory(place)
        return place
    if place.suffix == ".gguf":
        version = f"gguf{gguf_convert.CONVERTER_VERSION}"
        return _converted(place, (place,), version, gguf_convert.convert_gguf)
    if place.suffix == ".bin":
        llama2c.read_llama2c(place)
        inputs = (place, llama2c.find_tokenizer(place))
        return _converted(place, inputs, f"llama2c{llama2c.CONVERTER_VERSION}", llama2c.convert_llama2c)
    raise CheckpointError(f"{place} is a file of an unknown kind: {_ALLOWED}")


def read_spec(source: str | Path) -> ModelSpec:
    """The spec of a source from its config or its headers, without reading or converting weights.

    Beside what `resolve` takes: a directory with a `config.json` alone, and a path to one. Of a hub repository that
    is not cached, only the config is fetched. A GGUF file's spec is that of its de-quantized conversion.

    Raises:
        CheckpointError: as `open_checkpoint`; and a config alone whose family is not known.
    """
    place, name = _locate(source), str(source)
    if place is None:
        directory = snapshot(name, weights=False)
        return _spec_from_directory(directory, name, _is_whole(directory))
    if place.is_dir():
        if not (place / CONFIG_NAME).is_file():
            _check_directory(place)
        return _spec_from_directory(place, name, has_weights(place))
    if place.suffix == ".json":
        return _spec_from_config(read_config(place), name)
    if place.suffix == ".gguf":
        return _spec_from_gguf(place, name)
    if place.suffix == ".bin":
        return spec_from_config(llama2c.llama2c_config(llama2c.read_llama2c(place)), name)
    raise CheckpointError(f"{place} is a file of an unknown kind: {_ALLOWED}")


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json`, refused where it asks for remote code or names no architecture.

    Raises:
        CheckpointError: unreadable, invalid JSON, `auto_map`, no `architectures`, or one for another task.
    """
    config = load_json(path)
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path} asks for remote code (auto_map), which packlight does not run: "
            f"give a model whose class is in transformers"
        )
    if not config.get("architectures"):
        raise CheckpointError(f"{path} names no architectures: give a causal language model's own config.json")
    names = config["architectures"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path} names the architectures {names!r}: a list of class names is expected")
    if other := next((name for name in names if _OTHER_TASK.search(name)), None):
        raise CheckpointError(f"{path} describes a {other}: give a causal language model")
    return config


def _locate(source: str | Path) -> Path | None:
    """An existing path, or None for a hub id."""
    if str(source) == DEMO:
        return demo_file()
    path = Path(source).expanduser()
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        _refuse_pickle(path)
    if str(source) and path.exists():
        return path
    if _HUB_ID.fullmatch(str(source)) and path.suffix not in _FILE_SUFFIXES:
        return None
    raise CheckpointError(f"{str(source)!r} does not exist: {_ALLOWED}")


def _refuse_pickle(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if path.suffix != ".bin" or path.name == "pytorch_model.bin" or start.startswith(_PICKLE_STARTS):
        raise CheckpointError(f"{path}: {PICKLE_REFUSED}")


def _check_directory(directory: Path) -> None:
    """A directory must hold a config and safetensors; say what is wrong with one that does not."""
    if not any(directory.iterdir()):
        raise CheckpointError(f"{directory} is empty: {_ALLOWED}")
    if not (directory / CONFIG_NAME).is_file():
        found = next((path.name for path in sorted(directory.glob("*.gguf"))), None)
        hint = f"it holds {found}: give that file" if found else _ALLOWED
        raise CheckpointError(f"{directory} has no {CONFIG_NAME}: {hint}")


def _converted(place: Path, inputs: tuple[Path, ...], version: str, convert: Callable[[Path, Path], None]) -> Path:
    # Keyed by what is in the files: a name says nothing, and a new file under an old name must not be missed.
    key = f"{file_sha256(*inputs)[:32]}-{version}"
    return build_once(cache_root() / "converted" / key, lambda directory: convert(place, directory))


def _spec_from_directory(directory: Path, name: str, with_headers: bool) -> ModelSpec:
    config = read_config(directory / CONFIG_NAME)
    if with_headers:
        return _spec_from_index(config, read_index(directory), name)
    return _spec_from_config(config, name)


def _spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    spec = spec_from_config(config, name)
    stored = stored_precision(config, spec.tensors)
    return spec if stored is None else spec_from_tensors(config, name, spec.tensors, stored)


def _spec_from_index(config: Mapping[str, Any], index: Mapping[str, TensorEntry], name: str) -> ModelSpec:
    if config.get("quantization_config") is None:
        tensors = tuple(TensorSpec(e.name, e.shape, e.dtype, classify(e.name, e.shape)) for e in index.values())
        return spec_from_tensors(config, name, tensors)
    tensors = logical_tensors(config, index)
    return spec_from_tensors(config, name, tensors, stored_precision(config, tensors, index))


def _spec_from_gguf(path: Path, name: str) -> ModelSpec:
    header = read_gguf(path)
    config = gguf_convert.gguf_config(header)
    layout = gguf_convert.gguf_layout(gguf_convert.gguf_tensors(header, config))
    return spec_from_tensors(
        config, name, [TensorSpec(n, shape, dtype, classify(n, shape)) for n, dtype, shape in layout]
    )


def _is_whole(directory: Path) -> bool:
    """Whether a hub snapshot holds weights and every shard of its index."""
    if not (directory / INDEX_NAME).is_file():
        return has_weights(directory)
    weight_map = load_json(directory / INDEX_NAME).get("weight_map")
    return isinstance(weight_map, dict) and all((directory / str(shard)).is_file() for shard in weight_map.values())
