"""A compiled package: a model's graphs, ahead of time, and its weights, once. Made by `export/compiled.py`. No torch.

package.json      what it is, which machine it fits, and sizes and hashes of what follows
graphs.pt2        two graphs, `prefill` and `decode`, as AOTInductor packs them
weights/          safetensors; mapped, and shared by both graphs
tokenizer files   as in the checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packlight.checkpoint.cache import file_sha256
from packlight.checkpoint.shards import load_json
from packlight.errors import CheckpointError

NOTE_NAME = "package.json"
GRAPHS_NAME = "graphs.pt2"
WEIGHTS_NAME = "weights"
FORMAT = "packlight-compiled"
VERSION = 1

_MAKE_AGAIN = "make it again with packlight export --to compiled"


@dataclass(frozen=True)
class Machine:
    """What a package fits, or what is here.

    Args:
        torch: its version: the graphs call into the library that they were compiled for.
        system: `linux`.
        architecture: `x86_64`.
        cpu_features: instruction sets that the graphs use, as `torch.cpu.get_capabilities` names them.
    """

    torch: str
    system: str
    architecture: str
    cpu_features: frozenset[str]


@dataclass(frozen=True)
class FileNote:
    """Size in bytes and SHA-256, hexadecimal, of one file of a package."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """What `package.json` says.

    Args:
        path: the directory.
        packlight: version that made it.
        machine: what it fits.
        source: the checkpoint that it was made from.
        model_class: transformers' class of it.
        dtype: of its logits and of its KV cache.
        vocab_size: width of its logits.
        batch: sequences at the same time.
        context: tokens per sequence.
        chunk: tokens of a prompt that are computed at once.
        cache: (kv_heads, key width, value width) of each layer.
        stop_ids: tokens that end an answer.
        same: constants of the graphs that are stored under another name, such as a tied head.
        files: every file but `package.json`, by its path inside the package.
    """

    path: Path
    packlight: str
    machine: Machine
    source: str
    model_class: str
    dtype: str
    vocab_size: int
    batch: int
    context: int
    chunk: int
    cache: tuple[tuple[int, int, int], ...]
    stop_ids: frozenset[int]
    same: Mapping[str, str]
    files: Mapping[str, FileNote]

    def to_json(self) -> dict[str, Any]:
        """The content of `package.json`."""
        made = {key: value for key, value in asdict(self).items() if key != "path"}
        made["machine"]["cpu_features"] = sorted(self.machine.cpu_features)
        made["stop_ids"] = sorted(self.stop_ids)
        return {"format": FORMAT, "version": VERSION, **made}


def is_package(path: str | Path) -> bool:
    """Whether a path is a compiled package; looks for its note and reads nothing."""
    return (Path(path) / NOTE_NAME).is_file()


def read_package(path: Path) -> Package:
    """The note of a package, and a check that its files have their sizes.

    Raises:
        CheckpointError: no package, one of another version, or a file that is missing or has another size.
    """
    note = path / NOTE_NAME
    if not note.is_file():
        raise CheckpointError(f"{path} is no compiled package: it has no {NOTE_NAME}; {_MAKE_AGAIN}")
    found = load_json(note)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CheckpointError(
            f"{note} is of the format {found.get('format')!r}, version {found.get('version')!r}; this packlight reads "
            f"{FORMAT!r}, version {VERSION}: {_MAKE_AGAIN}"
        )
    try:
        package = _parse(path, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{note} is damaged ({type(error).__name__}: {error}): {_MAKE_AGAIN}") from error
    for name, file in package.files.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != file.nbytes:
            state = "is missing" if actual is None else f"has {actual} bytes, not {file.nbytes}"
            raise CheckpointError(f"{path / name} {state}: copy the package again, or {_MAKE_AGAIN}")
    return package


def check_hashes(package: Package, names: list[str] | None = None) -> None:
    """Read files whole and compare their hashes; all of them for None.

    Raises:
        CheckpointError: a file is not what it was.
    """
    for name in package.files if names is None else names:
        if file_sha256(package.path / name) != package.files[name].sha256:
            raise CheckpointError(
                f"{package.path / name} was changed after the package was made: copy it again, or {_MAKE_AGAIN}"
            )


def check_machine(package: Package, here: Machine) -> None:
    """Refuse a package that was compiled for something else.

    Raises:
        CheckpointError: another torch, another system or architecture, or instructions that this CPU lacks.
    """
    made_for = package.machine
    if made_for.torch != here.torch:
        raise CheckpointError(
            f"{package.path} was compiled for torch {made_for.torch} and {here.torch} is installed: install that "
            f"version, or {_MAKE_AGAIN}"
        )
    if (made_for.system, made_for.architecture) != (here.system, here.architecture):
        raise CheckpointError(
            f"{package.path} was compiled for {made_for.system} on {made_for.architecture} and this is {here.system} "
            f"on {here.architecture}: {_MAKE_AGAIN} here"
        )
    if lacking := made_for.cpu_features - here.cpu_features:
        raise CheckpointError(
            f"{package.path} was compiled for a CPU with {', '.join(sorted(lacking))}, which this one lacks: "
            f"{_MAKE_AGAIN} here"
        )


def _parse(path: Path, found: Mapping[str, Any]) -> Package:
    machine, files = found["machine"], found["files"]
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the file {name!r} is outside the package")
    return Package(
        path=path,
        packlight=str(found["packlight"]),
        machine=Machine(
            str(machine["torch"]),
            str(machine["system"]),
            str(machine["architecture"]),
            frozenset(map(str, machine["cpu_features"])),
        ),
        source=str(found["source"]),
        model_class=str(found["model_class"]),
        dtype=str(found["dtype"]),
        vocab_size=int(found["vocab_size"]),
        batch=int(found["batch"]),
        context=int(found["context"]),
        chunk=int(found["chunk"]),
        cache=tuple((int(heads), int(keys), int(values)) for heads, keys, values in found["cache"]),
        stop_ids=frozenset(int(stop) for stop in found["stop_ids"]),
        same={str(name): str(other) for name, other in found["same"].items()},
        files={str(name): FileNote(int(one["nbytes"]), str(one["sha256"])) for name, one in files.items()},
    )
