"""From a model's name to an engine that serves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.open import DEMO, Checkpoint, open_checkpoint
from packlight.checkpoint.tensors import check_architecture
from packlight.errors import UsageError
from packlight.plan.memory import kv_elements_per_layer
from packlight.runtime.bitsandbytes import check_loader, load_with
from packlight.runtime.loader import split_loader
from packlight.runtime.serving.blocks import BLOCK
from packlight.runtime.serving.engine import ServingEngine
from packlight.runtime.serving.llamacpp_engine import LlamaCppEngine
from packlight.runtime.serving.paged_model import paged_context
from packlight.runtime.serving.pooling import POOLINGS, Pooling, declared_pooling
from packlight.runtime.serving.prepacked import prepack_
from packlight.runtime.serving.torch_engine import TorchEngine
from packlight.runtime.tokenizer import load_tokenizer, stop_ids

ENGINES = ("auto", "torch", "llamacpp")

SHARE_OF_MEMORY = 0.25
"""Of the memory that is free when a server starts, for the KV cache, where nobody said how much."""


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served.

    Args:
        engine: `torch`, `llamacpp`, or `auto`: llama.cpp for a .gguf file where it is installed, torch for the rest.
        context: tokens of a request, at most; None: as the model has it, no more than the cache holds.
        users: requests that are computed at once, at most.
        kv_bytes: memory of the KV cache; None: a whole context for each of the users, in a quarter of the
            memory that is free now.
        is_compiled: compile the model first.
        threads: threads to compute with; None leaves torch's choice.
        pooling: how embeddings are made; None: as the checkpoint says.

    Raises:
        UsageError: a value outside its range.
    """

    engine: str = "auto"
    context: int | None = None
    users: int = 16
    kv_bytes: int | None = None
    is_compiled: bool = False
    threads: int | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"there is no engine {self.engine!r}: choose one of {', '.join(ENGINES)}")
        for name, value in (("users", self.users), ("context", self.context), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.pooling not in (None, *POOLINGS):
            raise UsageError(f"embeddings are made with {' or '.join(POOLINGS)}, not {self.pooling!r}")


def open_engine(model: str, options: ServingOptions, say: Callable[[str], None]) -> ServingEngine:
    """The engine that serves a model.

    Args:
        say: is told in a line what takes long.

    Raises:
        UsageError: bad input, or a model that the engine does not serve.
        MissingExtraError: the engine's package is absent.
    """
    is_llamacpps = model.endswith(".gguf") and find_spec("xllamacpp") is not None and _is_plain(options)
    if options.engine == "llamacpp" or (options.engine == "auto" and is_llamacpps):
        return _llamacpp_engine(model, options)
    return _torch_engine(model, options, say)


def _llamacpp_engine(name: str, options: ServingOptions) -> LlamaCppEngine:
    file = demo_file() if name == DEMO else Path(name).expanduser()
    if file.suffix != ".gguf":
        raise UsageError(f"llama.cpp serves .gguf files, and {name} is none: give one, or leave --engine out")
    if not _is_plain(options):
        raise UsageError(
            "llama.cpp keeps a context for each user, compiles nothing and makes no embeddings here: give --context "
            "and --users alone, or --engine torch"
        )
    return LlamaCppEngine(file, options.context, options.users, options.threads)


def _torch_engine(name: str, options: ServingOptions, say: Callable[[str], None]) -> TorchEngine:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source, loader = split_loader(name)
    checkpoint = open_checkpoint(source)
    check_architecture(checkpoint.config)
    check_loader(checkpoint, loader)
    tokenizer = load_tokenizer(checkpoint)
    pooling: Pooling | None = declared_pooling(checkpoint.path)
    for known in POOLINGS:
        pooling = known if options.pooling == known else pooling
    model = load_with(checkpoint, loader)
    if not options.is_compiled:  # a compiler lays weights out itself, and does not see through oneDNN's tensors
        prepack_(model)
    tokens = kv_tokens(checkpoint, model.dtype, paged_context(model.config), options)
    engine = TorchEngine(
        model, tokenizer, stop_ids(model, tokenizer), tokens, options.users, options.context, pooling=pooling
    )
    if options.is_compiled:
        say("compiling the model for this process, which takes a minute or more ...")
        say(f"compiled in {engine.compile():.1f} s; no request compiles anything")
    return engine


def kv_tokens(checkpoint: Checkpoint, dtype: torch.dtype, of_model: int | None, options: ServingOptions) -> int:
    """Tokens that the KV cache has room for.

    Raises:
        UsageError: memory for less than one token, or neither the model nor the options say how long a request may be.
    """
    spec = checkpoint.spec
    per_token = spec.num_layers * kv_elements_per_layer(spec) * dtype.itemsize
    if options.kv_bytes is not None:
        tokens = options.kv_bytes // per_token
        if tokens < 1:
            raise UsageError(f"a token's keys and values take {per_token} bytes: {options.kv_bytes} hold none")
        return tokens
    context = options.context if options.context is not None else of_model
    if context is None:
        raise UsageError("the model does not say how long a text may be: give --context")
    share = int(SHARE_OF_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // per_token
    return min(context * options.users, max(context if options.context is not None else BLOCK, share))


def _is_plain(options: ServingOptions) -> bool:
    """Whether nothing was asked for that llama.cpp cannot do."""
    return options.kv_bytes is None and not options.is_compiled and options.pooling is None
