"""Writing an artifact: beside its place, and renamed at the end.

A job owns the hidden directory `.NAME.partial` beside its target. It holds `job.json` (what was asked), the finished
blocks and the ledger; the same command finds it there and goes on. Nothing under the target's own name exists before
everything in it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from packlight.checkpoint.open import Checkpoint
from packlight.checkpoint.shards import write_shards
from packlight.checkpoint.stored import BITMASK, OWN_METHOD, OWN_VERSION
from packlight.errors import TargetError, UsageError
from packlight.plan.layout import Layout, StoredTensor
from packlight.spec import Grid, ModelSpec, Precision, format_size

RECIPE_NAME = "recipe.yaml"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of the original that an artifact needs beside its weights."""


@dataclass(frozen=True)
class Job:
    """Where a job works and where its result will be."""

    target: Path
    partial: Path

    @property
    def blocks(self) -> Path:
        return self.partial / "blocks"

    @property
    def artifact(self) -> Path:
        """The artifact while it is put together; renamed to `target` when it is proved."""
        return self.partial / "artifact"


@contextmanager
def job(target: Path, asked: Mapping[str, Any], needed_bytes: int) -> Iterator[Job]:
    """Claim the work directory of a job, alone, and find what an earlier run of the same job left in it.

    Work that was cut short stays, for the same job to go on with; where the input turns out to be at fault, nothing
    stays.

    Args:
        target: the artifact's directory; it must not exist.
        asked: everything that the result depends on. Work of a job that asked for something else is thrown away.
        needed_bytes: what the job will write; more than is free is refused before anything is made.

    Raises:
        TargetError: the target exists, cannot be written, has too little space, or another process works on it.
    """
    target = target.absolute()
    refuse_existing(target)
    partial = target.parent / f".{target.name}.partial"
    made = _make_parents(target.parent)
    try:
        _check_space(target.parent, needed_bytes)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise _target_error(target, error) from error
    except TargetError:
        _remove_empty(made)
        raise
    with _locked(partial, target):
        _start_or_go_on(partial, asked)
        try:
            yield Job(target, partial)
        except TargetError:
            raise
        except UsageError:  # the input is at fault: the same command will not go on from here
            shutil.rmtree(partial)
            _remove_empty(made)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
                raise
            raise _target_error(target, error) from error


def refuse_existing(target: Path) -> None:
    """Raises TargetError where something has the target's name, be it a link that leads nowhere."""
    if os.path.lexists(target):
        raise TargetError(f"{target} exists already: choose another --out, or remove it first")


def publish(work: Job) -> None:
    """Rename the finished artifact to its target and remove the work directory."""
    for path in work.artifact.iterdir():
        _sync(path)
    work.artifact.rename(work.target)
    _sync(work.target.parent)
    shutil.rmtree(work.partial)


def made_earlier(target: Path, asked: Mapping[str, Any]) -> bool:
    """Whether `target` is a finished artifact whose recipe holds everything that is asked for now."""
    recipe = target / RECIPE_NAME
    if not recipe.is_file():
        return False
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return isinstance(found, dict) and all(found.get(key) == value for key, value in asked.items())


def discard(target: Path) -> None:
    """Remove a job's work directory, if there is one."""
    target = target.absolute()
    shutil.rmtree(target.parent / f".{target.name}.partial", ignore_errors=True)


