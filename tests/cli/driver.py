"""Running the command line, in this process or in one of its own, and what every failure must look like."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from packlight.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


def call(*argv: object) -> Ended:
    """Run in this process, which has torch already: seconds less than a process of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(item) for item in argv])
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def spawn(*argv: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start in a process of its own, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "packlight", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def run(*argv: object, cwd: Path | None = None, **environment: str) -> Ended:
    """Run in a process of its own to its end."""
    process = spawn(*argv, cwd=cwd, **environment)
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def listing(directory: Path) -> dict[str, int]:
    """Every file below a directory, hidden ones too, with its size; directories with -1."""
    return {
        str(path.relative_to(directory)): path.stat().st_size if path.is_file() else -1
        for path in sorted(directory.rglob("*"))
    }


def contents(directory: Path, without: Iterable[str] = ()) -> dict[str, bytes]:
    """Every file below a directory by its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in without
    }


def assert_one_sentence(ended: Ended, code: int = 2, says: str = "") -> None:
    """One line on stderr that begins with the program's name, nothing on stdout, and the right exit code."""
    complaints = [line for line in ended.err.splitlines() if line.startswith("packlight: ")]
    assert len(complaints) == 1, ended.err
    assert ended.err.splitlines()[-1] == complaints[0], ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert says in complaints[0]
    assert ended.code == code, ended


def assert_refused(
    argv: Iterable[object], where: Path, code: int = 2, says: str = "", environment: Mapping[str, str] | None = None
) -> None:
    """Run in this process: one sentence, and nothing is left behind below `where`."""
    before = listing(where)
    ended = call(*argv)
    assert_one_sentence(ended, code, says)
    assert listing(where) == before
