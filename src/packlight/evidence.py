"""Rows of evidence: what was measured, beside what was predicted, and where it was measured.

A ledger is a JSON-lines file that is appended to as results arrive. This module writes and reads rows; it measures
nothing itself.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

LEDGER_NAME = "evidence.jsonl"


@dataclass(frozen=True)
class Measurement:
    """One row.

    Args:
        name: what was measured, snake case with its unit where it has one: `peak_bytes`, `perplexity`, `kl`.
        value: the result; None for a failure, which `note` then explains.
        unit: `bytes`, `s`, `tokens/s`, `nats`, `1`.
        subject: what it was measured on: a model, a file, a tensor.
        predicted: what the plan had claimed, in the same unit.
        spread: standard error or half the range of the repeats, as `note` says; same unit.
        n: how many repeats, tokens or samples.
        note: anything a reader needs to judge the number.
        command: the command line that produced it.
        commit: git commit of packlight, or its version.
        environment: machine and library versions, see `environment`.
    """

    name: str
    value: float | int | str | bool | None
    unit: str
    subject: str
    predicted: float | int | None = None
    spread: float | None = None
    n: int | None = None
    note: str | None = None
    command: str | None = None
    commit: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)


def append(ledger: Path, rows: Iterable[Measurement]) -> None:
    """Append rows to a ledger, each as one flushed line; None values and empty mappings are left out."""
    with ledger.open("a", encoding="utf-8") as stream:
        for row in rows:
            kept = {key: value for key, value in asdict(row).items() if value not in (None, {})}
            if row.value is None:
                kept["value"] = None
            stream.write(json.dumps(kept, ensure_ascii=False) + "\n")
            stream.flush()
        os.fsync(stream.fileno())


def read(ledger: Path) -> list[Measurement]:
    """All whole rows of a ledger. A last line that a kill cut short is left out."""
    if not ledger.exists():
        return []
    rows = []
    # split("\n"), because splitlines() also cuts at U+2028, which JSON allows inside a string
    for line in ledger.read_text(encoding="utf-8").split("\n")[:-1]:
        rows.append(Measurement(**json.loads(line)))
    return rows


def repair(ledger: Path) -> None:
    """Cut a half-written last line off, so that appending goes on cleanly after a kill."""
    if not ledger.exists():
        return
    data = ledger.read_bytes()
    if data and not data.endswith(b"\n"):
        whole = data.rfind(b"\n") + 1
        with ledger.open("r+b") as stream:
            stream.truncate(whole)


class Ledger:
    """A job's ledger. Stations that were passed are known by their rows, so that a job that goes on passes over them.

    Args:
        path: the file; a line that a kill cut short is cut off.
        threads: recorded with every row.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        repair(path)
        self.path = path
        self.rows = read(path)
        self._threads = threads

    def add(self, rows: Iterable[Measurement]) -> None:
        """Append rows, each with the command, the commit and the machine that it comes from."""
        made = stamped(rows, self._threads)
        append(self.path, made)
        self.rows += made

    def has(self, name: str, subject: str) -> bool:
        """Whether a row of this name is there for this subject."""
        return any(row.name == name and row.subject == subject for row in self.rows)


def stamped(rows: Iterable[Measurement], threads: int | None = None) -> list[Measurement]:
    """Rows with the command, the commit and the machine they come from."""
    stamp: dict[str, Any] = {"command": command_line(), "commit": commit(), "environment": environment(threads)}
    return [replace(row, **stamp) for row in rows]


def environment(threads: int | None = None) -> dict[str, Any]:
    """The machine and the versions that a number depends on. Imports nothing heavy."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("packlight", "torch", "transformers", "compressed-tensors")},
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    """The CUDA device of a process that computes on one; nothing elsewhere. Imports and starts nothing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"gpu": found.name, "gpu_bytes": found.total_memory, "cuda": torch.version.cuda}


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def commit() -> str:
    """The git commit that packlight runs from, with `+` where files differ from it; its version when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return f"packlight {_version('packlight')}"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def command_line() -> str:
    """The command line of this process. Of the program and of absolute paths only the last part: ledgers are published
    with artifacts, and where somebody keeps files is nobody's business."""
    program, *words = sys.argv
    return " ".join([Path(program).name, *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
