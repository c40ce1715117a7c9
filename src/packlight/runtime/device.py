"""Where a model computes, by name: `auto` is a CUDA device where there is one, else the CPU."""

from __future__ import annotations

from packlight.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        UsageError: no such name, or no CUDA device.
    """
    import torch  # not above: a command line shows the names before anything is computed

    if name not in DEVICES:
        raise UsageError(f"a device is one of {', '.join(DEVICES)}, not {name!r}")
    is_there = torch.cuda.is_available()
    if name == "cuda" and not is_there:
        raise UsageError("there is no CUDA device that torch can use here: choose cpu, or install torch for CUDA")
    return "cuda" if is_there and name != "cpu" else "cpu"
