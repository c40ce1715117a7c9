"""What each matrix would cost the model on each grid, in nats of KL divergence, from one pass forward and one back.

A small change D of a matrix changes the output distribution by

    KL = 1/2 E[ sum over labels y ~ p of p(y) (g . D x)^2 ],   g = gradient of -log p(y) at the matrix's output

to second order: the Fisher information (Amari, "Natural Gradient", 1998). With gradients for labels drawn from the
model's own distribution, the errors of different rows taken as uncorrelated, and a token's gradient as large in every
row as it is on the whole, it becomes

    KL = 1/2 sum_r G_r D_r H D_r^T,   G_r = E[g_r^2] / E[|g|^2],   H = E[|g|^2 x x^T]

(a Kronecker factorization as in Martens & Grosse, "K-FAC", arXiv 1503.05671, but with every token weighted by its own
gradient: the few tokens with enormous activations that language models have carry hardly any gradient). That is for
rounding to nearest; a method that rounds better loses a share of that (`Step.loss_share`). Changes of different
matrices add up.

The head's own cost is measured, not estimated: its logits with and without rounding are compared on some positions.
The estimate is a ranking in nats: at 3 and 2 bits, far from small changes, the sum is off, and the result is measured
anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from packlight.checkpoint.cache import build_once, cache_root
from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.save import content_hash
from packlight.compress.calibration import CalibrationText, Prepared, prepare
from packlight.compress.sweep import Sweep
from packlight.compress.walk import Calibration
from packlight.ops.grid import Clip, quantize
from packlight.spec import Grid

ROW_STRIDE = 8
"""Every eighth row of a matrix is rounded for the estimate: rows of one matrix are alike."""
HEAD_POSITIONS = 32
"""Positions of each window on which a rounded head is compared with the exact one."""
WINDOWS = 8
"""Windows of calibration text that `known_losses` looks at."""
VERSION = 3
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
    sweep = Sweep(checkpoint, calibration.windows, calibration.batch)
    seen: dict[str, _Seen] = {}

    def note(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        squares = gradient.square()  # (n, rows)
        if name not in seen:
            seen[name] = _Seen(torch.zeros(x.shape[1], x.shape[1]), torch.zeros(gradient.shape[1]))
        mine = seen[name]
        mine.hessian.addmm_(x.T, x * squares.sum(dim=1, keepdim=True))
        mine.squares += squares.sum(dim=0)
        mine.tokens += len(x)

    sweep.forward(tick)
    entered = sweep.head()
    kind = "embedding" if checkpoint.spec.is_tied else "head"
    end = next(tensor for tensor in checkpoint.spec.tensors if tensor.kind == kind)
    found: Losses = {end.name: _head_losses(sweep.parameter(end.name), entered, end_grids, scale_dtype, clip)}
    tick()
    for _, names in sweep.back(note, tick):
        for name in names:
            if name in seen:
                weight, passed = sweep.parameter(name), seen.pop(name)
                found[name] = _block_losses(weight, passed, grids, scale_dtype, clip, name)
    embedding = next(tensor for tensor in checkpoint.spec.tensors if tensor.kind == "embedding")
    looked_up = _embedding_losses(
        sweep.parameter(embedding.name), sweep.ids, sweep.gradient, end_grids, scale_dtype, clip
    )
    known = found.setdefault(embedding.name, dict.fromkeys(looked_up, 0.0))
    found[embedding.name] = {grid: known[grid] + loss for grid, loss in looked_up.items()}
    return found


def known_losses(
    checkpoint: Checkpoint,
    text: Prepared,
    grids: Sequence[Grid],
    end_grids: Sequence[Grid],
    dtype: str,
    start: Callable[[int], Callable[[], None]],
) -> Losses:
    """`sensitivity` on the first windows of a calibration text, kept in the cache: the next budget costs nothing.

    `start` is called with the number of stages if there is work to do, and returns the `tick` for them.

    Text that the model is to make up itself is stood in for by the bundled one.
    """
    cut = text.windows
    if cut is None:
        cut = prepare(checkpoint, CalibrationText(None, WINDOWS, text.size.window)).windows
    assert cut is not None
    cut = cut[:WINDOWS]
    asked = [content_hash(checkpoint), cut, [str(grid) for grid in (*grids, *end_grids)], dtype, VERSION]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def build(directory: Path) -> None:
        tick = start(2 * checkpoint.spec.num_layers + 2)
        made = sensitivity(checkpoint, Calibration(cut), grids, end_grids, getattr(torch, dtype), tick=tick)
        (directory / LOSSES_NAME).write_text(json.dumps(made), encoding="utf-8")

    directory = build_once(cache_root() / "sensitivity" / key, build)
    found: Losses = json.loads((directory / LOSSES_NAME).read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def _head_losses(
    weight: torch.Tensor, entered: torch.Tensor, grids: Sequence[Grid], scale_dtype: torch.dtype, clip: Clip
) -> dict[str, float]:
    """KL at some positions of `entered`, (windows, tokens, hidden). What an architecture does to its logits afterwards
    is left out of account."""
    stride = max(1, entered.shape[1] // HEAD_POSITIONS)
    hidden = entered[:, ::stride].reshape(-1, entered.shape[-1])
    reference = torch.log_softmax(hidden @ weight.T, dim=-1)
    losses = {}
    for grid in grids:
        if grid.fits(weight.shape[1]):
            rounded = quantize(weight, grid, scale_dtype, clip=clip).dequantize(torch.float32)
            log_q = torch.log_softmax(hidden @ rounded.T, dim=-1)
            losses[str(grid)] = float((reference.exp() * (reference - log_q)).sum(dim=-1).mean())
    return losses


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
    weight: torch.Tensor,
    ids: torch.Tensor,
    gradient: torch.Tensor,
    grids: Sequence[Grid],
    scale_dtype: torch.dtype,
    clip: Clip,
) -> dict[str, float]:
    """What rounding the rows that are looked up costs: 1/2 E[(g . error)^2] over the tokens of the text."""
    tokens, place = ids.reshape(-1).unique(return_inverse=True)
    rows, flat = weight[tokens], gradient.reshape(-1, gradient.shape[-1])
    losses = {}
    for grid in grids:
        if grid.fits(weight.shape[1]):
            error = quantize(rows, grid, scale_dtype, clip=clip).dequantize(torch.float32) - rows
            losses[str(grid)] = 0.5 * float((error[place] * flat).sum(dim=-1).square().mean())
    return losses
