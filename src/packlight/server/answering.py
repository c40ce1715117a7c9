"""From prompts to an HTTP answer, whole or as server-sent events; chat and completions differ in shape alone."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.serving.engine import Delta, Finish, Request
from packlight.server.errors import ApiError
from packlight.server.loop import Batch, timed_out
from packlight.server.responses import (
    Answered,
    ChatChoice,
    ChatChunkChoice,
    FinishReason,
    PromptTokensDetails,
    TextChoice,
    Usage,
)
from packlight.server.service import Service, too_long
from packlight.server.wire import Sampled

SEEDS = 2**32
"""Seeds are taken modulo this, which every engine takes."""
_T = TypeVar("_T")
_log = logging.getLogger(__name__)

STALL_S = 60.0
"""A reader that takes nothing for so long is given up, if the answer's deadline has passed."""
DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer as it has come so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    reused_tokens: int = 0
    first_at: float | None = None

    def add(self, delta: Delta) -> None:
        """A piece has come."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish = delta.finish
        self.reused_tokens += delta.reused_tokens
        if delta.tokens and self.first_at is None:
            self.first_at = time.monotonic()

    @property
    def finish_reason(self) -> FinishReason:
        """In OpenAI's words, which have none for a deadline: the answer is as long as time allowed."""
        return "stop" if self.finish == "stop" else "length"


class Shape(Protocol):
    """How one route dresses answers. An instance belongs to one request."""

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, answer: Answer) -> ChatChoice | TextChoice:
        """A whole answer."""
        ...

    def opening(self, num_answers: int) -> list[ChatChunkChoice | TextChoice]:
        """What comes before the first text."""
        ...

    def chunks(self, index: int, delta: Delta, finish: FinishReason | None) -> list[ChatChunkChoice | TextChoice]:
        """What a piece of an answer becomes; nothing where it adds nothing that can be seen."""
        ...


@dataclass(frozen=True)
class Asked:
    """A request, as far as shapes do not matter.

    Args:
        prompts: token ids; each gets `body.n` answers.
        limit: tokens of an answer that the client allows; None: what fits.
        default_limit: where the client names none; None: what fits.
    """

    body: Sampled
    prompts: Sequence[tuple[int, ...]]
    limit: int | None
    default_limit: int | None = None
    logprobs: int | None = None
    schema: str | None = None

    @property
    def num_choices(self) -> int:
        return self.body.n or 1


async def answer(service: Service, http: HttpRequest, asked: Asked, shape: Shape) -> Response:
    """The response, which puts the requests in the queue when it is sent.

    Raises:
        ApiError: the answers cannot fit.
        UsageError: what the engine refuses.
    """
    wanted = len(asked.prompts) * asked.num_choices
    if wanted > service.settings.max_queue:
        message = f"{wanted} answers in one request are more than the queue holds, {service.settings.max_queue}"
        raise ApiError(400, message, "n", "invalid_value")
    arrived_at = http.scope.get("arrived_at", time.monotonic())
    request_id = f"{shape.prefix}-{uuid.uuid4().hex}"
    requests = _requests(service, asked, request_id, arrived_at + service.settings.timeout_s)
    for request in requests[:: asked.num_choices]:
        if request.schema is None:
            service.engine.check(request)
        else:
            await service.in_thread(service.engine.check, request)  # a grammar takes time to compile
    return AnswerResponse(service, asked, shape, requests, request_id, arrived_at)


def _requests(service: Service, asked: Asked, request_id: str, deadline: float) -> list[Request]:
    """A request to the engine for each answer: the choices of a prompt one after the other, with seeds that follow."""
    body = asked.body
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    sampling = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        stop=body.stops(),
        logprobs=asked.logprobs,
    )
    return [
        Request(
            f"{request_id}-{row * asked.num_choices + choice}",
            prompt,
            replace(sampling, seed=(seed + choice) % SEEDS, max_tokens=_limit(service, asked, len(prompt))),
            asked.schema,
            deadline,
        )
        for row, prompt in enumerate(asked.prompts)
        for choice in range(asked.num_choices)
    ]


def _limit(service: Service, asked: Asked, num_prompt: int) -> int:
    """Tokens of an answer, at most.

    Raises:
        ApiError: more were asked for than the context leaves or the server allows.
    """
    context, most = service.engine.context, service.settings.max_tokens
    if asked.limit is None:
        return min(asked.default_limit or context, context - num_prompt, most or context)
    if num_prompt + asked.limit > context:
        raise too_long(context, num_prompt, asked.limit, "max_tokens")
    if most is not None and asked.limit > most:
        raise ApiError(400, f"this server's answers have at most {most} tokens", "max_tokens", "invalid_value")
    return asked.limit


