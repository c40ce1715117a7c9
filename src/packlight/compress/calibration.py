"""The text that passes through the blocks for the methods that look at it: the user's, the bundled one, the model's.

What a model makes up itself is close to what it was trained on, whatever that was, and needs no data at all (Liu et
al., "LLM-QAT", arXiv 2305.17888, section 3.1). It is sampled once, into the job's work directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from packlight.checkpoint.open import Checkpoint
from packlight.compress.walk import Calibration
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.measure.bandwidth import free_ram_bytes
from packlight.measure.text import calibration_text, load_text, windows
from packlight.plan.memory import CalibrationSize, Reading, stream_bytes
from packlight.runtime.complete import sample_windows
from packlight.runtime.load import load_model
from packlight.runtime.tokenizer import load_tokenizer

SHARE_OF_FREE_RAM = 0.25
"""Hidden states that would take more than this share of the free memory are kept on disk."""
WINDOWS_NAME = "calibration.json"
SEED = 0

Data = Path | Literal["self"] | None


@dataclass(frozen=True)
class CalibrationText:
    """What to calibrate on.

    Args:
        data: text file; None for the bundled calibration text; 'self' for text that the model makes up.
        windows: windows of text, at most.
        window: tokens per window.
        on_disk: keep the hidden states between two blocks on disk; default: where memory is short.
    """

    data: Data = None
    windows: int = 128
    window: int = 512
    on_disk: bool | None = None

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window < 2:
            raise UsageError(
                f"calibration needs at least one window of 2 tokens, not {self.windows} of {self.window} tokens"
            )


@dataclass(frozen=True)
class Prepared:
    """A calibration that has been looked at, and not run yet: its text was read, its size is known."""

    checkpoint: Checkpoint
    name: str
    sha256: str | None
    windows: list[list[int]] | None
    """None where the model is still to make them up."""
    size: CalibrationSize

    @property
    def note(self) -> str:
        """One line for people."""
        text = self.name if self.sha256 is None else f"{self.name} (sha256 {self.sha256[:12]})"
        return f"{text}, {self.size.windows} windows of {self.size.window} tokens"

    def asked(self) -> dict[str, Any]:
        """As a recipe holds it."""
        return {
            "text": self.name,
            "sha256": self.sha256,
            "windows": self.size.windows,
            "window": self.size.window,
            **({"seed": SEED} if self.sha256 is None else {}),
        }

    def ready(self, work: Path, tick: Callable[[], None]) -> tuple[Calibration, Measurement]:
        """The windows for the walk and their row of evidence; those that were made up earlier are found in `work`."""
        cut = self.windows
        if cut is None:
            kept = work / WINDOWS_NAME
            if not kept.exists():
                made = sample_windows(load_model(self.checkpoint), self.size.windows, self.size.window, SEED, tick)
                half = kept.with_suffix(".part")
                half.write_text(json.dumps(made), encoding="utf-8")
                half.replace(kept)
            cut = json.loads(kept.read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps(cut).encode()).hexdigest()
        row = Measurement(
            "calibration_tokens",
            sum(map(len, cut)),
            "1",
            "packed",
            note=f"{self.note}; sha256 of the token ids {digest}",
        )
        spill = work / "activations" if self.size.on_disk else None
        return Calibration(cut, spill=spill, keeps_targets=self.size.reading.keeps_targets), row


def prepare(checkpoint: Checkpoint, asked: CalibrationText, reading: Reading | None = None) -> Prepared:
    """Read and cut the text, and decide where hidden states are kept.

    Args:
        reading: what the step asks of it; None for a sweep alone.

    Raises:
        TextError: the text cannot be read, or is shorter than one window.
    """
    spec = checkpoint.spec
    window = min(asked.window, spec.max_context)
    cut: list[list[int]] | None = None
    name, sha256 = "text made up by the model", None
    if asked.data != "self":
        text = calibration_text() if asked.data is None else load_text(asked.data)
        ids = load_tokenizer(checkpoint)(text.content, add_special_tokens=False, verbose=False)["input_ids"]
        cut = windows(ids, window, asked.windows * window)
        name, sha256 = text.name, text.sha256
    count = asked.windows if cut is None else len(cut)
    size = CalibrationSize(count, window, reading or Reading(), bool(asked.on_disk))
    if asked.on_disk is None and stream_bytes(spec, size) > SHARE_OF_FREE_RAM * free_ram_bytes():
        size = replace(size, on_disk=True)
    return Prepared(checkpoint, name, sha256, cut, size)


def parse_data(text: str | None) -> Data:
    """What a user wrote for --data: a file, or 'self'."""
    return "self" if text == "self" else None if text is None else Path(text)