def write_artifact(
    work: Job,
    original: Checkpoint,
    stored: list[StoredTensor],
    read: Any,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    """Weights, config, recipe and the original's tokenizer into `work.artifact`.

    Args:
        stored: the tensors in the order in which they are to lie in the file.
        read: gives the bytes of a named tensor.
    """
    shutil.rmtree(work.artifact, ignore_errors=True)
    work.artifact.mkdir()
    write_shards(work.artifact, [(part.name, part.dtype, part.shape) for part in stored], read)
    (work.artifact / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (work.artifact / RECIPE_NAME).write_text(recipe_text(recipe), encoding="utf-8")
    for name in COPIED:
        if (original.path / name).is_file():
            shutil.copyfile(original.path / name, work.artifact / name)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False)


def artifact_config(config: Mapping[str, Any], spec: ModelSpec, precision: Precision, layout: Layout) -> dict[str, Any]:
    """The original's config with its new dtype and, for a quantized model, what compressed-tensors has to know."""
    made = {
        key: value
        for key, value in config.items()
        if key not in ("torch_dtype", "quantization_config", "_name_or_path")
    }
    made["dtype"] = precision.dtype
    if precision.is_own and layout == "packlight":
        made["quantization_config"] = own_quantization_config(precision)
    elif precision.grids:
        made["quantization_config"] = _quantization_config(spec, precision, layout)
    return made


def content_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the config and the stored bytes of a checkpoint, whatever its file names."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in sorted({entry.file for entry in checkpoint.index.values()}):
        state = path.stat()
        digest.update(_file_digest(path, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, changed_ns: int) -> bytes:
    """A file is read once by a process, as long as it is not changed: several stations ask for the same hash."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def own_quantization_config(precision: Precision) -> dict[str, Any]:
    """packlight's own layout: the grid of each kind, and of every tensor that differs from its kind, as `Grid` writes
    itself; null for what is left alone. Where zeros are left out, how many there are instead."""
    if (sparse := precision.sparse) is not None:
        return {
            "quant_method": OWN_METHOD,
            "version": OWN_VERSION,
            "format": BITMASK,
            "share": sparse.share,
            "scope": sparse.scope,
            **({"zeros": dict(sparse.counts)} if sparse.counts else {}),
        }
    return {
        "quant_method": OWN_METHOD,
        "version": OWN_VERSION,
        "linear": _text(precision.linear),
        "embedding": _text(precision.embedding),
        "tensors": {name: _text(grid) for name, grid in precision.tensors},
    }


def _text(grid: Grid | None) -> str | None:
    return None if grid is None else str(grid)


def _quantization_config(spec: ModelSpec, precision: Precision, layout: Layout) -> dict[str, Any]:
    """NOTE on `dequantize`: transformers with compressed-tensors 0.20 builds modules for an unpacked zero point and
    for an embedding of its own, and fails on what is in the file, unless it is told to de-quantize while loading. It
    then decodes every matrix by the first group, so that flag and two groups do not go together."""
    ends = [_module(t.name) for t in spec.tensors if t.kind in ("embedding", "head")]
    groups: dict[str, Any] = {}
    linear, embedding = precision.linear, precision.embedding
    if linear is not None:
        targets = ["Linear", *(ends if embedding == linear else [])]
        groups["group_0"] = _group(targets, linear, layout)
    if embedding is not None and embedding != linear:
        groups[f"group_{len(groups)}"] = _group(ends, embedding, layout)
    alone = [
        _module(t.name)
        for t in spec.tensors
        if len(t.shape) == 2 and t.kind != "embedding" and precision.grid_of(t) is None
    ]
    is_tied_alone = spec.is_tied and "lm_head" not in alone
    made: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted([*alone, "lm_head"] if is_tied_alone else alone),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    is_asymmetric = any(not grid.symmetric for grid in (linear, embedding) if grid is not None)
    if len(groups) == 1 and (is_asymmetric or embedding is not None or layout == "int-quantized"):
        made["dequantize"] = True
    return made


def _group(targets: list[str], grid: Grid, layout: Layout) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": layout,
    }


def _module(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight")


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with (partial / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"another process is making {target}: wait for it, or choose another --out") from None
        yield


def _start_or_go_on(partial: Path, asked: Mapping[str, Any]) -> None:
    note = partial / "job.json"
    wanted = json.dumps(asked, indent=2, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") == wanted:
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    half = partial / "job.json.part"
    half.write_text(wanted, encoding="utf-8")
    half.replace(note)


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns those that were made, deepest first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _target_error(parent, error) from error
    return missing


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):  # another process has put something there by now
            path.rmdir()


def _check_space(parent: Path, needed_bytes: int) -> None:
    if not os.access(parent, os.W_OK):
        raise TargetError(f"{parent} cannot be written: choose another --out")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise TargetError(
            f"{parent} has {format_size(free)} free and the job writes {format_size(needed_bytes)}: "
            "free some space or choose another --out"
        )


def _target_error(target: Path, error: OSError) -> TargetError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetError(f"the disk of {target} is full: free some space and give the same command again to go on")
    return TargetError(f"{target} cannot be written ({error.strerror}): choose another --out")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
