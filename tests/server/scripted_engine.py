"""A small engine that computes nothing and keeps every promise of the interface: the next token follows from the last.

What it answers can be said beforehand (`expected`), how long a step takes can be chosen, and it fails when told to.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, get_ident

from tests.conftest import save_byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from packlight.errors import UsageError
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.serving.engine import Delta, Finish, Request, Stats
from packlight.runtime.text import TextStream

LETTERS = b"etaoin shrdlucmf"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' and message['content'] == 'refuse me' %}"
    "{{ raise_exception('no such words') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = 0


def next_token(last: int, seed: int = 0) -> int:
    """The rule: a letter that depends on the one before and, where tokens are drawn, on the seed."""
    return LETTERS[(last * 7 + 3 + seed) % len(LETTERS)]


def expected(prompt: bytes | list[int], num_tokens: int, seed: int = 0) -> str:
    """What the engine answers."""
    made = list(prompt)
    for _ in range(num_tokens):
        made.append(next_token(made[-1], seed))
    return bytes(made[-num_tokens:]).decode()


@dataclass
class _Running:
    request: Request
    stream: TextStream
    made: list[Token] = field(default_factory=list)


class ScriptedEngine:
    """At most `users` answers at once, one token each per step.

    Args:
        end_after: tokens after which the model ends its turn; None: never.
        step_s: how long a step takes; `may_step` can hold it up altogether, and `is_stepping` tells that one began.
        dimensions: of embeddings; None: the model makes none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int = 512,
        users: int = 4,
        step_s: float = 0.0,
        end_after: int | None = None,
        dimensions: int | None = None,
    ) -> None:
        self.name = "scripted"
        self.tokenizer, self.context, self.users, self.step_s = tokenizer, context, users, step_s
        self.end_after, self.dimensions = end_after, dimensions
        self.fails_with: BaseException | None = None
        self.may_step = Event()
        self.may_step.set()
        self.is_stepping = Event()
        self.cancelled: list[str] = []
        self.is_closed = False
        self._owner: int | None = None
        self._waiting: deque[Request] = deque()
        self._running: dict[str, _Running] = {}
        self._steps = self._prompt_tokens = self._reused_tokens = self._generated_tokens = 0
        self._seen: set[tuple[int, ...]] = set()

    def check(self, request: Request) -> None:
        """Raises UsageError for what can never be served."""
        if not request.prompt or len(request.prompt) + 1 > self.context:
            raise UsageError(f"a prompt has 1 to {self.context - 1} tokens, not {len(request.prompt)}")
        if request.schema not in (None, '{"type":"object"}'):
            raise UsageError(f"the schema {request.schema} cannot be followed: any object can")

    def add(self, request: Request) -> None:
        self._check_thread()
        self.check(request)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        self._check_thread()
        self.cancelled.append(request_id)
        self._running.pop(request_id, None)
        self._waiting = deque(one for one in self._waiting if one.id != request_id)

    def step(self) -> list[Delta]:
        self._check_thread()
        self.is_stepping.set()
        self.may_step.wait()
        if self.fails_with is not None:
            raise self.fails_with
        if self.step_s:
            time.sleep(self.step_s)
        self._steps += 1
        deltas = self._expire_waiting()
        reused = self._admit()
        return deltas + [self._advance(one, reused.get(one.request.id, 0)) for one in list(self._running.values())]

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def stats(self) -> Stats:
        held = [len(one.request.prompt) + len(one.made) for one in list(self._running.values())]
        return Stats(
            running=len(held),
            waiting=len(self._waiting),
            kv_tokens=sum(held),
            kv_capacity_tokens=self.users * self.context,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=0,
        )

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        self._check_thread()
        if self.dimensions is None:
            raise UsageError("this model was not made for embeddings: serve one that was")
        return [[float(prompt[place % len(prompt)]) for place in range(self.dimensions)] for prompt in prompts]

    def close(self) -> None:
        self.is_closed = True

    def _check_thread(self) -> None:
        """An engine belongs to one thread."""
        self._owner = self._owner or get_ident()
        assert self._owner == get_ident()

    def _expire_waiting(self) -> list[Delta]:
        late = [one for one in self._waiting if one.deadline is not None and one.deadline < time.monotonic()]
        self._waiting = deque(one for one in self._waiting if one not in late)
        return [Delta(one.id, finish="deadline") for one in late]

    def _admit(self) -> dict[str, int]:
        """Requests join; tokens of each prompt that an earlier one had."""
        reused = {}
        while self._waiting and len(self._running) < self.users:
            request = self._waiting.popleft()
            self._running[request.id] = _Running(request, TextStream(self.tokenizer, request.sampling.stop))
            reused[request.id] = len(request.prompt) - 1 if request.prompt in self._seen else 0
            self._seen.add(request.prompt)
            self._prompt_tokens += len(request.prompt)
            self._reused_tokens += reused[request.id]
        return reused

    def _advance(self, one: _Running, reused: int) -> Delta:
        token = self._choose(one)
        one.made.append(token)
        self._generated_tokens += 1
        text = "" if token.id == END else one.stream.push(token.id)
        finish = self._finish(one)
        if finish is not None:
            text += one.stream.finish()
            del self._running[one.request.id]
        return Delta(one.request.id, text, (token,), finish, reused)

    def _choose(self, one: _Running) -> Token:
        sampling = one.request.sampling
        if one.request.schema is not None:
            chosen = b"{}\0"[len(one.made)]
        elif self.end_after is not None and len(one.made) >= self.end_after:
            chosen = END
        else:
            last = one.made[-1].id if one.made else one.request.prompt[-1]
            chosen = next_token(last, sampling.seed if sampling.temperature else 0)
        return _described(chosen, sampling)

    def _finish(self, one: _Running) -> Finish | None:
        request = one.request
        if one.made[-1].id == END or one.stream.is_stopped:
            return "stop"
        if len(one.made) >= request.sampling.max_tokens or len(request.prompt) + len(one.made) >= self.context:
            return "length"
        if request.deadline is not None and time.monotonic() > request.deadline:
            return "deadline"
        return None


def _described(chosen: int, sampling: Sampling) -> Token:
    if sampling.logprobs is None:
        return Token(chosen)
    others = [(chosen, -0.5), *((other, -1.0 - other / 256) for other in range(128, 128 + 20))]
    return Token(chosen, -0.5, tuple(others[: sampling.logprobs]))


def byte_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """One token per byte, and a chat template."""
    save_byte_tokenizer(directory)
    if chat_template is not None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat_template}))
    return AutoTokenizer.from_pretrained(directory)
