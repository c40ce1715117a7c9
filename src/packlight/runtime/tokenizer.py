"""Tokenizers: text to prompts, and the tokens that end an answer. Imports none of transformers' models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packlight.checkpoint.open import Checkpoint
from packlight.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises CheckpointError where there is none."""
    return read_tokenizer(checkpoint.path)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Raises CheckpointError where there is none."""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(": ")
        raise CheckpointError(f"{directory} has no tokenizer that transformers can read: {reason}") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> list[int]:
    """A user's message through the chat template, or the plain text where the checkpoint has no template.

    Args:
        system: what the model is told before; without a template it stands before the prompt on lines of its own.
    """
    if tokenizer.chat_template is None:
        return raw_ids(tokenizer, prompt, system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def raw_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> list[int]:
    """The text as it is, behind `system` and an empty line where that is given."""
    text = prompt if system is None else f"{system}\n\n{prompt}"
    return list(tokenizer(text, verbose=False)["input_ids"])


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-sequence ids from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model is built."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
