"""`--to compiled`: an ahead-of-time package, which a fresh process loads and runs at once.

What `torch.compile` makes is lost with the process, and each new one waits for it again. Here the two graphs of
`runtime/fixed_forward.py` are compiled once (torch.export and AOTInductor) and put beside one copy of the weights;
`runtime/package_decoder.py` runs them without transformers' model code and without the compiler.

Limit: the result fits one version of torch, CPUs with the same instructions, and fixed shapes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedTokenizerBase

from packlight.checkpoint import save
from packlight.checkpoint.cache import file_sha256
from packlight.checkpoint.open import Checkpoint, short_name
from packlight.checkpoint.shards import write_shards
from packlight.checkpoint.tensors import check_architecture as check_known
from packlight.errors import UsageError
from packlight.evidence import LEDGER_NAME, Ledger, Measurement
from packlight.export.format import Stage
from packlight.export.graphs import Graph, compile_graph, constants_of, export_graph, this_target, write_graphs
from packlight.measure.package_proof import SUBJECT, prove_package, record_model
from packlight.measure.proof import GREEDY_TOKENS
from packlight.measure.text import load_text
from packlight.runtime.compiled import require_compiler
from packlight.runtime.fixed_forward import FixedForward, allocate_cache
from packlight.runtime.fixed_shapes import Shapes
from packlight.runtime.load import load_model
from packlight.runtime.package import GRAPHS_NAME, NOTE_NAME, WEIGHTS_NAME, FileNote, Machine, Package
from packlight.runtime.package_decoder import DECODE, PREFILL, own_constant, this_machine
from packlight.runtime.tokenizer import load_tokenizer, stop_ids
from packlight.spec import DTYPE_BYTES, FLOAT_DTYPES

USUAL_CONTEXT = 1024
"""Tokens that a package is made for unless another number is asked for: each token reads the whole cache."""
_SPARE_BYTES = 50_000_000
"""Kept free beside the weights: graphs, tokenizer, ledger."""
_PAST_CHUNK = 24
"""Tokens of the recorded prompt after the first chunk, so that the second one is proved too."""


@dataclass(frozen=True)
class Compiled:
    """An ahead-of-time package.

    Args:
        context: tokens per sequence; default: 1024, or the model's context where that is shorter.
        batch: sequences at the same time.
        dtype: as `load_model` takes it; default: as stored.
        chunk: tokens of a prompt that are computed at once.

    Raises:
        UsageError: a size below 1, or an unknown dtype.
    """

    name: ClassVar[str] = "compiled"

    context: int | None = None
    batch: int = 1
    dtype: str | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        Shapes(self.batch, 1 if self.context is None else self.context, self.chunk)
        if self.dtype is not None and self.dtype not in FLOAT_DTYPES:
            raise UsageError(f"dtype is one of {', '.join(FLOAT_DTYPES)}, not {self.dtype!r}")

    def shapes(self, checkpoint: Checkpoint) -> Shapes:
        """What the graphs are fixed to. Raises UsageError where the model has no such context."""
        longest = checkpoint.spec.max_context
        if self.context is not None and self.context > longest:
            raise UsageError(f"--context {self.context} is beyond the model's {longest}: give at most {longest}")
        context = min(USUAL_CONTEXT, longest) if self.context is None else self.context
        return Shapes(self.batch, context, min(self.chunk, context))

    def write(self, checkpoint: Checkpoint, out: Path, stage: Stage) -> list[Measurement]:
        """Compile, write, prove in a fresh process and publish; see `Format.write`."""
        check_known(checkpoint.config)
        shapes = self.shapes(checkpoint)
        require_compiler()
        source = {"name": short_name(checkpoint.source), "sha256": save.content_hash(checkpoint)}
        asked = {"packlight": version("packlight"), "to": self.name, "source": source, **asdict(self)}
        with save.job(out, asked, _needed_bytes(checkpoint, self.dtype)) as work:
            (work.partial / LEDGER_NAME).unlink(missing_ok=True)
            shutil.rmtree(work.artifact, ignore_errors=True)
            work.artifact.mkdir()
            ledger = Ledger(work.partial / LEDGER_NAME, torch.get_num_threads())
            tokens = self._fill(checkpoint, shapes, work.artifact, ledger, stage)
            tick = stage("proving the package in a fresh process", 1)
            ledger.add(prove_package(work.artifact, tokens))
            tick()
            shutil.copyfile(ledger.path, work.artifact / LEDGER_NAME)
            save.publish(work)
        return ledger.rows

    def _fill(self, checkpoint: Checkpoint, shapes: Shapes, place: Path, ledger: Ledger, stage: Stage) -> list[int]:
        """Everything of the package but its ledger; returns the tokens that the model goes on with."""
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, self.dtype)
        tokens = record_model(place, model, _proof_ids(tokenizer, shapes))
        keys, values = allocate_cache(model, shapes)
        forward, target = FixedForward(model), this_target()
        tick = stage("compiling two graphs", 2)
        programs: list[ExportedProgram] = []
        graphs: dict[str, Graph] = {}
        for name, num_tokens in ((PREFILL, shapes.chunk), (DECODE, 1)):
            start = time.perf_counter()
            programs.append(export_graph(forward, shapes, num_tokens, keys, values))
            exported = time.perf_counter()
            graphs[name] = compile_graph(programs[-1], target)
            compiled = time.perf_counter()
            note = f"{name}: {shapes.batch} x {num_tokens} tokens over a cache of {shapes.buffer}"
            ledger.add(
                [
                    Measurement("export_s", exported - start, "s", SUBJECT, n=1, note=note),
                    Measurement("compile_s", compiled - exported, "s", SUBJECT, n=1, note=note),
                ]
            )
            tick()
        write_graphs(place / GRAPHS_NAME, graphs)
        constants = constants_of(programs)
        for name, graph in graphs.items():
            constants.update({own_constant(name, constant): tensor for constant, tensor in graph.constants.items()})
        same = _write_weights(place / WEIGHTS_NAME, constants)
        for name in save.COPIED:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, place / name)
        here = this_machine()
        package = Package(
            path=place,
            packlight=version("packlight"),
            machine=Machine(here.torch, here.system, here.architecture, target.features),
            source=short_name(checkpoint.source),
            model_class=type(model).__name__,
            dtype=_dtype_name(keys[0]),
            vocab_size=model.config.get_text_config(decoder=True).vocab_size,
            batch=shapes.batch,
            context=shapes.context,
            chunk=shapes.chunk,
            cache=tuple((k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(keys, values, strict=True)),
            stop_ids=stop_ids(model, tokenizer),
            same=same,
            files=_file_notes(place),
        )
        (place / NOTE_NAME).write_text(json.dumps(package.to_json(), indent=2) + "\n", encoding="utf-8")
        ledger.add(_size_rows(package))
        return tokens


def _proof_ids(tokenizer: PreTrainedTokenizerBase, shapes: Shapes) -> list[int]:
    """The start of the bundled text: more than one chunk where the context has room for it and for an answer."""
    count = max(1, min(shapes.chunk + _PAST_CHUNK, shapes.context - GREEDY_TOKENS))
    ids = tokenizer(load_text().content[: 16 * count], add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids[:count])


def _needed_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    width = DTYPE_BYTES[dtype or checkpoint.spec.dtype]
    floats, others = 0, 0
    for entry in checkpoint.index.values():
        if entry.dtype in FLOAT_DTYPES:
            floats += entry.numel * width
        else:
            others += entry.nbytes
    return floats + others + _SPARE_BYTES


def _write_weights(place: Path, constants: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each tensor once; returns the names of those that are another one under a second name."""
    place.mkdir()
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for name, tensor in constants.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    layout = [
        (name, str(constants[name].dtype).removeprefix("torch."), tuple(constants[name].shape))
        for name in first.values()
    ]
    write_shards(place, layout, lambda name: constants[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return same


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _file_notes(place: Path) -> dict[str, FileNote]:
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): FileNote(path.stat().st_size, file_sha256(path)) for path in files}


def _size_rows(package: Package) -> list[Measurement]:
    def total(name: str) -> int:
        return sum(file.nbytes for path, file in package.files.items() if path.startswith(name))

    features = ", ".join(sorted(package.machine.cpu_features))
    return [
        Measurement("disk_bytes", total(""), "bytes", SUBJECT),
        Measurement("weights_bytes", total(WEIGHTS_NAME), "bytes", SUBJECT, note="once, shared by both graphs"),
        Measurement("graphs_bytes", total(GRAPHS_NAME), "bytes", SUBJECT, note=f"for a CPU with {features}"),
    ]
