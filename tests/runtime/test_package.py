"""What a package says of itself, and everything that is refused before a graph is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packlight.checkpoint.cache import file_sha256
from packlight.errors import CheckpointError
from packlight.runtime.package import (
    GRAPHS_NAME,
    NOTE_NAME,
    FileNote,
    Machine,
    Package,
    check_hashes,
    check_machine,
    is_package,
    read_package,
)
from packlight.runtime.package_decoder import load_package, this_machine

HERE = Machine("2.13.0+cpu", "linux", "x86_64", frozenset({"avx2", "fma3", "avx512_f"}))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package whose note is right and whose graphs are no graphs."""
    (tmp_path / GRAPHS_NAME).write_bytes(b"graphs")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"weights")
    files = {
        name: FileNote((tmp_path / name).stat().st_size, file_sha256(tmp_path / name))
        for name in (GRAPHS_NAME, "weights/model.safetensors")
    }
    made = Package(
        tmp_path, "0.1.0", HERE, "demo", "LlamaForCausalLM", "float32", 256, 1, 64, 16, ((2, 16, 16),), frozenset({0}),
        {"head": "embedding"}, files,
    )  # fmt: skip
    (tmp_path / NOTE_NAME).write_text(json.dumps(made.to_json()))
    return made


def edit(package: Package, change: Callable[[dict[str, Any]], object]) -> None:
    note = package.path / NOTE_NAME
    found = json.loads(note.read_text())
    change(found)
    note.write_text(json.dumps(found))


def test_a_note_is_read_as_it_was_written(package: Package) -> None:
    assert is_package(package.path)
    assert read_package(package.path) == package
    check_machine(package, HERE)
    check_machine(package, replace(HERE, cpu_features=HERE.cpu_features | {"amx_tile"}))
    check_hashes(package)


def test_looking_for_a_package_is_cheap() -> None:
    code = "import sys; from packlight.runtime.package import is_package as f; f('.'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_package(tmp_path: Path) -> None:
    assert not is_package(tmp_path)
    assert not is_package(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no compiled package"):
        read_package(tmp_path)


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (replace(HERE, torch="2.14.0+cpu"), r"compiled for torch 2\.13\.0\+cpu and 2\.14\.0\+cpu is installed"),
        (replace(HERE, architecture="aarch64"), "compiled for linux on x86_64 and this is linux on aarch64"),
        (replace(HERE, system="darwin"), "this is darwin on x86_64"),
        (replace(HERE, cpu_features=frozenset({"fma3"})), "a CPU with avx2, avx512_f, which this one lacks"),
    ],
)
def test_another_machine_is_refused(package: Package, here: Machine, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as refused:
        check_machine(package, here)
    assert "packlight export --to compiled" in str(refused.value)


def test_loading_asks_for_the_machine_first(package: Package) -> None:
    edit(package, lambda note: note["machine"].update(torch="1.0.0"))
    with pytest.raises(CheckpointError, match=r"compiled for torch 1\.0\.0"):
        load_package(package.path)


def test_files_of_another_size_are_refused(package: Package) -> None:
    weights = package.path / "weights" / "model.safetensors"
    weights.write_bytes(b"weight")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 6 bytes, not 7"):
        read_package(package.path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_package(package.path)


def test_files_that_were_changed_are_refused(package: Package) -> None:
    (package.path / "weights" / "model.safetensors").write_bytes(b"Weights")
    check_hashes(read_package(package.path), [GRAPHS_NAME])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        check_hashes(read_package(package.path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda note: note.update(version=2), "version 2; this packlight reads"),
        (lambda note: note.update(format="zip"), "of the format 'zip'"),
        (lambda note: note.pop("files"), r"is damaged \(KeyError"),
        (lambda note: note.update(cache=[[1, 2]]), r"is damaged \(ValueError"),
        (lambda note: note.update(context="long"), r"is damaged \(ValueError"),
        (lambda note: note.update(machine=None), r"is damaged \(TypeError"),
        (lambda note: note.update(files=[1]), "is damaged"),
        (lambda note: note["files"].update({"../out": {"nbytes": 1, "sha256": ""}}), "outside the package"),
        (lambda note: note["files"].update({"/etc/passwd": {"nbytes": 1, "sha256": ""}}), "outside the package"),
    ],
)
def test_a_damaged_note_is_refused(package: Package, change: Callable[[dict[str, Any]], object], says: str) -> None:
    edit(package, change)
    with pytest.raises(CheckpointError, match=says):
        read_package(package.path)


def test_graphs_that_are_none_are_refused(package: Package) -> None:
    edit(package, lambda note: note.update(machine={**note["machine"], **json_machine()}))
    with pytest.raises(CheckpointError):
        load_package(package.path)


def json_machine() -> dict[str, Any]:
    here = this_machine()
    return {"torch": here.torch, "system": here.system, "architecture": here.architecture, "cpu_features": ["avx2"]}
