"""The block-by-block walk: load one block, hand it out, push the activations through it, store it, let it go.

Only one block's weights are in memory at a time, whatever the size of the model. The walk begins with the input
embedding and ends with the final norm and the LM head, which are blocks too.

A small batch of proof tokens travels along through the changed blocks. Its logits at the end are those of the model
that was written, computed from the tensors that were in memory when they were written; the proof on save compares
every later loading with them.

Calibration windows travel through the blocks as they are now, and where a method asks for what should come out, through
the blocks as they were too. Both are computed in float32, whatever the model's dtype, and only their hidden states
between two blocks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from packlight.checkpoint.open import Checkpoint
from packlight.errors import CheckpointError
from packlight.ops.grid import QuantizedTensor
from packlight.plan.memory import CALIBRATION_BATCH
from packlight.runtime.load import load_dense_, parameter_names, put_
from packlight.spec import ModelSpec, TensorSpec

BlockKind = Literal["embedding", "layer", "head"]


@dataclass
class Block:
    """One block, its weights in memory in the dtype they were stored in.

    Args:
        name: module name, such as `model.layers.3`; `embedding` and `head` for the ends.
        index: place in the walk, 0 is the embedding.
        module: the module to change in place.
        tensors: full names of its stored tensors.
        specs: what each tensor is to a quantizer.
        activations: what enters it and what left it before it was changed; None for a step that reads no inputs, and
            for the two ends.
        model: the shapes of the whole.
        moments: second moments (cols, cols) for the matrices of the two ends, where a guide has them.
        influences: how much each block of the model changes what passes through it, from the first on; empty where
            the step does not ask.
        packed: the matrices that a step has put on a grid so far, keyed by full tensor name.
        is_removed: whether a step has taken the block out of the model.
    """

    name: str
    index: int
    kind: BlockKind
    module: nn.Module
    tensors: list[str]
    specs: dict[str, TensorSpec]
    activations: Activations | None
    model: ModelSpec
    _root: nn.Module
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    influences: Sequence[float] = ()
    packed: dict[str, QuantizedTensor] = field(default_factory=dict)
    is_removed: bool = False

    def matrices(self) -> Iterator[tuple[str, TensorSpec, torch.Tensor]]:
        """(full tensor name, spec, weight (rows, cols)) of everything that a quantizer may change."""
        for name in self.tensors:
            if self.specs[name].kind != "other":
                yield name, self.specs[name], self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self._root.get_submodule(owner), leaf)
        return found.data

    def put_(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor by another, of the same shape unless the step says so in `reshaped`, or give a linear a bias
        that it was without."""
        put_(self._root, name, tensor)
        if name not in self.specs:
            self.tensors.append(name)
            self.specs[name] = TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "other")

    def remove_(self) -> None:
        """Take the whole block out: what enters the next is what entered this one, and none of it is stored."""
        assert self.kind == "layer"
        self.is_removed = True

    def owner(self, name: str) -> nn.Module:
        """The module that a tensor is a parameter of."""
        return self._root.get_submodule(name.rpartition(".")[0])

    @contextmanager
    def showing(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """The block with other tensors for a while, such as its original ones."""
        kept = {name: self.tensor(name) for name in tensors}
        for name, tensor in tensors.items():
            self.put_(name, tensor)
        try:
            yield
        finally:
            for name, tensor in kept.items():
                self.put_(name, tensor)

    def pack_(self, name: str, weight: QuantizedTensor) -> None:
        """Store a matrix on a grid; the module computes with its de-quantized values from now on."""
        self.packed[name] = weight
        values = weight.dequantize()
        put_(self._root, name, values if self.activations is None else values.float())


@dataclass(frozen=True)
class Guide:
    """What a sweep forward and back says about a text (`compress.sweep.guide`).

    Args:
        tokens: float32 (windows, tokens) by the name of a matrix or block: how much each token matters there.
        ends: float32 (hidden, hidden) by the name of embedding and head: the second moments in which an error of one of
            their rows costs least.
    """

    tokens: Mapping[str, torch.Tensor]
    ends: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """Text for the methods that look at what passes through a block.

    Args:
        windows: token ids, all of one length.
        batch: windows that pass through a block at once.
        guide: which tokens matter where; None where all matter alike.
        spill: directory for the hidden states where they are to be on disk; None keeps them in memory.
        keeps_targets: whether the windows also travel through the blocks as they were.
        influences: what `compress.influence` says about the blocks; empty where no step asks.
    """

    windows: list[list[int]]
    batch: int = CALIBRATION_BATCH
    guide: Guide | None = None
    spill: Path | None = None
    keeps_targets: bool = True
    influences: tuple[float, ...] = ()

    def allocate(self, name: str, width: int) -> torch.Tensor:
        """Room for one stream of hidden states, float32 (windows, tokens, width)."""
        shape = (len(self.windows), len(self.windows[0]), width)
        if self.spill is None:
            return torch.empty(shape)
        self.spill.mkdir(parents=True, exist_ok=True)
        path = str(self.spill / f"{name}.bin")
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.float32).reshape(shape)


