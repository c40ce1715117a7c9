"""Stand-ins for what takes seconds: the machine's probe, and the children that measure and prove.

Run as a script it is the command line with these in place and a pause after every block, to be killed in the middle.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packlight import pipeline
from packlight.compress import run
from packlight.evidence import Measurement
from packlight.measure.footprint import Footprint
from packlight.spec import Hardware


def put_in(put: Callable[[Any, str, Any], None]) -> None:
    """`put` is `setattr` or a monkeypatch's."""
    put(pipeline, "calibrate", _calibrate)
    put(pipeline, "footprint", _footprint)
    put(pipeline.proof, "prove", _prove)


def pause_after_blocks(seconds: float) -> None:
    store = run._store

    def slow(*arguments: Any) -> None:
        store(*arguments)
        time.sleep(seconds)

    setattr(run, "_store", slow)  # noqa: B010 - mypy would not let a private function be assigned


def _calibrate(machine: Hardware, kernels: object, tick: Callable[[], None]) -> Hardware:
    return machine


def _footprint(
    path: Path,
    context: int,
    users: int = 1,
    dtype: str | None = None,
    threads: int | None = None,
    loader: str | None = None,
) -> Any:
    state = None if loader is None else 100_000
    return Footprint(1_000_000, 10_000_000, 0.1, 100.0, 1.0, 50.0, 1.0, context, users, 3, state)


def _prove(path: Path, is_portable: bool = True) -> Iterator[Measurement]:
    yield Measurement("proof_runtime_kl", 0.0, "nats", "packed")


if __name__ == "__main__":
    from packlight.cli.main import main

    put_in(setattr)
    pause_after_blocks(float(os.environ["PAUSE"]))
    main(sys.argv[1:])
