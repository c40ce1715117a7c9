"""`--compile`: transformers' model in fixed shapes behind `torch.compile`.

Two graphs are compiled, one for a chunk of a prompt and one for a token; no request, however long, makes a third. The
compilation is lost with the process: `export --to compiled` keeps it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler
from transformers import PreTrainedModel

from packlight.errors import UsageError
from packlight.runtime.fixed_forward import FixedForward, allocate_cache
from packlight.runtime.fixed_shapes import FixedShapeDecoder, Shapes

NO_COMPILER = (
    "compiling needs a C++ compiler and none was found: install one (Debian and Ubuntu: apt install g++; Fedora: dnf "
    "install gcc-c++; macOS: xcode-select --install), or name it in the environment variable CXX"
)


class CompiledDecoder(FixedShapeDecoder):
    """A `Decoder` whose prefill and decode are compiled when they first run, which takes minutes: see `warm_up`.

    Args:
        model: its attention is set to `grouped_sdpa`, in place.
        shapes: what to compile for.
        backend: of `torch.compile`; only `inductor` makes code, `eager` traces and nothing more.

    Raises:
        UsageError: an architecture that cannot be compiled in fixed shapes, or no C++ compiler.
    """

    def __init__(self, model: PreTrainedModel, shapes: Shapes, backend: str = "inductor") -> None:
        if backend == "inductor":
            require_compiler()
        keys, values = allocate_cache(model, shapes)
        compiled = torch.compile(FixedForward(model), fullgraph=True, dynamic=False, backend=backend)
        super().__init__(shapes, compiled, compiled, keys, values)

    def warm_up(self) -> float:
        """Compile both graphs by running each once; returns the seconds that it took.

        Raises:
            UsageError: the model's code cannot be traced.
        """
        start = time.perf_counter()
        with traced():
            self.prefill(torch.zeros(1, 1, dtype=torch.int64))
            if self.shapes.context > 1:
                self.step(torch.zeros(1, 1, dtype=torch.int64))
        return time.perf_counter() - start


@contextmanager
def traced() -> Iterator[None]:
    """A first call of what was compiled: quiet, and UsageError where the model's code cannot be traced."""
    try:
        with without_torch_warnings():
            yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise UsageError(f"torch.compile cannot trace this model ({reason}): run it without --compile") from error


def compile_forward_(body: nn.Module, backend: str = "inductor") -> None:
    """Compile a module in place, in one graph for any number of tokens above one, and in one for one token.

    The first call of each compiles: make it inside `traced`.

    Args:
        backend: of `torch.compile`, as for `CompiledDecoder`.

    Raises:
        UsageError: no C++ compiler.
    """
    if backend == "inductor":
        require_compiler()
    body.forward = torch.compile(body.forward, fullgraph=True, dynamic=True, backend=backend)


def compile_body_(model: PreTrainedModel, tokens: int, backend: str = "inductor") -> None:
    """Compile a model without its head, in place, for one sequence of `tokens` tokens; other lengths run as before.

    The first call of that length compiles, which takes a minute or more.

    Args:
        backend: of `torch.compile`, as for `CompiledDecoder`.

    Raises:
        UsageError: no C++ compiler.
    """
    if backend == "inductor":
        require_compiler()
    body = model.base_model
    plain = body.forward
    compiled = torch.compile(plain, dynamic=False, backend=backend)

    def forward(*arguments: Any, **options: Any) -> Any:
        ids = arguments[0] if arguments else options["input_ids"]
        if tuple(ids.shape) != (1, tokens):
            return plain(*arguments, **options)
        with without_torch_warnings():
            return compiled(*arguments, **options)

    body.forward = forward


@contextmanager
def without_torch_warnings() -> Iterator[None]:
    """torch's compiler warns of deprecated parts of torch that it uses itself; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require_compiler() -> None:
    """Raises UsageError where there is no C++ compiler, with how to get one, or torch lies where it cannot link."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(NO_COMPILER) from error
    if " " in (place := str(Path(torch.__file__).parent)):
        raise UsageError(
            f"torch's compiler does not quote paths, and {place} has a space in it: use an environment in a path "
            "without spaces to compile"
        )
