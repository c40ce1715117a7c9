"""A checkpoint directory -> a model of transformers' own class, its packed weights left packed.

Tensors are read one at a time into their own memory (not mapped), converted to the layout they run in, and put in
place; the peak is the finished model plus one tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packlight.checkpoint.masked import masked_names, read_masked
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.packed import PackedParts, packed_names, read_quantized
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import CheckpointError
from packlight.runtime.allocator import weights_apart
from packlight.runtime.packed import PackedEmbedding, PackedLinear, embedding_factor, tied_head
from packlight.runtime.tokenizer import quiet

logger = logging.getLogger(__name__)


def load_model(checkpoint: Checkpoint, dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """The whole model on one device, in evaluation mode. Beside the CPU, packed weights run on the reference kernel.

    Args:
        checkpoint: an opened directory, dense or in the compressed-tensors layout.
        dtype: of the tensors that are not packed, and of the computation; default: as stored.
        device: where each tensor goes as soon as it is read.

    Raises:
        CheckpointError: tensors that the architecture needs are missing or have the wrong shape.
    """
    model = empty_model(checkpoint, dtype)
    names = parameter_names(model)
    packed = packed_names(checkpoint.index)
    masked = masked_names(checkpoint.index)
    unknown = _unknown(checkpoint, names, packed, masked)
    if unknown and not packed and not masked:
        return _moved(load_through_transformers(checkpoint, dtype), device)
    if unknown:
        raise CheckpointError(f"{checkpoint.path} holds tensors foreign to its architecture, such as {unknown[0]}")
    parts = {part for found in packed.values() for part in found.names}  # among them `weight` where codes are int8
    # The largest first: decoding one takes more memory than holding it, and then there is still room.
    by_size = sorted(packed, key=lambda base: -sum(checkpoint.index[name].nbytes for name in packed[base].names))
    with weights_apart():
        for base in by_size:
            load_packed_(model, checkpoint, base, device)
        for base in masked:
            load_masked_(model, checkpoint, base, device)
        load_dense_(model, checkpoint, [name for name in checkpoint.index if name in names - parts], device=device)
        _tie_(model, checkpoint)
    _refuse_meta(model, checkpoint)
    _moved(model, device)  # what is computed and not stored
    straighten_head_input_(model)
    model.eval()
    return model


def empty_model(checkpoint: Checkpoint, dtype: str | None = None, **changes: int) -> PreTrainedModel:
    """The model in evaluation mode, its parameters on the meta device (no memory), its buffers (rotary tables) real.

    Args:
        dtype: of the parameters; default: as stored.
        changes: other values for fields of the config, such as fewer layers.

    Raises:
        CheckpointError: the config holds values that no model can be built from.
    """
    try:
        with quiet():
            model = _build_on_meta(checkpoint, dtype or checkpoint.spec.dtype, changes)
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot build the model that {checkpoint.path / 'config.json'} describes: "
            f"{type(error).__name__}: {reason}"
        ) from error
    fill_buffers_(model)
    model.eval()  # a model from a config is in training mode, where some architectures drop activations out
    return model


def parameter_names(model: nn.Module) -> set[str]:
    """Names under which a checkpoint may store this model's tensors, tied ones included."""
    return set(model.state_dict(keep_vars=True))


def load_dense_(
    model: nn.Module, checkpoint: Checkpoint, names: list[str], keep_dtype: bool = False, device: str = "cpu"
) -> None:
    """Read dense tensors from the checkpoint into the model, in the model's dtype or in their own.

    Raises:
        CheckpointError: a shape differs from what the config implies.
    """
    for name in names:
        owner, leaf = _owner(model, name)
        old = getattr(owner, leaf)
        entry = checkpoint.index[name]
        check_shape(checkpoint, name, entry.shape, old)
        tensor = read_tensor(entry)
        if tensor.is_floating_point() and not keep_dtype:
            tensor = tensor.to(old.dtype)
        put_(model, name, tensor.to(device))


