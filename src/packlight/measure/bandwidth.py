"""How fast this machine reads memory, in about a fifth of a second, and what the machine is.

Decoding reads every weight once per token, so this one number bounds tokens per second from above.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from packlight.errors import UsageError
from packlight.evidence import cpu_name
from packlight.spec import Hardware

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUFFER_BYTES = 256 << 20
"""Larger than most last-level caches, small enough to be filled in a moment."""
SHARE_OF_FREE_RAM = 8
PROBE_SECONDS = 0.1
MIN_PASSES = 2
READS = 4
"""Times that a pass reads the buffer, so that the threads' different starts weigh little."""
MATMUL, MATMUL_REPEATS = 512, 8
"""Rows and columns of the matrices that are multiplied, and how often."""


def memory_bandwidth(threads: int, buffer_bytes: int | None = None) -> float:
    """Bytes per second that `threads` threads read together, the best of several passes over one buffer.

    A pass takes the maximum of int8 values: of numpy's reductions the one that was bound by memory most, ahead of
    sums and dot products, and it runs without the interpreter lock. The buffer is 256 MiB, or an eighth of the free
    memory where that is less.

    Raises:
        UsageError: fewer than one thread.
    """
    import numpy as np

    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    size = buffer_bytes or min(BUFFER_BYTES, free_ram_bytes() // SHARE_OF_FREE_RAM)
    parts = np.array_split(np.empty(max(size, threads), dtype=np.int8), threads)

    def read(part: NDArray[np.int8]) -> None:
        for _ in range(READS):
            np.max(part)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))  # pages that were never written are all one page of zeros
        seconds: list[float] = []
        while len(seconds) < MIN_PASSES or sum(seconds) < PROBE_SECONDS:
            begin = time.perf_counter()
            list(pool.map(read, parts))
            seconds.append(time.perf_counter() - begin)
    return READS * sum(part.nbytes for part in parts) / min(seconds)


def matmul_flops(threads: int) -> float:
    """Float32 operations per second of numpy's matrix product, the best of several; a thirtieth of a second.

    numpy computes with all cores; for fewer threads their share is taken.
    """
    import numpy as np

    left, right = np.ones((MATMUL, MATMUL), dtype=np.float32), np.ones((MATMUL, MATMUL), dtype=np.float32)
    seconds = []
    for _ in range(MATMUL_REPEATS):
        begin = time.perf_counter()
        np.matmul(left, right)
        seconds.append(time.perf_counter() - begin)
    return 2 * MATMUL**3 / min(seconds) * min(1.0, threads / _physical_cores())


def hardware(threads: int | None = None, is_probed: bool = True) -> Hardware:
    """This machine. `threads` defaults to its physical cores; without a probe the bandwidth stays unknown."""
    cores = _physical_cores()
    threads = threads or cores
    return Hardware(
        cpu=cpu_name(),
        cores=cores,
        threads=threads,
        ram_bytes=_ram_bytes(),
        bandwidth_bytes_per_s=memory_bandwidth(threads) if is_probed else None,
    )


def _physical_cores() -> int:
    """Cores that this process may use, without their second threads where the system tells them apart."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return usable
    fields = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    packages = [value.strip() for key, value in fields if key.strip() == "physical id"]
    cores = [value.strip() for key, value in fields if key.strip() == "core id"]
    return min(usable, len(set(zip(packages, cores, strict=False))) or usable)


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_ram_bytes() -> int:
    """What the system could hand out without swapping."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _ram_bytes() // 2
