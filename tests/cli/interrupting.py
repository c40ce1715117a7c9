"""Cutting jobs short, by Ctrl-C at a chosen call or by a signal to a process, and what must be left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.driver import Ended, contents

from packlight.evidence import LEDGER_NAME


def interrupt_in(patched: pytest.MonkeyPatch, owner: Any, name: str, after: int = 0) -> None:
    """Ctrl-C when `owner.name` is called for the time after `after`."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    patched.setattr(owner, name, interrupted)


def assert_interrupted(ended: Ended) -> None:
    assert ended.code == 130
    assert ended.err.strip() == "packlight: interrupted: give the same command again to go on"
    assert ended.out == ""


def assert_same_artifact(mine: Path, wanted: Path) -> None:
    """The same files, byte by byte, but for the ledger, which has times."""
    a, b = contents(mine, [LEDGER_NAME]), contents(wanted, [LEDGER_NAME])
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def blocks_of(out: Path) -> list[Path]:
    """The finished blocks of a job that is not done."""
    return list((out.parent / f".{out.name}.partial" / "blocks").glob("*.safetensors"))


def start_and_end(how: int, after: int, out: Path, *argv: object, pause: float = 0.2) -> Ended:
    """Start a process with a pause after every block, and signal it when `after` blocks are there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.stand_ins", *map(str, argv), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PAUSE": str(pause)},
    )
    while len(blocks_of(out)) < after and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    said, complained = process.communicate(timeout=60)
    return Ended(process.returncode, said, complained)
