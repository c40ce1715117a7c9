"""Packlight's own layout in `AutoModelForCausalLM.from_pretrained`: what transformers asks of a quantization method.

Before transformers reads weights, every module that is stored packed is taken out of the empty model, so that the
loader neither fills nor misses it; afterwards it is put back and `runtime.load.load_packed_` replaces it, exactly as
in `load_model`: the same packed modules, one tensor in memory at a time. Packed modules cannot be there from the
start: what transformers does not read itself, it gives fresh memory and random numbers.

Matrices whose zeros are left out of the file (`checkpoint/masked.py`) go the same way and end as dense tensors. A model
of these alone is a plain one of transformers' own from then on: it can be moved, trained and saved, dense.

Limits of what stays packed: the weights must come from a directory or the hub (no `state_dict`), into the model class
that the config names, in the stored dtype, on the CPU; and `save_pretrained` is refused, as the directory itself is
what can be copied.

NOTE a trap: this file is imported while transformers is (`runtime/registration.py`), and may import only those parts of
it that its quantizers build on; all else, from inside functions.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from packlight.checkpoint.stored import OWN_METHOD
from packlight.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from packlight.checkpoint.open import Checkpoint

METHOD = OWN_METHOD
CPU_ONLY = "packlight's packed weights run on the CPU"

logger = logging.getLogger(__name__)


class PacklightConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact, as it is: `checkpoint.stored` reads and judges it."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration has its own methods alone


class PacklightQuantizer(HfQuantizer):
    """Loads artifacts; it makes none: that is `packlight quantize`."""

    requires_calibration = True  # transformers then refuses this config for a model that is not quantized yet

    def __init__(self, quantization_config: PacklightConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._taken: dict[str, torch.nn.Module] = {}

    def update_device_map(self, device_map: Any) -> Any:
        """'auto' and its kin mean the CPU. Raises UsageError for any other device."""
        if device_map is None:
            return None
        devices = [str(device) for device in device_map.values()] if isinstance(device_map, dict) else []
        if other := next((device for device in devices if device != "cpu"), None):
            raise UsageError(f"{CPU_ONLY}, not on {other}: leave device_map out")
        return {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Take out the modules that are stored packed.

        Raises:
            CheckpointError: the artifact is damaged, or is not of this model's class.
            UsageError: the weights are no files, or another dtype than theirs is asked for.
        """
        from torch import nn

        from packlight.checkpoint.open import open_checkpoint

        if not checkpoint_files:
            raise UsageError("packlight's layout is loaded from files: give from_pretrained a directory or a hub id")
        checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        _check_dtype(model, checkpoint)
        self._checkpoint, self._taken = checkpoint, _packed_modules(model, checkpoint)
        for name in self._taken:
            model.set_submodule(name, nn.Identity())
        # Ties are kept by parameters' names, and those of the modules are gone; load_packed_ ties them itself.
        ties = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {name: other for name, other in ties if _module(name) not in self._taken}
        later = sorted(re.escape(name) for name in checkpoint.index if _module(name) in self._taken)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^(?:{'|'.join(later)})$"}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Put them back packed, the largest first."""
        from packlight.checkpoint.masked import masked_names
        from packlight.checkpoint.packed import packed_names
        from packlight.runtime.allocator import weights_apart
        from packlight.runtime.load import fill_buffers_, load_packed_

        checkpoint, taken = self._checkpoint, self._taken
        assert checkpoint is not None
        self._checkpoint, self._taken = None, {}  # the quantizer stays with the model, which may be copied or pickled
        for name, module in taken.items():
            model.set_submodule(name, module)
        fill_buffers_(model)  # of what was taken out, such as Gemma's factor of its embedding
        packed, index = packed_names(checkpoint.index), checkpoint.index
        if masked := masked_names(index):
            return self._dense(model, checkpoint, masked)
        with weights_apart():
            for base in sorted(packed, key=lambda base: -sum(index[name].nbytes for name in packed[base].names)):
                load_packed_(model, checkpoint, base)
        model.eval()
        model.register_forward_pre_hook(_refuse_other_devices)
        return model

    def _dense(
        self, model: PreTrainedModel, checkpoint: Checkpoint, masked: dict[str, frozenset[str]]
    ) -> PreTrainedModel:
        """Fill the matrices whose zeros were left out, and their modules' biases; nothing quantized remains."""
        from packlight.runtime.load import load_dense_, load_masked_, parameter_names

        for base in masked:
            load_masked_(model, checkpoint, base)
        biases = [name for name in checkpoint.index.keys() & parameter_names(model) if _module(name) in masked]
        load_dense_(model, checkpoint, sorted(biases))
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]  # transformers does not say
        model.eval()
        return model

    def is_serializable(self) -> bool:
        """False, with the reason in the log, where transformers' own error points to."""
        logger.warning(
            "save_pretrained cannot write a model whose weights packlight keeps packed for running: "
            "copy the directory that it was loaded from"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _packed_modules(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """By name, the modules that are stored packed, and the head that is tied to a packed embedding.

    Raises:
        CheckpointError: the model lacks one.
    """
    from packlight.checkpoint.masked import masked_names
    from packlight.checkpoint.packed import packed_names

    modules = dict(model.named_modules())
    names = packed_names(checkpoint.index).keys() | masked_names(checkpoint.index)
    if foreign := sorted(names - modules.keys()):
        raise CheckpointError(
            f"{checkpoint.path} stores {foreign[0]}, which a {type(model).__name__} does not have: "
            f"load it as the class that its config names, {checkpoint.spec.architecture}"
        )
    taken = {name: modules[name] for name in names}
    if checkpoint.spec.is_tied and model.get_input_embeddings() in taken.values():
        taken |= {name: module for name, module in modules.items() if module is model.get_output_embeddings()}
    return taken


def _module(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]


def _check_dtype(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raises UsageError where the model is to compute in another dtype than the packed weights' scales have."""
    found = str(model.dtype).removeprefix("torch.")
    if found != checkpoint.spec.dtype:
        raise UsageError(
            f"{checkpoint.path} is stored and computed in {checkpoint.spec.dtype}, not {found}: leave dtype out"
        )


def _refuse_other_devices(model: PreTrainedModel, args: tuple[Any, ...]) -> None:
    """Before every forward pass: nothing stops a user from moving the model after it was loaded."""
    if model.device.type != "cpu":
        raise UsageError(f"{CPU_ONLY}, and this model was moved to {model.device}: move it back with .to('cpu')")
