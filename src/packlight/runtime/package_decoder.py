"""A compiled package as a `Decoder`: two graphs over one mapped copy of the weights and one KV cache.

Neither transformers nor torch's compiler is imported: each takes longer to import than the graphs take to load.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from packlight.checkpoint.shards import TensorEntry, read_index
from packlight.checkpoint.tensors import torch_dtype
from packlight.errors import CheckpointError
from packlight.runtime.fixed_shapes import FixedShapeDecoder, Forward, Shapes
from packlight.runtime.package import (
    GRAPHS_NAME,
    WEIGHTS_NAME,
    Machine,
    Package,
    check_hashes,
    check_machine,
    read_package,
)

PREFILL, DECODE = "prefill", "decode"


class PackageDecoder(FixedShapeDecoder):
    """A `Decoder` over the graphs of a package.

    Args:
        package: checked already, see `load_package`.

    Raises:
        CheckpointError: the graphs and the weights do not belong together, or the system does not load the graphs.
    """

    def __init__(self, package: Package) -> None:
        self.package = package
        self.stop_ids = package.stop_ids
        self.tokenizer_dir = package.path
        # NOTE a trap: the graphs keep pointers to these tensors and do not own them.
        self._weights = _map_weights(package)
        shapes = Shapes(package.batch, package.context, package.chunk)
        dtype = torch_dtype(package.dtype)

        def zeros(heads: int, width: int) -> torch.Tensor:
            return torch.zeros(shapes.batch, heads, shapes.buffer, width, dtype=dtype)

        super().__init__(
            shapes,
            self._load(PREFILL),
            self._load(DECODE),
            [zeros(heads, keys) for heads, keys, _ in package.cache],
            [zeros(heads, values) for heads, _, values in package.cache],
        )

    def _constant(self, graph: str, constant: str) -> torch.Tensor:
        own = self._weights.get(own_constant(graph, constant))
        return self._weights[constant] if own is None else own

    def _load(self, name: str) -> Forward:
        try:
            # Not torch._inductor.aoti_load_package, which is a cover of this class: importing it imports the compiler.
            graph = torch._C._aoti.AOTIModelPackageLoader(str(self.package.path / GRAPHS_NAME), name, False, 1, -1)
            constants = {constant: self._constant(name, constant) for constant in graph.get_constant_fqns()}
            # arguments: not the inactive buffer, all of them, and pointers instead of copies
            graph.load_constants(constants, False, True, True)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"the graph {name} of {self.package.path} cannot be loaded ({reason}): make the package again here"
            ) from error

        def forward(
            ids: torch.Tensor,
            start: torch.Tensor,
            padding: torch.Tensor,
            last: torch.Tensor,
            keys: list[torch.Tensor],
            values: list[torch.Tensor],
        ) -> torch.Tensor:
            logits: torch.Tensor = graph.boxed_run([ids, start, padding, last, *keys, *values])[0]
            return logits

        return forward


def own_constant(graph: str, constant: str) -> str:
    """The stored name of a constant that belongs to one graph alone, where the compiler counts them."""
    return f"{graph}/{constant}"


def load_package(path: str | Path) -> PackageDecoder:
    """Open a package: its machine, the sizes of its files and the hash of its graphs are checked first.

    The weights' hash is not: reading them whole would take longer than everything else. `packlight prove` does.

    Raises:
        CheckpointError: no package, one for another machine or torch, or one that is damaged.
    """
    package = read_package(Path(path))
    check_machine(package, this_machine())
    check_hashes(package, [GRAPHS_NAME])
    return PackageDecoder(package)


def this_machine() -> Machine:
    """The installed torch and what this CPU can do."""
    features = frozenset(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    return Machine(str(torch.__version__), platform.system().lower(), platform.machine(), features)


def _map_weights(package: Package) -> Mapping[str, torch.Tensor]:
    """Every constant of the graphs by name, as views into the files; pages are read when they are first touched."""
    index = read_index(package.path / WEIGHTS_NAME)
    storages = {
        file: torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8).untyped_storage()
        for file in {entry.file for entry in index.values()}
    }
    weights = {name: _view(storages[entry.file], entry) for name, entry in index.items()}
    return {**weights, **{name: weights[other] for name, other in package.same.items() if other in weights}}


def _view(storage: torch.UntypedStorage, entry: TensorEntry) -> torch.Tensor:
    dtype = torch_dtype(entry.dtype)
    if entry.offset % dtype.itemsize:
        raise CheckpointError(f"{entry.file} places {entry.name} at byte {entry.offset}: make the package again")
    flat = torch.empty(0, dtype=dtype).set_(storage, entry.offset // dtype.itemsize, (entry.numel,))  # type: ignore[call-overload]
    viewed: torch.Tensor = flat.view(entry.shape)
    return viewed
