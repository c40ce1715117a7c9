"""Prompts -> answers as text, with any decoder; and from a model's name to that, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from packlight.errors import UsageError
from packlight.plan.attention import AUTO
from packlight.plan.kv_cache import KVCacheKind
from packlight.runtime.decoder import Decoder
from packlight.runtime.device import choose_device
from packlight.runtime.generate import generate
from packlight.runtime.package import is_package
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.text import TextStream
from packlight.runtime.tokenizer import prompt_ids, raw_ids, read_tokenizer


@dataclass(frozen=True)
class Engine:
    """How a model is run.

    Args:
        kv_cache: what is kept of earlier tokens; None computes every token again at each step.
        window: tokens that a sliding cache keeps.
        attention: one of `plan.attention.BACKEND_NAMES`.
        is_compiled: compile the model first, in fixed shapes; it brings its own cache and its own attention.
        device: where the model computes, one of `runtime.device.DEVICES`.

    Raises:
        UsageError: choices that exclude each other.
    """

    kv_cache: KVCacheKind | None = "static"
    window: int | None = None
    attention: str = AUTO
    is_compiled: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.window is not None and self.kv_cache != "sliding":
            raise UsageError("a window belongs to the sliding KV cache: choose that kind, or leave the window out")
        if self.is_compiled and (self.kv_cache != "static" or self.attention != AUTO):
            raise UsageError("a compiled model has a static KV cache and its own attention: leave those choices out")

    @property
    def is_default(self) -> bool:
        """Whether nothing was chosen: what a package, where everything is decided for the CPU, can be asked for."""
        return self in (Engine(), Engine(device="cpu"))


@dataclass
class Answer:
    """One answer while it is made.

    `finish_reason` is `stop` where the model ended its turn or a stop string came, and `length` where the limit did.
    """

    prompt_ids: list[int]
    limit: int
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    is_stopped: bool = False

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finish_reason(self) -> str:
        return "length" if len(self.tokens) >= self.limit and not self.is_stopped else "stop"


class Conversation:
    """A decoder and a tokenizer, which answer prompts one batch after the other.

    The decoder is kept from one batch to the next, so that what their prompts begin with in common is computed once.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], sampling: Sampling
    ) -> None:
        self.decoder, self.tokenizer, self.stops, self.sampling = decoder, tokenizer, stops, sampling
        self.answers: list[Answer] = []

    def ask(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text) as they are made; `answers` fills at the same time.

        Raises:
            UsageError: a prompt that does not fit.
        """
        streams = [TextStream(self.tokenizer, self.sampling.stop) for _ in prompts]
        self.answers = [Answer(list(prompt), self.sampling.max_tokens) for prompt in prompts]
        pieces = [""] * len(prompts)

        def until(row: int, token: int) -> bool:
            pieces[row] = streams[row].push(token)
            return streams[row].is_stopped

        for tokens in generate(self.decoder, prompts, self.sampling, self.stops, until):
            for row, token in enumerate(tokens):
                if token is not None:
                    self.answers[row].tokens.append(token)
                    yield from self._give(row, pieces[row])
        for row, stream in enumerate(streams):
            yield from self._give(row, stream.finish())
            self.answers[row].is_stopped = stream.is_stopped

    def _give(self, row: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self.answers[row].text += piece
            yield row, piece


def converse(
    model: str,
    prompts: Sequence[str],
    sampling: Sampling,
    is_raw: bool = False,
    system: str | None = None,
    engine: Engine | None = None,
    threads: int | None = None,
) -> tuple[Conversation, list[list[int]]]:
    """Open a model for some prompts; returns the conversation and the prompts as tokens, to be asked with `ask`.

    Args:
        model: a compiled package, or anything `open_checkpoint` takes, with or without a loader behind it
            (`demo@bnb-nf4`).
        is_raw: continue the prompts as they are, without the chat template.
        system: what the model is told before each prompt.
        threads: threads to compute with; None leaves torch's choice.

    Raises:
        UsageError: bad input, a prompt that does not fit the model's context, or no such device.
        MissingExtraError: the library of the loader or of the attention backend is absent.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    engine = engine or Engine()
    encode = raw_ids if is_raw else prompt_ids
    if is_package(model):
        if not engine.is_default:
            raise UsageError(
                f"{model} is a compiled package: cache, attention and device were decided when it was made"
            )
        from packlight.runtime.package_decoder import load_package

        package = load_package(model)
        tokenizer = read_tokenizer(package.tokenizer_dir)
        ids = [encode(tokenizer, prompt, system) for prompt in prompts]
        return Conversation(package, tokenizer, package.stop_ids, sampling), ids
    from packlight.runtime.model_answer import open_model  # a package needs none of transformers' models

    opened = open_model(model, choose_device(engine.device))
    ids = [encode(opened.tokenizer, prompt, system) for prompt in prompts]
    return Conversation(opened.decoder(ids, sampling, engine), opened.tokenizer, opened.stops, sampling), ids