class AnswerResponse(Response):
    """Sends answers. Errors before the first piece of text have their own status; later ones end the stream.

    A client that goes away, at any time, cancels its requests.
    """

    def __init__(
        self,
        service: Service,
        asked: Asked,
        shape: Shape,
        requests: list[Request],
        request_id: str,
        arrived_at: float,
    ) -> None:
        self.service, self.asked, self.shape, self.requests = service, asked, shape, requests
        self.request_id, self.arrived_at = request_id, arrived_at
        self.created = int(time.time())
        self.answers = [Answer() for _ in requests]
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.loop.submit(self.requests) as batch:
            sending = self._stream(batch, send) if self.asked.body.stream else self._whole(batch, scope, receive, send)
            try:
                await unless_disconnected(receive, sending)
            except TimeoutError:
                _log.warning("%s: the client did not read its answer", self.request_id)
        scope["usage"] = self._usage()

    async def _whole(self, batch: Batch, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self._followed(batch):
            pass
        if all(one.finish == "deadline" and not one.tokens for one in self.answers):
            raise timed_out()
        choices = [self.shape.choice(index, one) for index, one in enumerate(self.answers)]
        body = self._document(self.shape.whole, choices, self._usage())
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, batch: Batch, send: Send) -> None:
        has_begun = False
        try:
            async with aclosing(self._followed(batch)) as pieces:
                async for index, delta in pieces:
                    if not has_begun:
                        if delta.finish == "deadline" and not delta.tokens:
                            raise timed_out()
                        has_begun = True
                        await self._begin(send)
                    finish = None if delta.finish is None else self.answers[index].finish_reason
                    for choice in self.shape.chunks(index, delta, finish):
                        await self._send(send, _event(self._document(self.shape.piece, [choice])))
        except ApiError as error:
            if not has_begun:
                raise
            await self._send(send, _event(_json(error)), is_last=True)
            return
        if self._has_usage:
            await self._send(send, _event(self._document(self.shape.piece, [], self._usage())))
        await self._send(send, DONE, is_last=True)

    async def _begin(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for choice in self.shape.opening(len(self.answers)):
            await self._send(send, _event(self._document(self.shape.piece, [choice])))

    async def _send(self, send: Send, data: bytes, is_last: bool = False) -> None:
        """Send, and wait while the client reads slowly: until its deadline, and `STALL_S` more."""
        left_s = self.arrived_at + self.service.settings.timeout_s - time.monotonic()
        async with asyncio.timeout(max(0.0, left_s) + STALL_S):
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _followed(self, batch: Batch) -> AsyncGenerator[tuple[int, Delta]]:
        """The pieces, while `answers` and the metrics keep up."""
        async with aclosing(batch.deltas()) as deltas:
            async for index, delta in deltas:
                one = self.answers[index]
                is_first = one.first_at is None
                one.add(delta)
                if one.first_at is not None and is_first:
                    self.service.metrics.began(one.first_at - self.arrived_at)
                if one.first_at is not None and delta.finish is not None:
                    self.service.metrics.ended(time.monotonic() - one.first_at, len(one.tokens))
                yield index, delta

    @property
    def _has_usage(self) -> bool:
        """Whether a stream tells its usage at its end, and null before."""
        options = self.asked.body.stream_options
        return options is not None and bool(options.include_usage)

    def _usage(self) -> Usage:
        prompt = sum(map(len, self.asked.prompts))
        made = sum(len(one.tokens) for one in self.answers)
        # Of a prompt's choices the later ones reuse what the first computed: that is no cache of the client's.
        cached = sum(one.reused_tokens for one in self.answers[:: self.asked.num_choices])
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=min(cached, prompt)),
        )

    def _document(
        self, kind: str, choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice], usage: Usage | None = None
    ) -> bytes:
        document = Answered.model_construct(
            id=self.request_id,
            object=kind,
            created=self.created,
            model=self.service.served.name,
            system_fingerprint=None,
            choices=list(choices),
        )
        if usage is not None or self._has_usage:
            document.usage = usage
        return document.model_dump_json(exclude_unset=True).encode()


async def unless_disconnected(receive: Receive, work: Awaitable[_T]) -> _T | None:
    """Await `work`. When the client goes away, cancel it and return None: nobody is left to be told."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(document: bytes) -> bytes:
    return b"data: " + document + b"\n\n"


def _json(error: ApiError) -> bytes:
    return bytes(error.response().body)
