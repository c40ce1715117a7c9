"""Peak memory: the allocator's own peak on CUDA, the peak resident set of the process on a CPU.

On a CPU the number is only clean in a process that does nothing else, so `footprint` measures in a child process.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from packlight.runtime.allocator import trim

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def flush(device: str = "cpu") -> None:
    """Forget what is no longer used and start a new peak: collect garbage, empty the allocator's cache, reset."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim()
    _CLEAR_REFS.write_text("5")  # resets VmHWM of this process, see proc(5)


def new_peak(device: str = "cpu") -> None:
    """Start a new peak; what the allocator of a CUDA device keeps for the next tensor stays, as it does in a program
    that goes on."""
    if not device.startswith("cuda"):
        flush(device)
        return
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)


def wait(device: str = "cpu") -> None:
    """Until a CUDA device has done what it was given: a clock that is read earlier measures the giving."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def current_bytes(device: str = "cpu") -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _status("VmRSS")


def peak_bytes(device: str = "cpu") -> int:
    """Highest number of bytes in use since the last `flush`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: peak memory is measured on Linux only")
