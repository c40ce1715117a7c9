"""What each matrix would cost the model on each grid, in nats of KL divergence, from one pass forward and one back.

A small change D of a matrix changes the output distribution by

    KL = 1/2 E[ sum over labels y ~ p of p(y) (g . D x)^2 ],   g = gradient of -log p(y) at the matrix's output

to second order: the Fisher information (Amari, "Natural Gradient", 1998). With gradients for labels drawn from the
model's own distribution, the errors of different rows taken as uncorrelated, and a token's gradient as large in every
row as it is on the whole, it becomes

    KL = 1/2 sum_r G_r D_r H D_r^T,   G_r = E[g_r^2] / E[|g|^2],   H = E[|g|^2 x x^T]

(a Kronecker factorization as in Martens & Grosse, "K-FAC", arXiv 1503.05671, but with every token weighted by its own
gradient: the few tokens with enormous activations that language models have carry hardly any gradient.) So it is

for rounding to nearest; a method that rounds better loses a share of that (`Step.loss_share`). Changes of different
matrices add up.

The head's own cost is measured, not estimated: its logits with and without rounding are compared on some positions.
The estimate is a ranking in nats: at 3 and 2 bits, far from small changes, the sum is off, and the result is measured
anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from packlight.checkpoint.cache import build_once, cache_root
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.save import content_hash
from packlight.compress.calibration import CalibrationText, Prepared, prepare
from packlight.compress.walk import (
    Calibration,
    Call,
    cast_,
    find_layers,
    free_,
    record_calls,
    run_block,
    stages,
    standing_in,
)
from packlight.ops.grid import Clip, quantize
from packlight.runtime.load import empty_model, load_dense_
from packlight.spec import Grid, TensorSpec

ROW_STRIDE = 8
"""Every eighth row of a matrix is rounded for the estimate: rows of one matrix are alike."""
HEAD_POSITIONS = 32
"""Positions of each window on which a rounded head is compared with the exact one."""
SEED = 0
WINDOWS = 8
"""Windows of calibration text that `known_losses` looks at."""
VERSION = 1
"""Of this estimate; part of the cache's key."""
LOSSES_NAME = "losses.json"

Losses = dict[str, dict[str, float]]
"""Nats by full tensor name and grid (as `Grid` writes itself)."""


@dataclass
class _Seen:
    """What passed a matrix, summed over tokens: |g|^2 x x^T (cols, cols), g^2 (rows,), and how many tokens."""

    hessian: torch.Tensor
    squares: torch.Tensor
    tokens: int = 0


@dataclass
class _Run:
    """One pass over the model: the hidden states in front of every block, and the gradient at the block at hand."""

    model: PreTrainedModel
    layers: nn.ModuleList
    calibration: Calibration
    calls: list[Call] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)  # (windows, tokens, hidden), one more than blocks


