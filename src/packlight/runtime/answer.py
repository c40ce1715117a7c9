"""From a model's name and a prompt to text, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.tensors import check_architecture
from packlight.runtime.bitsandbytes import check_loader, load_with, split_loader
from packlight.runtime.generate import Sampling, generate, prompt_ids, stop_ids, stream_text
from packlight.runtime.load import load_tokenizer


@dataclass
class Answer:
    """An answer while it is made: `pieces` yields text and fills `token_ids` as it goes.

    `finish_reason` is `stop` where the model ended its turn and `length` where the limit did.
    """

    prompt_ids: list[int]
    pieces: Iterator[str]
    token_ids: list[int] = field(default_factory=list)
    limit: int = 0

    @property
    def finish_reason(self) -> str:
        return "length" if len(self.token_ids) >= self.limit else "stop"


def answer(model: str, prompt: str, sampling: Sampling, is_raw: bool = False, threads: int | None = None) -> Answer:
    """Open a model and answer one prompt.

    Args:
        model: anything `open_checkpoint` takes, with or without a loader behind it (`demo@bnb-nf4`).
        is_raw: continue the prompt as it is, without the chat template.
        threads: threads to compute with; None leaves torch's choice.

    Raises:
        UsageError: bad input, or a prompt that does not fit the model's context.
        MissingExtraError: the loader's library is absent.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    source, loader = split_loader(model)
    checkpoint = open_checkpoint(source)
    check_architecture(checkpoint.config)
    check_loader(checkpoint, loader)
    tokenizer = load_tokenizer(checkpoint)
    ids = list(tokenizer(prompt, verbose=False)["input_ids"]) if is_raw else prompt_ids(tokenizer, prompt)
    loaded = load_with(checkpoint, loader)
    made = Answer(ids, iter(()), limit=sampling.max_tokens)

    def kept() -> Iterator[int]:
        for token in generate(loaded, ids, sampling, stop_ids(loaded, tokenizer)):
            made.token_ids.append(token)
            yield token

    made.pieces = stream_text(tokenizer, kept())
    return made
