"""One answer while it is made: its tokens, the blocks that hold them, and how its next token is chosen."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from packlight.runtime.sampling import Token, describe, penalize, sample
from packlight.runtime.serving.blocks import BLOCK, ROOT, BlockPool
from packlight.runtime.serving.engine import Delta, Finish, Request
from packlight.runtime.serving.grammar import Grammar
from packlight.runtime.text import TextStream


class Sequence:
    """A request in flight.

    Args:
        request: what is wanted.
        tokenizer: for the text of the answer.
        stops: tokens that end an answer.
        limit: tokens of the answer, at most; the context has room for them.
        grammar: what the answer must follow, if anything.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        limit: int,
        grammar: Grammar | None = None,
    ) -> None:
        self.request, self.stops, self.limit, self.grammar = request, stops, limit, grammar
        self.tokens = list(request.prompt)
        self.computed = 0
        self.reused = 0
        self.blocks: list[int] = []
        self._published, self._content = 0, ROOT
        self._stream = TextStream(tokenizer, request.sampling.stop)
        self._generator = torch.Generator().manual_seed(request.sampling.seed)
        self._seen: torch.Tensor | None = None

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while an answer is decoded."""
        return len(self.tokens) - self.computed

    @property
    def is_simple(self) -> bool:
        """Whether its next token is the likeliest one and nothing else is asked of it."""
        sampling = self.request.sampling
        return (
            sampling.temperature == 0
            and sampling.logprobs is None
            and sampling.repetition_penalty == 1
            and self.grammar is None
        )

    def begin(self, pool: BlockPool) -> None:
        """Hold the blocks of what is known already of its tokens."""
        self.blocks, self._content = pool.match(self.tokens)
        self._published = len(self.blocks)
        self.computed = len(self.blocks) * BLOCK
        if self.made == 0:  # what is known when a request comes back is its own
            self.reused = self.computed

    def reserve(self, pool: BlockPool, tokens: int) -> bool:
        """Hold blocks for `tokens` tokens; False, and nothing happens, where the pool has too few."""
        more = -(-tokens // BLOCK) - len(self.blocks)
        if more <= 0:
            return True
        taken = pool.allocate(more)
        if taken is None:
            return False
        self.blocks += taken
        return True

    def advance(self, pool: BlockPool, tokens: int) -> None:
        """So many tokens more are computed: blocks that are full now can be found by others."""
        self.computed += tokens
        while (self._published + 1) * BLOCK <= self.computed:
            start = self._published * BLOCK
            block = self.blocks[self._published]
            self._content = pool.publish(block, self._content, self.tokens[start : start + BLOCK])
            self._published += 1

    def leave(self, pool: BlockPool) -> None:
        """Hold nothing. What was made so far stays, and is computed again after the next `begin`."""
        pool.release(self.blocks)
        self.blocks, self.computed, self._published, self._content = [], 0, 0, ROOT

    def choose(self, logits: torch.Tensor) -> Token:
        """The next token from logits (vocab,)."""
        sampling = self.request.sampling
        weighed = logits[None]
        if sampling.repetition_penalty != 1:
            weighed = penalize(weighed, self._occurred(logits)[None], sampling.repetition_penalty)
        if self.grammar is not None:
            weighed = self.grammar.restrict(weighed)
        token = int(sample(weighed, sampling, self._generator))
        return describe(logits, token, sampling.logprobs)

    def push(self, token: Token) -> Delta:
        """Take a token that was chosen; returns what is certain of the answer by it."""
        self.tokens.append(token.id)
        if self._seen is not None:
            self._seen[token.id] = True
        text, finish = "", self._finish(token.id)
        if token.id not in self.stops:
            text = self._stream.push(token.id)
        if self._stream.is_stopped:
            finish = "stop"
        if finish is not None:
            text += self._stream.finish()
        reused = self.reused if self.made == 1 else 0
        return Delta(self.request.id, text, (token,), finish, reused)

    def cut(self) -> Delta:
        """End the answer as it is, as its time is up."""
        return Delta(self.request.id, self._stream.finish(), (), "deadline")

    def _finish(self, token: int) -> Finish | None:
        if token in self.stops or (self.grammar is not None and self.grammar.push(token)):
            return "stop"
        return "length" if self.made >= self.limit else None

    def _occurred(self, logits: torch.Tensor) -> torch.Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[self.tokens] = True
        return self._seen
