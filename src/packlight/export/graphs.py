"""From a model to compiled graphs: torch.export, then AOTInductor, whose weights stay outside.

Each graph is compiled apart and both go into one `.pt2` archive. A weight is a constant of a graph by its name; no
graph holds its bytes.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.package.package import package_aoti
from torch.export import ExportedProgram
from torch.export.pt2_archive._package_weights import Weights

from packlight.errors import UsageError
from packlight.runtime.compiled import without_torch_warnings
from packlight.runtime.fixed_forward import FixedForward
from packlight.runtime.fixed_shapes import Shapes

_LEVELS = {
    "x86-64-v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
    "x86-64-v3": ("avx", "avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"),
}
"""What the levels of the x86-64 psABI add to those before, as `torch.cpu.get_capabilities` names it."""

_EXTRA = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-fp16": "amx_fp16",
    "avx512fp16": "avx512_fp16",
}
"""Compiler flags that inductor adds for a vector instruction set, and the features that they need."""


@dataclass(frozen=True)
class Target:
    """The CPU that graphs are compiled for.

    Args:
        march: GCC's `-march`; None leaves inductor's choice, which is this machine.
        features: what the code may use.
    """

    march: str | None
    features: frozenset[str]


def this_target() -> Target:
    """What this machine can do, as a level that other machines have too.

    NOTE a trap: inductor compiles with `-march=native` by default, and the compiler may then use instructions that
    nobody asked for and that a list of features would miss.
    """
    has = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    if platform.machine() != "x86_64":
        return Target(None, frozenset(has))
    flags = pick_vec_isa().build_arch_flags()
    extra = {feature for flag, feature in _EXTRA.items() if f"-m{flag}" in flags.split()}
    needed = set(_LEVELS["x86-64-v3"])
    if not needed <= has:
        return Target("x86-64", frozenset(extra))
    if "avx512" in flags and set(_LEVELS["x86-64-v4"]) <= has:
        return Target("x86-64-v4", frozenset(needed | set(_LEVELS["x86-64-v4"]) | extra))
    return Target("x86-64-v3", frozenset(needed | extra))


def export_graph(
    forward: FixedForward, shapes: Shapes, num_tokens: int, keys: list[torch.Tensor], values: list[torch.Tensor]
) -> ExportedProgram:
    """The forward of `num_tokens` tokens as a graph; the cache is an argument that it writes in place.

    Raises:
        UsageError: the model's code cannot be traced.
    """
    arguments = (
        torch.zeros(shapes.batch, num_tokens, dtype=torch.int64),
        torch.tensor(0),
        torch.zeros(shapes.batch, dtype=torch.int64),
        torch.tensor([num_tokens - 1]),
        keys,
        values,
    )
    try:
        with torch.no_grad(), without_torch_warnings():
            return torch.export.export(forward, arguments, strict=False)
    except (TorchDynamoException, RuntimeError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())[:300]
        raise UsageError(
            f"torch.export cannot trace {type(forward.model).__name__} ({reason}): this architecture cannot be compiled"
        ) from error


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Args:
        files: what AOTInductor made, in its own cache.
        constants: tensors that the compiler made up, by the names under which the graph asks for them.
    """

    files: list[str]
    constants: dict[str, torch.Tensor]


def compile_graph(program: ExportedProgram, target: Target) -> Graph:
    """Compile one graph. Threads are chosen when it runs; where it was compiled is left out of the code."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # hands the constants over
        "aot_inductor.enable_line_tables": False,
        "cpp.dynamic_threads": True,
        "cpp.march": target.march,
    }
    assert program.example_inputs is not None
    arguments, keywords = program.example_inputs
    with torch.no_grad(), without_torch_warnings():
        made = torch._inductor.aot_compile(program.module(), arguments, keywords, options=options)
    assert isinstance(made, list)
    known = {_as_identifier(name) for name in constants_of([program])}
    constants = {
        name: tensor
        for weights in made
        if isinstance(weights, Weights)
        for name, (tensor, _) in weights.items()
        if _as_identifier(name) not in known
    }
    # The sources stay behind: they are not needed to run, and hold paths of the machine that made them.
    return Graph([file for file in made if isinstance(file, str) and not file.endswith(".cpp")], constants)


def write_graphs(path: Path, graphs: Mapping[str, Graph]) -> None:
    """Several compiled graphs by name into one `.pt2` archive."""
    package_aoti(str(path), {name: list(graph.files) for name, graph in graphs.items()})


def constants_of(programs: Sequence[ExportedProgram]) -> dict[str, torch.Tensor]:
    """Parameters, buffers and other constants of graphs by name; one name is one tensor in all of them."""
    found: dict[str, torch.Tensor] = {}
    for program in programs:
        for name, tensor in (*program.state_dict.items(), *program.constants.items()):
            if isinstance(tensor, torch.Tensor):
                found[name] = tensor.detach()
    return found


def _as_identifier(name: str) -> str:
    """How inductor spells the name of a constant in C++."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