def sensitivity(
    checkpoint: Checkpoint,
    calibration: Calibration,
    grids: Sequence[Grid],
    end_grids: Sequence[Grid],
    scale_dtype: torch.dtype,
    clip: Clip = "mse",
    tick: Callable[[], None] = lambda: None,
) -> Losses:
    """Nats that each matrix costs on each grid that fits it.

    Args:
        checkpoint: dense.
        calibration: text; a few thousand tokens do.
        grids: for the matrices inside the blocks.
        end_grids: for embedding and head.
        scale_dtype: of the scales of the result.
        clip: as the step that is to follow.
        tick: called after each of `2 * layers + 2` stages.
    """
    model = empty_model(checkpoint, "float32")
    layers = find_layers(model)
    run = _Run(model, layers, calibration)
    specs = {tensor.name: tensor for tensor in checkpoint.spec.tensors}
    first, *blocks, last = stages(checkpoint, model, layers)
    _load(model, checkpoint, first[3])
    model.tie_weights()
    ids = torch.tensor(calibration.windows)
    run.calls = [call.in_float32() for call in record_calls(model, layers, ids[:1])]
    run.states.append(_embedded(run, ids))
    tick()
    for place, (_, _, module, names) in enumerate(blocks):
        _load(model, checkpoint, names)
        run.states.append(_forward(run, module, place))
        free_(model, names)
        tick()
    _load(model, checkpoint, last[3])
    found: Losses = {}
    gradient, heads = _head(run, ids, end_grids, scale_dtype)
    end = next(t for t in checkpoint.spec.tensors if t.kind == ("embedding" if checkpoint.spec.is_tied else "head"))
    found[end.name] = heads
    tick()
    for place in reversed(range(len(blocks))):
        _, _, module, names = blocks[place]
        _load(model, checkpoint, names)
        matrices = {name: specs[name] for name in names if specs[name].kind in ("linear", "expert")}
        gradient, seen = _backward(run, module, place, gradient, matrices)
        for name, passed in seen.items():
            weight = _parameter(model, name)
            found[name] = _block_losses(weight, passed, grids, scale_dtype, clip, name)
        free_(model, names)
        tick()
    embedding = next(tensor for tensor in checkpoint.spec.tensors if tensor.kind == "embedding")
    looked_up = _embedding_losses(_parameter(model, embedding.name), ids, gradient, end_grids, scale_dtype)
    known = found.setdefault(embedding.name, dict.fromkeys(looked_up, 0.0))
    found[embedding.name] = {grid: known[grid] + loss for grid, loss in looked_up.items()}
    return found


