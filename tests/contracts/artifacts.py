"""Artifacts for tests that look at one thing: made the whole way, but for the proof in two fresh processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from packlight import pipeline
from packlight.checkpoint.open import open_checkpoint
from packlight.compress.calibration import CalibrationText
from packlight.compress.registry import build
from packlight.measure.proof import distance, read_proof
from packlight.plan.layout import Layout
from packlight.runtime.load import load_model


def make_artifact(model: Path, out: Path, layout: Layout | None = None, **options: Any) -> Path:
    """Apply one step, rtn where `options` name no other, and publish the result at `out` without proving it."""
    step = build({"method": "rtn", **options})
    text = CalibrationText(windows=4, window=32)
    with patch.object(pipeline.proof, "prove", lambda *arguments: iter(())):
        return pipeline.quantize(str(model), out, step, pipeline.Silent(), layout, text).path


def proof_distance(directory: Path) -> tuple[float, PreTrainedModel]:
    """How far a loaded artifact is from the tensors that were in memory when it was made, in nats; and the model."""
    proof = read_proof(directory)
    model = load_model(open_checkpoint(directory))
    with torch.inference_mode():
        logits = model(torch.tensor([proof["ids"]]), use_cache=False).logits[0, -len(proof["top_ids"]) :].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(proof["top_ids"]))
    return distance(proof, found.tolist()), model
