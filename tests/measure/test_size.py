"""Bytes on disk are those of the weight files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packlight.checkpoint.open import open_checkpoint
from packlight.measure.size import disk_size, size_rows


def test_a_checkpoint_takes_what_its_weight_file_takes(tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir(tied=True)
    checkpoint = open_checkpoint(directory)
    size = (directory / "model.safetensors").stat().st_size
    assert disk_size(checkpoint) == size
    disk, bits = size_rows(checkpoint, "original", predicted=size + 1)
    assert (disk.name, disk.value, disk.predicted, disk.unit) == ("disk_bytes", size, size + 1, "bytes")
    # A tied head is stored once and counted once: 32 bits and the header's share.
    params = 256 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    assert bits.value == 8 * size / params
    assert 32 < bits.value < 34
