"""Tensors from a checkpoint's files into memory, one at a time. The only module of this room that imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from packlight.checkpoint.shards import TensorEntry
from packlight.errors import CheckpointError

_CHUNK_ELEMENTS = 1 << 22


def read_tensor(entry: TensorEntry, device: torch.device | str = "cpu") -> torch.Tensor:
    """One tensor, shape `entry.shape`, in memory of its own.

    The bytes are read, not mapped: resident memory grows by `entry.nbytes` and by nothing else.

    Raises:
        CheckpointError: the file went away or shrank after its header was read.
    """
    flat = torch.empty(entry.numel, dtype=torch_dtype(entry.dtype))
    _read_into(flat, entry, 0)
    return flat.reshape(entry.shape).to(device)


def has_nan(entry: TensorEntry) -> bool:
    """Whether a float tensor holds a NaN or an infinity; reads it in chunks of 4 Mi elements."""
    dtype = torch_dtype(entry.dtype)
    if not dtype.is_floating_point:
        return False
    chunk = torch.empty(min(entry.numel, _CHUNK_ELEMENTS), dtype=dtype)
    for start in range(0, entry.numel, _CHUNK_ELEMENTS):
        part = chunk[: min(_CHUNK_ELEMENTS, entry.numel - start)]
        _read_into(part, entry, start)
        # isfinite has no float8 kernel; float32 holds every float8 value.
        wide = part.float() if dtype.itemsize == 1 else part
        if not bool(torch.isfinite(wide).all()):
            return True
    return False


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in `spec.DTYPE_BYTES`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_architecture(config: Mapping[str, Any]) -> None:
    """Check that transformers has a causal language model class for a config.

    Raises:
        CheckpointError: its `model_type` is unknown to the installed transformers, or has no causal LM class.
    """
    # modeling_auto imports torch, so this check lives here and not beside the config.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"the model type {model_type!r} has no causal language model class in the installed transformers; "
            f"give a causal language model such as llama, mistral or qwen2, or upgrade transformers"
        )


def _read_into(flat: torch.Tensor, entry: TensorEntry, start: int) -> None:
    """Fill a 1-D contiguous tensor with the elements of `entry` from `start` on."""
    if flat.numel() == 0:
        return
    target = flat.view(torch.uint8).numpy().data
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + start * flat.element_size())
            filled = 0
            while filled < target.nbytes:
                count = stream.readinto(target[filled:])
                if not count:
                    raise CheckpointError(f"{entry.file} became shorter while it was read; download it again")
                filled += count
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error.strerror}; check the path") from error
