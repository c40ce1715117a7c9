"""What each block does to the text that passes through it, found in one pass through the unchanged model.

    influence of block l = 1 - mean over tokens of cos(x_l, x_(l+1))

x_l is what enters block l and x_(l+1) what leaves it (Men et al., "ShortGPT", arXiv 2403.03853). A block that hardly
turns its input has an influence near 0. The weights of one block are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from packlight.checkpoint.open import Checkpoint
from packlight.compress.walk import Calibration, cast_, embed, find_layers, free_, record_calls, run_block, stages
from packlight.runtime.load import empty_model, load_dense_

INFLUENCES_NAME = "influences.json"


@torch.no_grad()
def influences(checkpoint: Checkpoint, calibration: Calibration, tick: Callable[[], None]) -> tuple[float, ...]:
    """The influence of every block, computed in float32; `tick` is called after each."""
    model = empty_model(checkpoint, "float32")
    layers = find_layers(model)
    (_, _, _, outside), *blocks, _ = stages(checkpoint, model, layers)

    def load(names: list[str]) -> None:
        load_dense_(model, checkpoint, names, keep_dtype=True)
        cast_(model, names, torch.float32)

    load(outside)
    model.tie_weights()
    first = record_calls(model, layers, torch.tensor(calibration.windows[:1]))
    hidden = calibration.allocate("ranking", first[0].hidden_states.shape[-1])  # (windows, tokens, hidden)
    embed(model, layers, calibration, hidden)
    found = []
    for place, (_, _, module, names) in enumerate(blocks):
        load(names)
        call, alike = first[place].in_float32(), 0.0
        for start in range(0, len(hidden), calibration.batch):
            part = slice(start, start + calibration.batch)
            out = run_block(module, hidden[part], call)
            alike += float(torch.cosine_similarity(hidden[part], out, dim=-1).double().sum())
            hidden[part] = out
        found.append(1 - alike / hidden[..., 0].numel())
        free_(model, names)
        tick()
    return tuple(found)


def known_influences(
    checkpoint: Checkpoint, calibration: Calibration, file: Path, start: Callable[[int], Callable[[], None]]
) -> tuple[float, ...]:
    """What `influences` finds, kept in `file`: a job that was cut short goes on with the same.

    Args:
        start: called with the number of stages if there is work to do; returns the `tick` for them.
    """
    if not file.exists():
        found = influences(checkpoint, calibration, start(checkpoint.spec.num_layers))
        half = file.with_suffix(".part")
        half.write_text(json.dumps(found), encoding="utf-8")
        half.replace(file)
    return tuple(json.loads(file.read_text(encoding="utf-8")))
