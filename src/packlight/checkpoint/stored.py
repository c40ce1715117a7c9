"""What a quantized checkpoint stands for: its dense tensors and the grids that they are stored on. No torch.

Read are the compressed-tensors layout with integer weights alone, and packlight's own; see `packed.py` for their
tensors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from packlight.checkpoint.config import base_fields, classify
from packlight.checkpoint.shards import TensorEntry
from packlight.errors import CheckpointError, UsageError
from packlight.spec import FLOAT_DTYPES, Grid, Precision, Sparsity, TensorSpec

SCALES = (".weight_scale", ".weight_scale_packed")
"""How the name of a quantized matrix's scales ends; every quantized matrix has one of them."""
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
"""Values of `quantization_config.format` that are read."""

OWN_METHOD = "packlight"
OWN_VERSION = 1
"""`quant_method` and `version` of packlight's own layout."""

MASK = ".weight_mask"
"""How the name of a pruned matrix's bitmask ends, where its zeros are left out of the file."""
BITMASK = "bitmask"
"""`format` in packlight's own `quantization_config` of such a checkpoint."""

_PARTS = (
    "weight_values",
    "weight_packed",
    "weight_scale",
    "weight_scale_packed",
    "weight_scale_unit",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
_CLASSES: Mapping[str, tuple[str, ...]] = {"Linear": ("linear", "expert", "head"), "Embedding": ("embedding",)}


def logical_tensors(config: Mapping[str, Any], index: Mapping[str, TensorEntry]) -> tuple[TensorSpec, ...]:
    """The dense tensors that a checkpoint's files stand for, in the order of the index.

    A quantized or pruned matrix has the shape in its `weight_shape`, else that of its `weight`, and the config's dtype.

    Raises:
        CheckpointError: a quantized matrix without a shape, or a `weight_shape` that is not two sizes.
    """
    scaled = {name.rpartition(".")[0] for name in index if name.endswith((*SCALES, MASK))}
    tensors = []
    for name, entry in index.items():
        base, _, part = name.rpartition(".")
        if base not in scaled:
            tensors.append(TensorSpec(name, entry.shape, entry.dtype, classify(name, entry.shape)))
        elif part in ("weight", "weight_packed", "weight_mask"):
            shape = _dense_shape(index, base)
            weight = f"{base}.weight"
            tensors.append(TensorSpec(weight, shape, base_fields(config).dtype, classify(weight, shape)))
        elif part not in _PARTS:
            tensors.append(TensorSpec(name, entry.shape, entry.dtype, classify(name, entry.shape)))
    return tuple(tensors)


def stored_precision(
    config: Mapping[str, Any], tensors: Sequence[TensorSpec], index: Mapping[str, TensorEntry] | None = None
) -> Precision | None:
    """The precision that a config says its weights are stored in; None for a dense checkpoint.

    Args:
        config: with or without a `quantization_config`.
        tensors: the dense tensors.
        index: the stored tensors, which tell what is quantized; without it, the config's targets do.

    Raises:
        CheckpointError: another quantization method, format or strategy than packlight reads, or a group that divides
            no row of a tensor.
    """
    found = _said_precision(config, tensors, index)
    if found is None:
        return None
    for tensor in tensors:
        grid = found.grid_of(tensor)
        if grid is not None and not grid.fits(tensor.shape[-1]):
            raise CheckpointError(
                f"the config's quantization_config puts {tensor.name}, whose rows have {tensor.shape[-1]} columns, on "
                f"{grid}, whose group does not divide them; give the model's own config.json"
            )
    return found


def _said_precision(
    config: Mapping[str, Any], tensors: Sequence[TensorSpec], index: Mapping[str, TensorEntry] | None
) -> Precision | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == OWN_METHOD:
        return _own_precision(quantization, _float_dtype(config))
    groups = _groups(quantization)
    ignore = quantization.get("ignore") or []
    grids = {}
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        if _is_scaled(index, module) if index is not None else not _is_named(ignore, module):
            grids[tensor.name] = _grid_of(groups, module, tensor.kind)
    return Precision.of(_float_dtype(config), grids, tensors)


def _own_precision(quantization: Mapping[str, Any], dtype: str) -> Precision:
    """Raises CheckpointError for a version or a grid that this packlight does not know."""
    if quantization.get("format") == BITMASK and quantization.get("version") == OWN_VERSION:
        return Precision(dtype, sparse=_sparsity(quantization))
    version, tensors = quantization.get("version"), quantization.get("tensors")
    if version != OWN_VERSION or not isinstance(tensors, Mapping):
        raise CheckpointError(
            f"the checkpoint has packlight's layout in version {version!r}, and this packlight reads {OWN_VERSION}: "
            "it was made by another release, or its config.json is damaged"
        )
    linear, embedding = _parsed(quantization.get("linear")), _parsed(quantization.get("embedding"))
    single = tuple(sorted((str(name), _parsed(text)) for name, text in tensors.items()))
    return Precision(dtype, linear, embedding, single)


def _sparsity(quantization: Mapping[str, Any]) -> Sparsity:
    zeros = quantization.get("zeros") or {}
    if not isinstance(zeros, Mapping) or not all(isinstance(count, int) for count in zeros.values()):
        raise CheckpointError(f"the config's quantization_config counts zeros as {zeros!r}; an object is expected")
    counts = tuple(sorted((str(name), count) for name, count in zeros.items()))
    try:
        return Sparsity(quantization.get("share"), str(quantization.get("scope")), counts)  # type: ignore[arg-type]
    except UsageError as error:
        raise CheckpointError(f"the config's quantization_config is damaged: {error}") from error


def _parsed(text: Any) -> Grid | None:
    if text is None:
        return None
    try:
        return Grid.parse(str(text))
    except UsageError as error:
        raise CheckpointError(f"the config's quantization_config is damaged: {error}") from error


def _dense_shape(index: Mapping[str, TensorEntry], base: str) -> tuple[int, ...]:
    weight = index.get(f"{base}.weight")
    if weight is not None:
        return weight.shape
    entry = index.get(f"{base}.weight_shape")
    form = {"int64": "<2q", "int32": "<2i"}.get(entry.dtype) if entry is not None else None
    if entry is None or form is None or entry.nbytes != struct.calcsize(form):
        raise CheckpointError(f"{base} is stored packed without a weight_shape of two integers; compress it again")
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        rows, cols = struct.unpack(form, stream.read(entry.nbytes))
    if rows < 1 or cols < 1:
        raise CheckpointError(f"{base} has the weight_shape ({rows}, {cols}); two positive sizes are expected")
    return rows, cols


def _groups(quantization: Any) -> list[tuple[list[str], Grid]]:
    """(targets, grid) of every group of a `quantization_config`."""
    if not isinstance(quantization, Mapping):
        raise CheckpointError("the config's quantization_config is not an object; give the model's own config.json")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise CheckpointError(
            f"the checkpoint is quantized by {method!r}; packlight reads compressed-tensors with integer weights "
            f"({', '.join(FORMATS)}): give that or the original"
        )
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("the config's quantization_config has no config_groups; give the model's own config.json")
    return [_group(group, quantization.get("format")) for group in groups.values()]


def _group(group: Any, default_format: Any) -> tuple[list[str], Grid]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise CheckpointError("a group of the config's quantization_config lacks weights or targets")
    layout = group.get("format") or default_format
    if layout not in FORMATS or weights.get("type", "int") != "int":
        raise CheckpointError(
            f"the checkpoint's weights are stored as {layout!r} of type {weights.get('type')!r}; packlight reads "
            f"integers in {', '.join(FORMATS)}: give that or the original"
        )
    if group.get("input_activations") is not None:
        raise CheckpointError("the checkpoint quantizes activations too; packlight reads weight-only quantization")
    return [str(target) for target in targets], _grid(weights)


def _grid(weights: Mapping[str, Any]) -> Grid:
    strategy, size, bits = weights.get("strategy"), weights.get("group_size"), weights.get("num_bits")
    if strategy not in ("channel", "group") or not isinstance(bits, int):
        raise CheckpointError(
            f"the checkpoint's weights have the strategy {strategy!r} and {bits!r} bits; packlight reads 2 to 8 bits "
            f"by channel or group"
        )
    if strategy == "group" and not isinstance(size, int):
        raise CheckpointError(f"the config's quantization_config has the group size {size!r}; a number is expected")
    return Grid(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def _grid_of(grids: list[tuple[list[str], Grid]], module: str, kind: str) -> Grid | None:
    """A group that names the module goes before one that names its class, as in compressed-tensors."""
    named = next((grid for targets, grid in grids if _is_named(targets, module)), None)
    if named is not None:
        return named
    classes = [name for name, kinds in _CLASSES.items() if kind in kinds]
    return next((grid for targets, grid in grids if set(classes) & set(targets)), None)


def _is_named(targets: Iterable[str], module: str) -> bool:
    for target in targets:
        if target == module:
            return True
        if target.startswith("re:") and _matches(target[3:], module):
            return True
    return False


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(f"the config's target {pattern!r} is not a regular expression: {error}") from error


def _is_scaled(index: Mapping[str, TensorEntry], module: str) -> bool:
    return any(f"{module}{end}" in index for end in SCALES)


def _float_dtype(config: Mapping[str, Any]) -> str:
    dtype = base_fields(config).dtype
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"the config's dtype is {dtype}; packlight computes in {', '.join(FLOAT_DTYPES)}")
    return dtype
