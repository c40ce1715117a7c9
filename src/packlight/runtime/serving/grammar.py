"""Answers that follow a JSON schema: llguidance says at each place which tokens may come."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from packlight.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STRICT: dict[str, Any] = {"whitespace_flexible": False, "lenient": False}
"""Options of llguidance. No space between the parts, as a small model may go on with spaces for ever; and a keyword of
the schema that is not understood is an error."""


class Grammar:
    """The state of one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocab), -inf where a token may not come."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(mask, bitorder="little")).bool()[: logits.shape[-1]]
        padding = logits.shape[-1] - len(allowed)  # rows of the head that no token has
        if padding > 0:
            allowed = torch.cat([allowed, allowed.new_zeros(padding)])
        return logits.masked_fill(~allowed, -math.inf)

    def push(self, token: int) -> bool:
        """Take a token; returns whether the answer is complete by it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


class GrammarMaker:
    """Grammars for one tokenizer, which llguidance reads once, when the first is asked for.

    Args:
        stops: tokens that end an answer: they may come where the JSON is complete, and nowhere else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self._reader: LLTokenizer | None = None

    def check(self, schema: str) -> None:
        """Raises UsageError for a schema that cannot be followed, MissingExtraError where llguidance is absent."""
        self.make(schema)

    def make(self, schema: str) -> Grammar:
        """The grammar of a JSON schema, at its beginning. Raises what `check` raises."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingExtraError("llguidance", "serve", "an answer that follows a JSON schema") from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=STRICT)  # type: ignore[arg-type]  # declares a TypedDict of all options
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be followed: {_first_line(error)}") from error
        reader = self._read()
        failure = LLMatcher.validate_grammar(grammar, reader)
        if failure:
            raise UsageError(f"the JSON schema cannot be followed: {_first_line(failure)}")
        return Grammar(LLMatcher(reader, grammar, log_level=0))

    def _read(self) -> LLTokenizer:
        if self._reader is None:
            from llguidance import LLTokenizer

            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None or not self.stops:
                raise UsageError("this model's tokenizer cannot follow a JSON schema: leave response_format out")
            document = json.loads(backend.to_str())
            document["padding"] = document["truncation"] = None
            self._reader = LLTokenizer(json.dumps(document), eos_token=sorted(self.stops))
        return self._reader


def _first_line(reason: object) -> str:
    return str(reason).strip().splitlines()[0]
