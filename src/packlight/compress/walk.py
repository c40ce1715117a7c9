"""The block-by-block walk: load one block, hand it out, push the activations through it, store it, let it go.

Only one block's weights are in memory at a time, whatever the size of the model. The walk begins with the input
embedding and ends with the final norm and the LM head, which are blocks too.

A small batch of proof tokens travels along through the changed blocks. Its logits at the end are those of the model
that was written, computed from the tensors that were in memory when they were written; the proof on save compares
every later loading with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from packlight.checkpoint.open import Checkpoint
from packlight.errors import CheckpointError
from packlight.ops.grid import QuantizedTensor
from packlight.runtime.load import load_dense_, parameter_names, put_
from packlight.spec import TensorKind

BlockKind = Literal["embedding", "layer", "head"]


@dataclass
class Block:
    """One block, its weights in memory in the dtype they were stored in.

    Args:
        name: module name, such as `model.layers.3`; `embedding` and `head` for the ends.
        index: place in the walk, 0 is the embedding.
        module: the module to change in place.
        tensors: full names of its stored tensors.
        kinds: what each tensor is to a quantizer.
        inputs: what enters it, one (1, tokens, hidden) tensor per calibration window; token ids for the embedding.
        packed: the matrices that a step has put on a grid so far, keyed by full tensor name.
    """

    name: str
    index: int
    kind: BlockKind
    module: nn.Module
    tensors: list[str]
    kinds: dict[str, TensorKind]
    inputs: list[torch.Tensor]
    _root: nn.Module
    packed: dict[str, QuantizedTensor] = field(default_factory=dict)

    def matrices(self) -> Iterator[tuple[str, TensorKind, torch.Tensor]]:
        """(full tensor name, kind, weight (rows, cols)) of everything that a quantizer may change."""
        for name in self.tensors:
            if self.kinds[name] != "other":
                yield name, self.kinds[name], self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self._root.get_submodule(owner), leaf)
        return found.data

    def pack_(self, name: str, weight: QuantizedTensor) -> None:
        """Store a matrix on a grid; the module computes with its de-quantized values from now on."""
        self.packed[name] = weight
        put_(self._root, name, weight.dequantize())


@dataclass
class WalkResult:
    """Filled while the walk runs: (tokens, vocab) float32 logits of the proof tokens in the changed model."""

    proof_logits: torch.Tensor | None = None


def walk(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    proof_ids: list[int],
    windows: list[list[int]],
    store: Callable[[Block], None],
    restore: Callable[[Block], bool],
    result: WalkResult,
) -> Iterator[Block]:
    """Yield every block once, in the order in which tokens pass through.

    Args:
        checkpoint: a dense checkpoint.
        model: its empty model (`runtime.load.empty_model`) in the dtype of the result.
        proof_ids: a short text that travels along.
        windows: calibration windows of token ids; empty where no step reads inputs.
        store: called when a yielded block is finished, before its weights are freed.
        restore: called first; where it returns True it has put a finished block's weights in place (a run that was
            cut short goes on), and the block is not yielded again.
        result: receives the proof logits.

    Raises:
        CheckpointError: the architecture's blocks cannot be found, or tensors are missing.
    """
    layers = find_layers(model)
    dtype = model.dtype  # asked now: it is that of the first parameter, which is about to hold another one
    batches = [torch.tensor([ids]) for ids in (proof_ids, *windows)]  # (1, tokens) each
    calls: list[list[_Call]] = []
    hidden = batches
    for index, (name, kind, module, tensors) in enumerate(_stages(checkpoint, model, layers)):
        kinds = {t.name: t.kind for t in checkpoint.spec.tensors if t.name in set(tensors)}
        block = Block(name, index, kind, module, tensors, kinds, hidden[1:], model)
        if not restore(block):
            load_dense_(model, checkpoint, tensors, keep_dtype=True)
            yield block
            store(block)
        _cast_(model, tensors, dtype)
        if kind == "embedding":
            model.tie_weights()
            calls = [_record_calls(model, layers, ids) for ids in batches]
            hidden = [call[0].hidden_states for call in calls]
        elif kind == "layer":
            hidden = [_run(module, states, call[index - 1]) for states, call in zip(hidden, calls, strict=True)]
            _free_(model, tensors)
        else:
            result.proof_logits = _head_logits(model, layers, batches[0], hidden[0])


def check_names(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose tensors are not named as the model's parameters are.

    Raises:
        CheckpointError: transformers translates the names of this architecture while it loads.
    """
    if unknown := sorted(set(checkpoint.index) - parameter_names(model)):
        raise CheckpointError(
            f"{checkpoint.path} stores tensors under other names than its architecture, such as {unknown[0]}: "
            "packlight cannot compress this layout yet"
        )


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks. Raises CheckpointError where the architecture keeps them in no such list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(f"{type(model).__name__} keeps its {count} blocks in no list that packlight can walk")