@dataclass
class Activations:
    """The calibration windows between two blocks, each stream float32 (windows, tokens, hidden).

    Args:
        inputs: what enters the block, come through the changed blocks.
        unchanged: what would enter it, had nothing been changed, and what the unchanged block makes of that; None where
            the calibration does not keep them.
        calls: how the model calls each of its blocks.
        calibration: the text, and how much its tokens matter.
    """

    inputs: torch.Tensor
    unchanged: tuple[torch.Tensor, torch.Tensor] | None
    calls: list[Call]
    calibration: Calibration
    place: int = 0

    @property
    def exact(self) -> torch.Tensor:
        """What would enter the block, had nothing been changed."""
        assert self.unchanged is not None, "Reading.keeps_targets asks for this"
        return self.unchanged[0]

    @property
    def targets(self) -> torch.Tensor:
        """What the unchanged block makes of `exact`."""
        assert self.unchanged is not None, "Reading.keeps_targets asks for this"
        return self.unchanged[1]

    @property
    def batch(self) -> int:
        """Windows that pass through a block at once."""
        return self.calibration.batch

    def batches(self) -> Iterator[slice]:
        """Slices of the windows."""
        for start in range(0, len(self.inputs), self.batch):
            yield slice(start, start + self.batch)

    def weights(self, names: Sequence[str], windows: slice | torch.Tensor) -> torch.Tensor | None:
        """How much each token of some windows matters at some matrices or blocks, (windows, tokens), 1 on average over
        the whole text; None where all matter alike.

        It is the root of |g|^2, not that itself: the gradient is that of one label drawn for each token, and its square
        would let a few rare labels outweigh the rest.
        """
        guide = self.calibration.guide
        if guide is None:
            return None
        roots = [guide.tokens[name].sqrt() for name in names]
        tiny = torch.finfo(torch.float32).tiny
        return sum((root[windows] / root.mean().clamp(min=tiny) for root in roots), torch.zeros(())) / len(names)

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block that is at hand, over some hidden states."""
        return run_block(module, hidden, self.calls[self.place])

    @torch.no_grad()
    def enter(self, module: nn.Module, place: int) -> None:
        """Fill `targets`, while the block is still as it was."""
        self.place = place
        if self.unchanged is None:
            return
        for part in self.batches():
            self.targets[part] = self.run(module, self.exact[part])

    @torch.no_grad()
    def leave(self, module: nn.Module, place: int) -> None:
        """Go on to the next block: through the changed block, and with its targets as what would enter."""
        self.place = place
        for part in self.batches():
            self.inputs[part] = self.run(module, self.inputs[part])
        if self.unchanged is not None:
            self.unchanged = self.unchanged[::-1]


@dataclass
class WalkResult:
    """Filled while the walk runs: (tokens, vocab) float32 logits of the proof tokens in the changed model."""

    proof_logits: torch.Tensor | None = None


def walk(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    proof_ids: list[int],
    calibration: Calibration | None,
    store: Callable[[Block], None],
    restore: Callable[[Block], bool],
    result: WalkResult,
    influences: Sequence[float] = (),
) -> Iterator[Block]:
    """Yield every block once, in the order in which tokens pass through.

    Args:
        checkpoint: a dense checkpoint.
        model: its empty model (`runtime.load.empty_model`) in the dtype of the result.
        proof_ids: a short text that travels along.
        calibration: windows of token ids; None where no step reads inputs.
        store: called when a yielded block is finished, before its weights are freed.
        restore: called first; where it returns True it has put a finished block's weights in place (a run that was
            cut short goes on), and the block is not yielded again.
        result: receives the proof logits.
        influences: of the blocks, for a step that asks.

    Raises:
        CheckpointError: the architecture's blocks cannot be found, or tensors are missing.
    """
    layers = find_layers(model)
    dtype = model.dtype  # asked now: it is that of the first parameter, which is about to hold another one
    proof = torch.tensor([proof_ids])  # (1, tokens)
    calls: list[Call] = []
    hidden = proof
    activations: Activations | None = None
    ends = {} if calibration is None or calibration.guide is None else calibration.guide.ends
    for index, (name, kind, module, tensors) in enumerate(stages(checkpoint, model, layers)):
        specs = {t.name: t for t in checkpoint.spec.tensors if t.name in set(tensors)}
        at_hand = activations if kind == "layer" else None
        moments = {tensor: ends[tensor] for tensor in tensors if tensor in ends}
        block = Block(name, index, kind, module, tensors, specs, at_hand, checkpoint.spec, model, moments, influences)
        if calibration is not None and kind != "head":
            load_dense_(model, checkpoint, tensors, keep_dtype=True)
            if kind == "embedding":
                activations = _embedded(model, layers, calibration)
            else:
                assert activations is not None
                cast_(model, tensors, torch.float32)
                activations.enter(module, index - 1)
        if not restore(block):
            if calibration is None or kind == "head":
                load_dense_(model, checkpoint, tensors, keep_dtype=True)
            yield block
            store(block)
        cast_(model, tensors, dtype)
        if kind == "embedding":
            model.tie_weights()
            calls = record_calls(model, layers, proof)
            hidden = calls[0].hidden_states
            if activations is not None and calibration is not None:
                activations.inputs = embed(model, layers, calibration, activations.inputs)
        elif kind == "layer":
            if not block.is_removed:
                with torch.no_grad():
                    hidden = run_block(module, hidden, calls[index - 1])
            if activations is not None:
                assert not block.is_removed, "which blocks go is known before text travels along"
                cast_(model, tensors, torch.float32)
                activations.leave(module, index - 1)
            free_(model, tensors)
        else:
            result.proof_logits = _head_logits(model, layers, proof, hidden)


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
class Call:
    """How the model calls one block: its input, and the other arguments (masks, rotary tables)."""

    hidden_states: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def in_float32(self) -> Call:
        """The same call for hidden states in float32; its own are left out."""

        def widen(value: Any) -> Any:
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.float() if is_float else value

        args, kwargs = tree_map(widen, (self.args, self.kwargs))
        return Call(torch.empty(0), args, kwargs)


class _Stand(nn.Module):
    """Stands in for a block: keeps how it is called and hands on `output`, by default its input."""

    def __init__(self, real: nn.Module, output: torch.Tensor | None = None) -> None:
        super().__init__()
        self._real = (real,)  # in a tuple, so that it is not registered as a submodule
        self.output = output
        self.call: Call | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call = Call(hidden_states, args, kwargs)
        return hidden_states if self.output is None else self.output

    def __getattr__(self, name: str) -> Any:
        # Some models ask their blocks for facts such as `attention_type`: the real block answers.
        if name in self.__dict__.get("_modules", {}) or name in self.__dict__.get("_buffers", {}):
            return super().__getattr__(name)
        return getattr(self.__dict__["_real"][0], name)


@contextmanager
def standing_in(layers: nn.ModuleList, output: torch.Tensor | None = None) -> Iterator[list[_Stand]]:
    """The model without its blocks: each hands on its input, or `output`."""
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
def record_calls(model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor) -> list[Call]:
    """How the model calls each of its blocks on `ids`, found by a pass that skips the blocks."""
    with standing_in(layers) as stands:
        model.base_model(ids, use_cache=False)
    return [stand.call for stand in stands if stand.call is not None]


def run_block(module: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """What a block makes of hidden states (windows, tokens, hidden); masks and tables are broadcast over windows."""
    out = module(hidden, *call.args, **call.kwargs)
    changed: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return changed


@torch.no_grad()
def _embedded(model: PreTrainedModel, layers: nn.ModuleList, calibration: Calibration) -> Activations:
    """The hidden states that enter the first block, and how each block is called."""
    model.tie_weights()
    calls = record_calls(model, layers, torch.tensor(calibration.windows[:1]))
    width = calls[0].hidden_states.shape[-1]
    inputs = calibration.allocate("inputs", width)
    made = Activations(inputs, None, [call.in_float32() for call in calls], calibration)
    if calibration.keeps_targets:
        exact = embed(model, layers, calibration, calibration.allocate("exact", width))
        made.unchanged = exact, calibration.allocate("targets", width)
    return made


@torch.no_grad()
def embed(model: PreTrainedModel, layers: nn.ModuleList, calibration: Calibration, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` (windows, tokens, hidden) with what enters the first block."""
    for start in range(0, len(calibration.windows), calibration.batch):
        ids = torch.tensor(calibration.windows[start : start + calibration.batch])
        out[start : start + len(ids)] = record_calls(model, layers, ids)[0].hidden_states.float()
    return out


@torch.no_grad()
def _head_logits(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Final norm, head and whatever the model does to its logits, (tokens, vocab) float32."""
    with standing_in(layers, output=hidden):
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits[0].float()


def stages(
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


def cast_(model: PreTrainedModel, tensors: list[str], dtype: torch.dtype) -> None:
    """The compute dtype for every tensor of a finished block: from here on it is what was stored."""
    state = model.state_dict(keep_vars=True)
    for name in tensors:
        if state[name].is_floating_point():
            put_(model, name, state[name].data.to(dtype))


def free_(model: PreTrainedModel, tensors: list[str]) -> None:
    """Let go of a block's weights."""
    state = model.state_dict(keep_vars=True)
    for name in tensors:
        put_(model, name, state[name].data.to("meta"))
