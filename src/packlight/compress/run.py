"""Drive one step over one checkpoint, block by block, so that a kill costs one block.

Every finished block is a safetensors file in the work directory, with its row of evidence in the file's metadata. The
same call again takes finished blocks from there and goes on with the first one that is missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from packlight.checkpoint.masked import PARTS, decode_masked, masked_tensors
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.packed import decode, stored_tensors
from packlight.checkpoint.stored import MASK, SCALES
from packlight.compress.step import Step
from packlight.compress.walk import Block, Calibration, WalkResult, check_names, find_layers, walk
from packlight.errors import CheckpointError, UsageError
from packlight.evidence import Measurement
from packlight.ops.grid import tensor_digest
from packlight.runtime.load import empty_model, parameter_names, put_
from packlight.runtime.packed import embedding_factor
from packlight.spec import Precision


def check(step: Step, checkpoint: Checkpoint) -> None:
    """Refuse a step that does not suit a checkpoint, before any weight is read.

    Raises:
        UsageError: a trait that the step needs is absent, or a group divides no row.
    """
    if "dense" in step.needs:
        check_dense(checkpoint)
    step.plan(checkpoint.spec)


def check_dense(checkpoint: Checkpoint) -> None:
    """Raises UsageError where the checkpoint is quantized already."""
    if (stored := checkpoint.spec.stored) is not None:
        if stored.sparse is not None:
            raise UsageError(
                f"{checkpoint.source} is stored without its zeros ({stored}): prune with --storage dense for what "
                "other methods are to go on with, or start from the original"
            )
        raise UsageError(f"{checkpoint.source} is already quantized ({stored}): start from the original")


def check_modules(checkpoint: Checkpoint, precision: Precision) -> PreTrainedModel:
    """The checkpoint's empty model, in which every tensor that is to be put on a grid belongs to a module that can be.

    Raises:
        CheckpointError: tensors are missing or have other names than the architecture's, or belong to other modules.
    """
    model = empty_model(checkpoint, precision.dtype)
    check_names(checkpoint, model)
    find_layers(model)
    _refuse_missing(checkpoint, model)
    _refuse_foreign_modules(precision, checkpoint, model)
    return model


def run(
    step: Step,
    checkpoint: Checkpoint,
    work: Path,
    layout: str,
    proof_ids: list[int],
    calibration: Calibration | None,
    result: WalkResult,
) -> Iterator[Measurement]:
    """Compress `checkpoint` into `work`/NNNN.safetensors; yields one row per block that was not there yet.

    `result` receives the proof logits when the iterator is exhausted.
    """
    reading = step.reading
    assert (calibration is None) == (reading is None), "calibration is there where a step reads text"
    if calibration is not None and reading is not None:
        assert calibration.guide is not None or not reading.weighs_tokens
        assert calibration.keeps_targets or not reading.keeps_targets
        assert calibration.influences or not reading.ranks_blocks
    work.mkdir(parents=True, exist_ok=True)
    model = check_modules(checkpoint, step.precision)
    rows: dict[int, Measurement] = {}

    def store(block: Block) -> None:
        _store(block, work, layout, step.precision, rows[block.index])

    def restore(block: Block) -> bool:
        return _restore(block, work, step, model, rows)

    current: Block | None = None
    influences = () if calibration is None else calibration.influences
    travelling = None if reading is not None and reading.ranks_blocks else calibration

    def tracked() -> Iterator[Block]:
        nonlocal current
        for block in walk(checkpoint, model, proof_ids, travelling, store, restore, result, influences):
            current = block
            _refuse_not_finite(block)
            yield block

    # A row arrives before the walk goes on, so `store` finds it when the walk stores the block.
    for row in step.apply_(tracked()):
        assert current is not None
        rows[current.index] = row
        yield row


def block_files(work: Path) -> list[Path]:
    """Finished blocks, in the order of the walk."""
    return sorted(work.glob("[0-9]*.safetensors"))


def block_reader(blocks: Path) -> Callable[[str], Any]:
    """Bytes of a tensor from whichever block file holds it."""
    where: dict[str, tuple[Path, str]] = {}
    rename = _renaming(blocks)
    for path in block_files(blocks):
        with safe_open(path, framework="pt") as stored:
            where.update({rename(name): (path, name) for name in stored.keys()})  # noqa: SIM118 - it is no mapping

    def read(name: str) -> Any:
        path, own = where[name]
        with safe_open(path, framework="pt") as stored:
            tensor = stored.get_tensor(own)
        return tensor.reshape(-1).contiguous().view(torch.uint8).numpy()

    return read


def digests(work: Path) -> dict[str, str]:
    """`tensor_digest` of every tensor of the result, de-quantized, as it was in memory when its block was finished."""
    rename = _renaming(work)
    return {rename(name): digest for notes in _notes(work) for name, digest in notes["digests"].items()}


def removed_blocks(work: Path) -> list[int]:
    """Places of the blocks that are taken out, counted from 0 in the original, in a finished work directory."""
    return [int(name.rpartition(".")[2]) for name in _removed_names(work)]


def _removed_names(work: Path) -> list[str]:
    return [notes["removed"] for notes in _notes(work) if "removed" in notes]


def _notes(work: Path) -> Iterator[dict[str, Any]]:
    """What is noted in the files of the finished blocks."""
    for path in block_files(work):
        with safe_open(path, framework="pt") as stored:
            yield json.loads(stored.metadata()["notes"])


def _renaming(work: Path) -> Callable[[str], str]:
    """From a tensor's name in the original to that in the result, in which the blocks that stay are numbered anew."""
    names = _removed_names(work)
    if not names:
        return lambda name: name
    prefix = names[0].rpartition(".")[0] + "."
    removed = removed_blocks(work)

    def rename(name: str) -> str:
        place, joint, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not place.isdigit():
            return name
        return f"{prefix}{int(place) - sum(gone < int(place) for gone in removed)}{joint}{rest}"

    return rename


