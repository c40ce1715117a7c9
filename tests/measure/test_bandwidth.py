"""The bandwidth probe: plausible, short, and honest about bad input."""

from __future__ import annotations

import os
import time

import pytest

from packlight.errors import UsageError
from packlight.measure.bandwidth import hardware, memory_bandwidth


def test_a_probe_is_plausible_and_short() -> None:
    import numpy  # noqa: F401  its import is not part of the probe

    started = time.perf_counter()
    rate = memory_bandwidth(1, buffer_bytes=16 << 20)
    assert time.perf_counter() - started < 5  # about 0.1 s where nothing else runs
    assert 1e8 < rate < 1e13


def test_a_buffer_smaller_than_the_threads() -> None:
    assert memory_bandwidth(3, buffer_bytes=1) > 0


def test_no_threads() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        memory_bandwidth(0)


def test_hardware_without_a_probe() -> None:
    machine = hardware(is_probed=False)
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.threads == machine.cores
    assert machine.ram_bytes > 10**8
    assert machine.bandwidth_bytes_per_s is None
    assert hardware(threads=1, is_probed=False).threads == 1
