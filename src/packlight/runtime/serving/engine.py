"""What a server drives: requests go in, a step computes for all of them at once, pieces of answers come out.

An engine is synchronous, knows nothing of HTTP, and belongs to one thread. `TorchEngine` batches by itself;
`LlamaCppEngine` hands the requests to llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from packlight.runtime.sampling import Sampling, Token

Finish = Literal["stop", "length", "deadline"]
"""Why an answer ended: the model ended it or a stop string came; its limit or the context; its time was up."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Args:
        id: of the caller's choice, unique among the requests in flight.
        prompt: token ids, the chat template applied.
        sampling: how tokens are chosen, how many, and what ends the answer.
        schema: a JSON schema, as JSON text, that the answer must follow; None: anything.
        deadline: seconds on `time.monotonic()`'s clock after which the answer ends as it is; None: never.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    schema: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer.

    Args:
        id: of the request.
        text: certain by now; a torn character or the beginning of a stop string is held back.
        tokens: that were chosen in this step; the token that ends a turn is among them, though it has no text.
        finish: set in the last delta of a request, and in no other.
        reused_tokens: tokens of the prompt that were not computed, as an earlier request had begun with them.
    """

    id: str
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    reused_tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """The engine now, and since it began. `prompt_tokens` counts those of `reused_tokens` too."""

    running: int
    waiting: int
    kv_tokens: int
    kv_capacity_tokens: int
    steps: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    preemptions: int


class ServingEngine(Protocol):
    """What a server drives, from one thread alone."""

    name: str
    """What computes, in a word."""

    context: int
    """Tokens of a request, prompt and answer together, at most."""

    tokenizer: PreTrainedTokenizerBase

    def check(self, request: Request) -> None:
        """Raises UsageError, with the numbers, for a request that can never be served: empty, too long, a schema that
        cannot be followed. May be called from any thread."""
        ...

    def add(self, request: Request) -> None:
        """Put a request in the queue. Raises what `check` raises."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds; no further delta comes. An unknown id is no error."""
        ...

    def step(self) -> list[Delta]:
        """Compute once, for as many requests as fit; empty where nothing is to be done."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight."""
        ...

    def stats(self) -> Stats:
        """May be called from any thread."""
        ...

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        """One vector per prompt. Raises UsageError where the model was not made for it."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...