@dataclass
class _Call:
    """How the model calls one block: its input, and the other arguments (masks, rotary tables)."""

    hidden_states: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stand(nn.Module):
    """Stands in for a block: keeps how it is called and hands on `output`, by default its input."""

    def __init__(self, real: nn.Module, output: torch.Tensor | None = None) -> None:
        super().__init__()
        self._real = (real,)  # in a tuple, so that it is not registered as a submodule
        self.output = output
        self.call: _Call | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call = _Call(hidden_states, args, kwargs)
        return hidden_states if self.output is None else self.output

    def __getattr__(self, name: str) -> Any:
        # Some models ask their blocks for facts such as `attention_type`: the real block answers.
        if name in self.__dict__.get("_modules", {}) or name in self.__dict__.get("_buffers", {}):
            return super().__getattr__(name)
        return getattr(self.__dict__["_real"][0], name)


@contextmanager
def _standing_in(layers: nn.ModuleList, output: torch.Tensor | None = None) -> Iterator[list[_Stand]]:
    real = list(layers)
    stands = [_Stand(block, output) for block in real]
    for place, stand in enumerate(stands):
        layers[place] = stand
    try:
        yield stands
    finally:
        for place, block in enumerate(real):
            layers[place] = block


@torch.no_grad()
def _record_calls(model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor) -> list[_Call]:
    """How the model calls each of its blocks on `ids`, found by a pass that skips the blocks."""
    with _standing_in(layers) as stands:
        model.base_model(ids, use_cache=False)
    return [stand.call for stand in stands if stand.call is not None]


@torch.no_grad()
def _run(module: nn.Module, hidden: torch.Tensor, call: _Call) -> torch.Tensor:
    out = module(hidden, *call.args, **call.kwargs)
    changed: torch.Tensor = out[0] if isinstance(out, tuple) else out  # (1, tokens, hidden)
    return changed


@torch.no_grad()
def _head_logits(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Final norm, head and whatever the model does to its logits, (tokens, vocab) float32."""
    with _standing_in(layers, output=hidden):
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits[0].float()


def _stages(
    checkpoint: Checkpoint, model: PreTrainedModel, layers: nn.ModuleList
) -> list[tuple[str, BlockKind, nn.Module, list[str]]]:
    """(name, kind, module, stored tensor names): everything outside the blocks but the head first, the head last."""
    prefix = next(name for name, module in model.named_modules() if module is layers)
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), "lm_head")
    known = {tensor.name for tensor in checkpoint.spec.tensors}
    stored = sorted(name for name in checkpoint.index if name in known)  # without a tied head's second copy
    head_tensors = [name for name in stored if name.startswith(f"{head_name}.")]
    stages: list[tuple[str, BlockKind, nn.Module, list[str]]] = []
    for place, module in enumerate(layers):
        own = f"{prefix}.{place}."
        stages.append((own[:-1], "layer", module, [name for name in stored if name.startswith(own)]))
    inside = {name for stage in stages for name in stage[3]} | set(head_tensors)
    outside = [name for name in stored if name not in inside]
    return [("embedding", "embedding", model, outside), *stages, ("head", "head", model, head_tensors)]


def _cast_(model: PreTrainedModel, tensors: list[str], dtype: torch.dtype) -> None:
    """The compute dtype for every tensor of a finished block: from here on it is what was stored."""
    state = model.state_dict(keep_vars=True)
    for name in tensors:
        if state[name].is_floating_point():
            put_(model, name, state[name].data.to(dtype))


def _free_(model: PreTrainedModel, tensors: list[str]) -> None:
    state = model.state_dict(keep_vars=True)
    for name in tensors:
        put_(model, name, state[name].data.to("meta"))
