"""Measuring in a process of its own: one JSON request on stdin, one JSON answer as the last line of stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packlight.errors import MeasurementError


def ask(arguments: Sequence[str], request: Mapping[str, Any], threads: int | None = None) -> dict[str, Any]:
    """Run `python ARGUMENTS`, hand it `request` and return its answer.

    Args:
        threads: for every thread pool of the child; None leaves them to their defaults.

    Raises:
        MeasurementError: the child failed; the message ends with the last line that it wrote.
    """
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *arguments],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise MeasurementError(f"the measuring process ended with code {done.returncode}: {said}")
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except ValueError as error:
        raise MeasurementError(f"the measuring process answered with {lines[-1][:80]!r}, which is no JSON") from error
    return answer


def answer(result: Mapping[str, Any]) -> None:
    """Called by the child, last."""
    print(json.dumps(result), flush=True)


def request() -> dict[str, Any]:
    """Called by the child, first."""
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    return asked


def script(name: str) -> str:
    """Path of a script beside this file that is run by path, so that it does not import packlight."""
    return str(Path(__file__).with_name(name))
