"""What the routes share: the model's name, the engine behind its loop, the tokenizer in a thread, the numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from packlight.runtime.serving.engine import ServingEngine
from packlight.server.errors import ApiError
from packlight.server.limits import read_body
from packlight.server.loop import EngineLoop
from packlight.server.metrics import Metrics
from packlight.server.settings import Served, Settings
from packlight.server.token_text import TokenTexts
from packlight.server.wire import ChatRequest, CompletionRequest, EmbeddingRequest, parse

_T = TypeVar("_T")
_Body = TypeVar("_Body", ChatRequest, CompletionRequest, EmbeddingRequest)


class Service:
    """One engine on the network."""

    def __init__(self, engine: ServingEngine, served: Served, settings: Settings) -> None:
        self.engine, self.served, self.settings = engine, served, settings
        self.metrics = Metrics()
        self.loop = EngineLoop(engine, settings.max_queue, self.metrics)
        self.token_texts = TokenTexts(engine.tokenizer)
        self.started_at = time.time()
        # One thread: a long prompt must not hold the event loop up, and tokenizers may not be used by two at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    def start(self) -> None:
        """Begin, for the tasks of the running event loop."""
        self.loop.start()
        self.metrics.watch(self.loop)

    def close(self, timeout_s: float) -> bool:
        """End; False where the engine did not come back in time. Blocks."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        return self.loop.close(timeout_s)

    async def in_thread(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call what may take long, such as a tokenizer, without holding the event loop up."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    async def read(self, request: Request, kind: type[_Body]) -> _Body:
        """The body of a request, checked as far as it can be without the tokenizer.

        Raises:
            ApiError: it is not JSON, too large, asks for what is not supported or for another model.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Pages of other sites may send every other type without asking first.
            message = f"the body must come as application/json, not {media_type or 'without a type'}"
            raise ApiError(415, message, code="unsupported_media_type")
        body = parse(await read_body(request, self.settings.max_body_bytes, self.settings.timeout_s), kind)
        self.check_model(body.model)
        return body.check()

    def check_model(self, name: str) -> None:
        """Raises ApiError, 404, for a model that is not the one that is served."""
        if name != self.served.name:
            message = f"there is no model {name!r} here: ask for {self.served.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_ids(self, ids: list[int], param: str) -> tuple[int, ...]:
        """A prompt that the engine may be given.

        Raises:
            ApiError: it is empty, longer than the context or holds an id that no token has.
        """
        if not ids:
            raise ApiError(400, f"{param} holds no token: give some text", param, "invalid_value")
        if (most := max(ids)) >= (known := len(self.engine.tokenizer)):
            raise ApiError(400, f"{param} holds the token {most}, and there are {known} tokens", param, "invalid_value")
        if len(ids) >= self.engine.context:
            raise too_long(self.engine.context, len(ids), 1, param)
        return tuple(ids)


def service_of(request: Request) -> Service:
    """The service that an app was built around."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def too_long(context: int, num_prompt: int, num_answer: int, param: str) -> ApiError:
    """The prompt and its answer do not fit."""
    return ApiError(
        400,
        f"this model's context is {context} tokens, and the request needs {num_prompt + num_answer}: {num_prompt} of "
        f"prompt and {num_answer} of answer",
        param,
        "context_length_exceeded",
    )
