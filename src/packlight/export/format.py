"""What every export format is: a frozen dataclass of its options with one verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from packlight.checkpoint.open import Checkpoint
from packlight.evidence import Measurement

Stage = Callable[[str, int], Callable[[], None]]
"""Announces work of so many steps under a label; what it returns is called after each step."""


class Format(Protocol):
    """A foreign format and the options of writing it."""

    name: ClassVar[str]

    def write(self, checkpoint: Checkpoint, out: Path, stage: Stage) -> list[Measurement]:
        """Write, prove and publish; returns the rows of evidence, which lie beside the result as well.

        Raises:
            UsageError: this checkpoint cannot be written in this format; the message says why.
            TargetError: `out` exists or cannot be written.
            ProofError: what was written does not answer as the checkpoint does; nothing is published.
        """
        ...
