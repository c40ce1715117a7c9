"""The order of the study of sparsity: properties of the measures, then every matrix, then the model's own answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from packlight.checkpoint.open import Checkpoint, open_checkpoint, short_name
from packlight.checkpoint.packed import packed_names
from packlight.checkpoint.save import content_hash
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.lab import sparsity as lab
from packlight.lab import sparsity_properties as properties
from packlight.lab.study import Study
from packlight.measure.bandwidth import hardware
from packlight.pipeline import Yardstick, evaluation_windows
from packlight.runtime.load import load_model

if TYPE_CHECKING:
    from packlight.pipeline import Watcher

WINDOW = 128
"""Tokens of text per window that the divergence is measured on."""
MODEL = "model_sha256"
QUICK_TRIALS, QUICK_BLOCKS = 300, 2


def run(
    study: Study, model: str, num_blocks: int | None, tokens: int, is_quick: bool, threads: int | None, watcher: Watcher
) -> None:
    """Measure what the study lacks. A study may hold several models, one after the other.

    Args:
        num_blocks: of the model's blocks, evenly spread; all for None.
        tokens: of text, for the divergence; 0 leaves it out, and the model is then never in memory as a whole.

    Raises:
        UsageError: fewer tokens than one window, or rows of another model of this name, or of other tokens, are there.
        CheckpointError: a matrix is damaged.
    """
    torch.set_num_threads(hardware(threads, is_probed=False).threads)
    checkpoint = open_checkpoint(model)
    name = short_name(model)
    matrices = lab.matrices(checkpoint, num_blocks or (QUICK_BLOCKS if is_quick else None))
    windows, note = evaluation_windows(checkpoint, Yardstick(None, WINDOW, tokens)) if tokens else ([], "")
    _check(study, checkpoint, name, sum(len(window) - 1 for window in windows))
    study.measure(MODEL, name, lambda: [Measurement(MODEL, content_hash(checkpoint), "sha256", name)])

    tick = watcher.stage("measures of sparsity, tried", len(properties.MEASURES))
    trials = QUICK_TRIALS if is_quick else properties.TRIALS
    for measure in properties.MEASURES:
        first = properties.row_name(next(iter(properties.PROPERTIES)))
        study.measure(first, measure.name, partial(properties.rows, measure, trials))
        tick()
    tick = watcher.stage("matrices, measured", len(matrices))
    for tensor in matrices:
        subject = subject_of(name, tensor.name)
        study.measure(lab.KEPT[0].name, subject, partial(lab.measured, checkpoint, tensor.name, subject))
        tick()
    if windows and packed_names(checkpoint.index):
        watcher.say(f"{name} is quantized: what zeroing would do is measured on dense matrices only")
    elif windows:
        watcher.say(f"text: {note}")
        _diverge(study, checkpoint, name, [tensor.name for tensor in matrices], windows, watcher)


def subject_of(model: str, tensor: str) -> str:
    """How rows name a matrix of a model."""
    return f"{model}: {tensor}"


def _diverge(
    study: Study, checkpoint: Checkpoint, name: str, tensors: list[str], windows: list[list[int]], watcher: Watcher
) -> None:
    left = [tensor for tensor in tensors if not study.ledger.has(lab.HALF, subject_of(name, tensor))]
    if not left:
        return
    tick = watcher.stage("half of a matrix zeroed", len(left) + 1)
    model = load_model(checkpoint, "float32")
    reference = lab.dense_reference(model, windows)
    tick()
    for tensor in left:
        study.ledger.add([lab.divergence(model, tensor, windows, reference, subject_of(name, tensor))])
        tick()


def _check(study: Study, checkpoint: Checkpoint, name: str, positions: int) -> None:
    """Rows that are there must be of this very model and of as much text."""
    if study.ledger.has(MODEL, name):
        known = next(row.value for row in study.rows if row.name == MODEL and row.subject == name)
        if known != content_hash(checkpoint):
            raise UsageError(f"the study in {study.out} holds another model that is called {name}: give a new --out")
    there = {
        row.n for row in study.rows if row.name == lab.HALF and row.n and row.subject.startswith(subject_of(name, ""))
    }
    if positions and there - {positions}:
        raise UsageError(
            f"the study in {study.out} measured {name} on {there.pop()} positions, not {positions}: "
            "give the same --tokens, or a new --out"
        )
