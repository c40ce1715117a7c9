"""bitsandbytes' loaders: a dense checkpoint whose matrices are quantized while it is loaded; nothing is saved.

`bnb-int8` is LLM.int8() (arXiv 2208.07339): a scale for each row of weights and each token, and input columns that
hold a number above 6 are multiplied apart, in the dtype of the inputs. `bnb-nf4` is NF4 (QLoRA, arXiv 2305.14314,
section 3): every 64 weights share a float32, their largest magnitude, and each is the nearest of 16 quantiles of a
normal distribution. One limit: the matrices of the blocks are quantized and nothing else, neither embedding and head
nor experts that are fused into one tensor.

A loader is named behind the model, as in `demo@bnb-nf4`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_accelerate_available, is_bitsandbytes_available

from packlight.checkpoint.open import Checkpoint
from packlight.errors import CheckpointError, MissingExtraError, UsageError
from packlight.runtime.allocator import weights_apart
from packlight.runtime.load import (
    check_shape,
    empty_model,
    load_model,
    load_through_transformers,
    straighten_head_input_,
)
from packlight.runtime.tokenizer import quiet
from packlight.spec import FLOAT_DTYPES

_PACKED_ROWS = 32
"""Rows that bitsandbytes' kernel for bfloat16 on AVX-512 takes at once."""


def check_loader(checkpoint: Checkpoint, loader: str | None) -> None:
    """What can be said before a weight is read.

    Raises:
        MissingExtraError: bitsandbytes, or accelerate with which transformers loads it, is absent.
        UsageError: it is older than transformers asks for.
        CheckpointError: the checkpoint is quantized already.
    """
    if loader is None:
        return
    if checkpoint.spec.stored is not None:
        raise CheckpointError(
            f"{checkpoint.source} is already quantized ({checkpoint.spec.stored}): {loader} starts from the original"
        )
    for package, is_available in (
        ("bitsandbytes", is_bitsandbytes_available),
        ("accelerate", is_accelerate_available),
    ):
        if find_spec(package) is None:
            raise MissingExtraError(package, "bnb", f"loading with {loader}")
        if not is_available():
            raise UsageError(
                f"the installed {package} {version(package)} is older than transformers needs for {loader}: "
                f"pip install --upgrade {package}"
            )


def load_with(
    checkpoint: Checkpoint, loader: str | None, dtype: str | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """The whole model on one device, in evaluation mode; without a loader, as `load_model` does it.

    Args:
        dtype: of the tensors that are left alone, and of the computation; default: as stored.

    Raises:
        CheckpointError: the checkpoint is quantized already, or tensors are missing or have the wrong shape.
        MissingExtraError: bitsandbytes is absent.
    """
    if loader is None:
        return load_model(checkpoint, dtype, device)
    check_loader(checkpoint, loader)
    dtype = dtype or (checkpoint.spec.dtype if checkpoint.spec.dtype in FLOAT_DTYPES else "float32")
    for name, tensor in empty_model(checkpoint, dtype).state_dict(keep_vars=True).items():
        if name in checkpoint.index:
            check_shape(checkpoint, name, checkpoint.index[name].shape, tensor)
    with weights_apart():
        model = load_through_transformers(checkpoint, dtype, **_options(loader, dtype, device))
    return _ready(model)


def quantized(model: PreTrainedModel, loader: str) -> PreTrainedModel:
    """A small model in memory as the loader would have loaded it."""
    dtype = str(model.dtype).removeprefix("torch.")
    with quiet():
        made: PreTrainedModel = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            dtype=model.dtype,
            **_options(loader, dtype),
        )
    return _ready(made)


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model that a loader has just loaded: codes, scales, tables, and what is left alone.

    NOTE only before its first token: bitsandbytes then moves scales elsewhere, or packs them for the processor at hand.
    """
    tensors = [part for parameter in model.parameters() for part in (parameter, *_scales(parameter))]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())  # a tied matrix counts once


def loader_config(loader: str, dtype: str) -> BitsAndBytesConfig:
    """What a loader is in transformers' words; `dtype` is that of the computation."""
    # It says on every call that it casts inputs, and on import that a faster kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if loader == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The default is to compute in float32, whatever the model's own dtype.
    compute = getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _options(loader: str, dtype: str, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    # A device is always named: else it takes a GPU where there is one.
    return {"quantization_config": loader_config(loader, dtype), "device_map": {"": device}}


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    _keep_from_packing_(model)
    straighten_head_input_(model)
    model.eval()
    return model


def _keep_from_packing_(model: PreTrainedModel) -> None:
    """NOTE a trap: where the processor multiplies bfloat16, bitsandbytes packs NF4 codes on the first call, and an
    assertion of its own fails for rows and columns that the packing does not divide; its plain kernel takes them."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if module.out_features % _PACKED_ROWS or module.in_features % module.weight.blocksize:
            module.support_avx512bf16_for_cpu = False


def _scales(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """What belongs to a quantized parameter and is none itself."""
    scales = getattr(parameter, "SCB", None)  # int8
    if scales is not None:
        yield scales
    state = getattr(parameter, "quant_state", None)  # NF4
    if state is not None:
        yield from (state.absmax, state.code)
