"""Continuous batching over a paged KV cache: `step` is schedule, run, choose, retire.

Requests join and leave between steps; a step computes a token for everybody who is answered and chunks of prompts, all
in one pass over the weights (Orca, OSDI 2022; Sarathi-Serve, arXiv 2403.02310).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packlight.errors import CheckpointError, UsageError
from packlight.ops.paged_attention import Span
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.serving.blocks import BLOCK, BlockPool
from packlight.runtime.serving.engine import Delta, Request, ServingEngine, Stats
from packlight.runtime.serving.grammar import GrammarMaker
from packlight.runtime.serving.paged_model import PagedModel, paged_context
from packlight.runtime.serving.pooling import Pooling, pool
from packlight.runtime.serving.scheduler import Part, Scheduler
from packlight.runtime.serving.sequence import Sequence

STEP_TOKENS = 128
"""Tokens of a step, at most: what a prompt adds to the time of everybody else's next token."""


class TorchEngine(ServingEngine):
    """A model of transformers that serves many requests at once.

    Args:
        model: its attention is replaced, in place.
        stops: tokens that end an answer.
        kv_tokens: that the KV cache has room for, over all requests; whole blocks of it are used.
        users: requests that are computed at once, at most.
        context: tokens of a request, at most; None: what model and cache allow.
        pooling: how the hidden states of a text become its embedding; None: the model makes none.

    Raises:
        UsageError: an architecture whose attention cannot be paged, or a context that the model or the cache lack.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        kv_tokens: int,
        users: int,
        context: int | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        self.name = "torch"
        self.tokenizer, self.stops, self.pooling = tokenizer, stops, pooling
        self.context = _context(paged_context(model.config), kv_tokens, context)
        blocks = -(-max(kv_tokens, self.context) // BLOCK)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, users, STEP_TOKENS)
        self.model: PagedModel | None = PagedModel(model, blocks)
        self._grammars = GrammarMaker(tokenizer, stops)
        self._steps = self._prompt_tokens = self._reused_tokens = self._generated_tokens = 0

    def check(self, request: Request) -> None:
        tokens = len(request.prompt)
        if tokens == 0:
            raise UsageError("the prompt is empty: give at least one token")
        if tokens >= self.context:
            raise UsageError(
                f"the prompt has {tokens} tokens and there is room for {self.context}, answer included: shorten it"
            )
        vocabulary = self._vocabulary()
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise UsageError(f"the prompt has a token that the model does not know: ids are 0 to {vocabulary - 1}")
        if request.schema is not None:
            self._grammars.check(request.schema)

    def add(self, request: Request) -> None:
        self.check(request)
        limit = min(request.sampling.max_tokens, self.context - len(request.prompt))
        grammar = None if request.schema is None else self._grammars.make(request.schema)
        self.scheduler.add(Sequence(request, self.tokenizer, self.stops, limit, grammar))

    def cancel(self, request_id: str) -> None:
        self.scheduler.remove(request_id)

    def step(self) -> list[Delta]:
        deltas = [sequence.cut() for sequence in self.scheduler.expired()]
        parts = self.scheduler.schedule()
        if not parts:
            return deltas
        logits = self._run(parts)
        return deltas + self._choose(parts, logits)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    def stats(self) -> Stats:
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_tokens=self.pool.held * BLOCK,
            kv_capacity_tokens=self.pool.count * BLOCK,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.preemptions,
        )

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        if self.pooling is None:
            raise UsageError(
                "this model does not say how its hidden states become an embedding: serve it with --embeddings mean "
                "or --embeddings last if you know that one fits"
            )
        return [self._embed(prompt, self.pooling) for prompt in prompts]

    def compile(self, backend: str = "inductor") -> float:
        """Compile the model, for any batch; returns the seconds that it took. Raises what `PagedModel.compile` does."""
        assert self.model is not None
        return self.model.compile(backend)

    def close(self) -> None:
        self.model = None

    def _run(self, parts: Many[Part]) -> torch.Tensor:
        """One pass; returns the logits of those parts that end with their sequence's last token, (sequences, vocab)."""
        tokens: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        for part in parts:
            sequence, past = part.sequence, part.sequence.computed
            spans.append(Span(len(tokens), part.count, past, tuple(sequence.blocks)))
            tokens += sequence.tokens[past : past + part.count]
            if sequence.left == part.count:
                wanted.append(len(tokens) - 1)
        assert self.model is not None
        logits = self.model.run(tokens, spans, wanted)
        self._steps += 1
        for part in parts:
            self._count(part)
            part.sequence.advance(self.pool, part.count)
        return logits

    def _choose(self, parts: Many[Part], logits: torch.Tensor) -> list[Delta]:
        """The next token of every sequence whose tokens are all computed."""
        if len(logits) and bool(torch.isnan(logits).any()):
            raise CheckpointError("the model computes NaN: its weights are damaged, download it again")
        ready = [part.sequence for part in parts if part.sequence.left == 0]
        likeliest = logits.argmax(dim=-1).tolist() if len(logits) else []
        deltas = []
        for row, sequence in enumerate(ready):
            token = Token(likeliest[row]) if sequence.is_simple else sequence.choose(logits[row])
            delta = sequence.push(token)
            deltas.append(delta)
            if delta.finish is not None:
                self.scheduler.retire(sequence)
        self._generated_tokens += len(ready)
        return deltas

    def _count(self, part: Part) -> None:
        sequence = part.sequence
        if sequence.made == 0:
            is_first = sequence.computed == sequence.reused
            self._reused_tokens += sequence.reused if is_first else 0
            self._prompt_tokens += part.count + (sequence.reused if is_first else 0)

    def _embed(self, prompt: tuple[int, ...], pooling: Pooling) -> list[float]:
        self.check(Request("", prompt, Sampling()))
        assert self.model is not None
        blocks = self.scheduler.borrow(len(prompt))
        states = [
            self.model.hidden(prompt[start : start + STEP_TOKENS], start, blocks)
            for start in range(0, len(prompt), STEP_TOKENS)
        ]
        self.pool.release(blocks)
        return pool(torch.cat(states), pooling)

    def _vocabulary(self) -> int:
        assert self.model is not None
        rows = self.model.model.get_input_embeddings().num_embeddings
        assert isinstance(rows, int)
        return rows


def _context(of_model: int | None, kv_tokens: int, wanted: int | None) -> int:
    most = kv_tokens if of_model is None else min(of_model, kv_tokens)
    if wanted is None:
        return most
    if of_model is not None and wanted > of_model:
        raise UsageError(f"a context of {wanted} tokens is more than the {of_model} that the model was made for")
    if wanted > kv_tokens:
        raise UsageError(
            f"a context of {wanted} tokens does not fit the KV cache of {kv_tokens}: give it more memory, or a smaller "
            "context"
        )
    return wanted