def known_losses(
    checkpoint: Checkpoint,
    text: Prepared,
    grids: Sequence[Grid],
    end_grids: Sequence[Grid],
    dtype: str,
    tick: Callable[[], None],
) -> Losses:
    """`sensitivity` on the first windows of a calibration text, kept in the cache: the next budget costs nothing.

    Text that the model is to make up itself is stood in for by the bundled one.
    """
    cut = text.windows
    if cut is None:
        cut = prepare(checkpoint, CalibrationText(None, WINDOWS, text.size.window), 0.0).windows
    assert cut is not None
    cut = cut[:WINDOWS]
    asked = [content_hash(checkpoint), cut, [str(grid) for grid in (*grids, *end_grids)], dtype, VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def build(directory: Path) -> None:
        made = sensitivity(checkpoint, Calibration(cut), grids, end_grids, getattr(torch, dtype), tick=tick)
        (directory / LOSSES_NAME).write_text(json.dumps(made), encoding="utf-8")

    directory = build_once(cache_root() / "sensitivity" / key, build)
    found: Losses = json.loads((directory / LOSSES_NAME).read_text(encoding="utf-8"))
    return found


def _load(model: PreTrainedModel, checkpoint: Checkpoint, names: list[str]) -> None:
    load_dense_(model, checkpoint, names, keep_dtype=True)
    cast_(model, names, torch.float32)


def _parameter(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return found.data


@torch.no_grad()
def _embedded(run: _Run, ids: torch.Tensor) -> torch.Tensor:
    parts = [record_calls(run.model, run.layers, part)[0].hidden_states for part in ids.split(run.calibration.batch)]
    return torch.cat(parts).float()


@torch.no_grad()
def _forward(run: _Run, module: nn.Module, place: int) -> torch.Tensor:
    parts = run.states[-1].split(run.calibration.batch)
    return torch.cat([run_block(module, part, run.calls[place]) for part in parts])


def _head(
    run: _Run, ids: torch.Tensor, grids: Sequence[Grid], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of -log p(y), y ~ p, at the last hidden states, and what rounding the head costs on each grid."""
    head = run.model.get_output_embeddings()
    generator = torch.Generator().manual_seed(SEED)
    gradient = torch.empty_like(run.states[-1])
    entered: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    for place in range(len(ids)):
        hidden = run.states[-1][place : place + 1].clone().requires_grad_()
        with standing_in(run.layers, output=hidden):
            logits = run.model(ids[place : place + 1], use_cache=False).logits[0].float()  # (tokens, vocab)
        log_p = torch.log_softmax(logits, dim=-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, labels).sum().neg().backward()
        assert hidden.grad is not None
        gradient[place] = hidden.grad[0]
    handle.remove()
    chosen = torch.cat([x[0, :: max(1, x.shape[1] // HEAD_POSITIONS)] for x in entered])  # (positions, hidden)
    return gradient, _head_losses(head.weight.data, chosen, grids, scale_dtype)


@torch.no_grad()
def _head_losses(
    weight: torch.Tensor, hidden: torch.Tensor, grids: Sequence[Grid], scale_dtype: torch.dtype
) -> dict[str, float]:
    """KL at the positions of `hidden`. What an architecture does to its logits afterwards is left out of account."""
    reference = torch.log_softmax(hidden @ weight.T, dim=-1)
    losses = {}
    for grid in grids:
        if grid.fits(weight.shape[1]):
            rounded = quantize(weight, grid, scale_dtype).dequantize(torch.float32)
            log_q = torch.log_softmax(hidden @ rounded.T, dim=-1)
            losses[str(grid)] = float((reference.exp() * (reference - log_q)).sum(dim=-1).mean())
    return losses


def _backward(
    run: _Run, module: nn.Module, place: int, gradient: torch.Tensor, matrices: Mapping[str, TensorSpec]
) -> tuple[torch.Tensor, dict[str, _Seen]]:
    """The gradient in front of a block, and what passed its matrices on the way there and back."""
    seen: dict[str, _Seen] = {}
    handles = []

    def listen(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])

            def note(gradient_out: torch.Tensor) -> None:
                squares = gradient_out.reshape(-1, gradient_out.shape[-1]).square()  # (n, rows)
                mine = seen.setdefault(name, _Seen(torch.zeros(x.shape[1], x.shape[1]), torch.zeros(out.shape[-1])))
                mine.hessian.addmm_(x.T, x * squares.sum(dim=1, keepdim=True))
                mine.squares += squares.sum(dim=0)
                mine.tokens += len(x)

            out.register_hook(note)

        return hook

    for name in matrices:
        owner = run.model.get_submodule(name.rpartition(".")[0])
        handles.append(owner.register_forward_hook(listen(name)))
    before = torch.empty_like(gradient)
    step = run.calibration.batch
    for start in range(0, len(gradient), step):
        hidden = run.states[place][start : start + step].clone().requires_grad_()
        run_block(module, hidden, run.calls[place]).backward(gradient[start : start + step])
        assert hidden.grad is not None
        before[start : start + step] = hidden.grad
    for handle in handles:
        handle.remove()
    return before, seen


@torch.no_grad()
def _block_losses(
    weight: torch.Tensor, seen: _Seen, grids: Sequence[Grid], scale_dtype: torch.dtype, clip: Clip, name: str
) -> dict[str, float]:
    rows, squares = weight[::ROW_STRIDE], seen.squares[::ROW_STRIDE]
    shares = squares / squares.sum().clamp(min=torch.finfo(torch.float32).tiny)  # of the rows in the gradient
    losses: dict[str, float] = {}
    for grid in grids:
        if grid.fits(weight.shape[1]):
            error = quantize(rows, grid, scale_dtype, name, clip).dequantize(torch.float32) - rows
            each = ((error @ seen.hessian) * error).sum(dim=-1) / seen.tokens  # (rows,)
            losses[str(grid)] = 0.5 * float(each @ shares)
    return losses


@torch.no_grad()
def _embedding_losses(
    weight: torch.Tensor, ids: torch.Tensor, gradient: torch.Tensor, grids: Sequence[Grid], scale_dtype: torch.dtype
) -> dict[str, float]:
    """What rounding the rows that are looked up costs: 1/2 E[(g . error)^2] over the tokens of the text."""
    tokens, place = ids.reshape(-1).unique(return_inverse=True)
    rows, flat = weight[tokens], gradient.reshape(-1, gradient.shape[-1])
    losses = {}
    for grid in grids:
        if grid.fits(weight.shape[1]):
            error = quantize(rows, grid, scale_dtype).dequantize(torch.float32) - rows
            losses[str(grid)] = 0.5 * float((error[place] * flat).sum(dim=-1).square().mean())
    return losses