def load_packed_(model: PreTrainedModel, checkpoint: Checkpoint, base: str, device: str = "cpu") -> None:
    """Replace the module `base` by a packed one over the checkpoint's codes; of a tied embedding, the head as well.

    Raises:
        CheckpointError: the shape differs from what the config implies.
    """
    weight = read_quantized(checkpoint, base).to(device)
    module = model.get_submodule(base)
    check_shape(checkpoint, f"{base}.weight", weight.shape, module.weight)
    if isinstance(module, nn.Embedding):
        embedding = PackedEmbedding(weight, embedding_factor(module))
        if checkpoint.spec.is_tied:
            model.set_submodule(_name_of(model, model.get_output_embeddings()), tied_head(embedding, weight))
        model.set_submodule(base, embedding)
        return
    entry = checkpoint.index.get(f"{base}.bias")
    bias = None if entry is None else read_tensor(entry).to(device, weight.scale.dtype)
    model.set_submodule(base, PackedLinear(weight, bias))


def load_masked_(model: nn.Module, checkpoint: Checkpoint, base: str, device: str = "cpu") -> None:
    """Read a matrix whose zeros are left out of the file: dense, in the model's dtype.

    Raises:
        CheckpointError: the shape differs from what the config implies.
    """
    name = f"{base}.weight"
    owner, leaf = _owner(model, name)
    old, weight = getattr(owner, leaf), read_masked(checkpoint, base)
    check_shape(checkpoint, name, tuple(weight.shape), old)
    put_(model, name, weight.to(device, old.dtype))


def put_(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in place of the parameter or buffer `name`; no gradient is kept."""
    owner, leaf = _owner(model, name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _moved(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """In place: parameters and buffers that are on the device already stay as they are."""
    nn.Module.to(model, device)
    return model


def _build_on_meta(checkpoint: Checkpoint, dtype: str, changes: Mapping[str, int]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # packed modules are put in place here, not by transformers
    for field, value in changes.items():
        setattr(config.get_text_config(decoder=True), field, value)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model


def check_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], old: Any) -> None:
    """Raises CheckpointError where a stored shape differs from what the config implies."""
    if tuple(found) != tuple(old.shape):
        raise CheckpointError(
            f"{name} in {checkpoint.path} has shape {tuple(found)}, its config implies {tuple(old.shape)}"
        )


def _tie_(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Let the dense head of a tied model read the dense embedding's matrix."""
    embedding = model.get_input_embeddings()
    if checkpoint.spec.is_tied and not isinstance(embedding, PackedEmbedding):
        model.get_output_embeddings().weight = embedding.weight


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _unknown(
    checkpoint: Checkpoint, names: set[str], packed: dict[str, PackedParts], masked: dict[str, frozenset[str]]
) -> list[str]:
    """Stored tensors that are no parameter, no part of one, and no table that is computed anyway."""
    known = names | {part for parts in packed.values() for part in parts.names}
    known |= {part for parts in masked.values() for part in parts}
    computed = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    return sorted(name for name in set(checkpoint.index) - known if not name.endswith(computed))


def straighten_head_input_(model: PreTrainedModel) -> None:
    """NOTE a trap: the last position of a prompt, a view with the strides of the whole, makes torch's bfloat16 matrix
    multiplication copy the head's weights into another layout, once per call. A copy of the one row avoids it."""

    def straighten(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(straighten)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def fill_buffers_(model: PreTrainedModel) -> None:
    """Give every buffer real memory and its initial value: rotary tables are computed, not stored in checkpoints."""
    for module in model.modules():
        empty = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if not empty:
            continue
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        with torch.no_grad():
            model._init_weights(module)


def _refuse_meta(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    missing = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors of its architecture, the first is {missing[0]}"
        )


def load_through_transformers(checkpoint: Checkpoint, dtype: str | None, **options: Any) -> PreTrainedModel:
    """For checkpoints whose names transformers itself translates on loading (fused experts), and for its quantizers.

    Args:
        options: more arguments of `from_pretrained`.

    Raises:
        CheckpointError: tensors are missing, or more are stored than the architecture has.
    """
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=dtype or checkpoint.spec.dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    # transformers fills what is missing with random numbers and drops what it does not know.
    for names, what in ((info["missing_keys"], "lacks"), (info["unexpected_keys"], "holds more than")):
        if names:
            raise CheckpointError(
                f"{checkpoint.path} {what} the tensors of its architecture, such as {sorted(names)[0]}: "
                "its config and its weights do not belong together"
            )
    model.eval()
    return model
