"""Bytes on disk: the weight files, headers included."""

from __future__ import annotations

from packlight.checkpoint.open import Checkpoint
from packlight.evidence import Measurement


def disk_size(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's weight files."""
    return sum(path.stat().st_size for path in {entry.file for entry in checkpoint.index.values()})


def size_rows(checkpoint: Checkpoint, subject: str, predicted: int | None = None) -> list[Measurement]:
    """Bytes of the weight files, and those bits over all parameters, scales and headers included."""
    size = disk_size(checkpoint)
    return [
        Measurement("disk_bytes", size, "bytes", subject, predicted=predicted),
        Measurement("bits_per_weight", 8 * size / checkpoint.spec.num_params, "bits", subject),
    ]