def _store(block: Block, work: Path, layout: str, precision: Precision, row: Measurement) -> None:
    dtype = precision.dtype
    tensors: dict[str, torch.Tensor] = {}
    kept_names = [] if block.is_removed else block.tensors
    for name in kept_names:
        base, spec = name.removesuffix(".weight"), block.specs[name]
        if name in block.packed:
            tensors.update(stored_tensors(base, block.packed[name], layout))
            continue
        tensor = block.tensor(name)
        tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if precision.sparse is not None and precision.is_masked(spec):
            tensors.update(masked_tensors(base, tensor, precision.sparse.num_zeros(spec)))
        else:
            tensors[name] = tensor
    # Of a packed matrix this is the de-quantized one: a scale that fits into the dtype may still multiply to infinity.
    seen: dict[str, str] = {}
    for name in kept_names:
        tensor = block.tensor(name)
        tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds values that are not finite in {dtype}: choose a wider dtype")
        seen[name] = tensor_digest(tensor)
    target = work / f"{block.index:04d}.safetensors"
    half = target.with_suffix(".part")
    kept = {key: value for key, value in dataclasses.asdict(row).items() if value not in (None, {})}
    # One key only: safetensors writes several in no fixed order, and the same block must give the same bytes.
    removed = {"removed": block.name} if block.is_removed else {}
    notes = {"notes": json.dumps({"row": kept, "digests": seen, **removed})}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half, notes)
    except SafetensorError as error:
        raise _as_os_error(error, half) from error
    half.replace(target)


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """What the system said, such as a full disk, which safetensors passes on in words only."""
    code = re.search(r"os error (\d+)", str(error))
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])), str(path))


def _restore(block: Block, work: Path, step: Step, model: nn.Module, rows: dict[int, Measurement]) -> bool:
    path = work / f"{block.index:04d}.safetensors"
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as stored:
        notes = json.loads(stored.metadata()["notes"])
        rows[block.index] = Measurement(**notes["row"])
        if "removed" in notes:
            block.remove_()
            return True
        names = set(stored.keys())
        parameters = parameter_names(model)
        for name in sorted(names - set(block.tensors)):
            if name.endswith(".bias") and name not in parameters:  # one that the step gave a linear
                block.put_(name, stored.get_tensor(name))
        for name in block.tensors:
            base = name.removesuffix(".weight")
            if f"{base}{MASK}" in names:
                masked = {part: stored.get_tensor(f"{base}.{part}") for part in PARTS}
                put_(model, name, decode_masked(masked, base))
                continue
            if not any(f"{base}{end}" in names for end in SCALES):
                put_(model, name, stored.get_tensor(name))
                continue
            grid = step.precision.grid_of(block.specs[name])
            assert grid is not None
            parts: dict[str, Any] = {
                part.rpartition(".")[2]: stored.get_tensor(part) for part in names if part.rpartition(".")[0] == base
            }
            put_(model, name, decode(parts, grid, base).dequantize())
    return True


def _refuse_missing(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Every parameter must be stored under one of its names; a tied one has several."""
    model.tie_weights()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = [same[0] for same in names.values() if checkpoint.index.keys().isdisjoint(same)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors of its architecture, the first is {missing[0]}"
        )


def _refuse_not_finite(block: Block) -> None:
    """Norms and biases too, which no method looks at: one NaN makes the whole model say nothing."""
    for name in block.tensors:
        tensor = block.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds a NaN or an infinity: repair the checkpoint first")


def _refuse_foreign_modules(precision: Precision, checkpoint: Checkpoint, model: nn.Module) -> None:
    for tensor in checkpoint.spec.tensors:
        if precision.grid_of(tensor) is None:
            continue
        owner = model.get_submodule(tensor.name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear | nn.Embedding):
            raise CheckpointError(
                f"{tensor.name} belongs to a {type(owner).__name__}, and the compressed-tensors layout holds only "
                "linear and embedding matrices: this architecture cannot be quantized yet"
            )
        if isinstance(owner, nn.Embedding):
            embedding_factor(owner)
