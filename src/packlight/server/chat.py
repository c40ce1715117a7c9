"""`/v1/chat/completions`: turns through the checkpoint's own chat template."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError
from starlette.requests import Request
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from packlight.runtime.sampling import Token
from packlight.runtime.serving.engine import Delta
from packlight.server.answering import Answer, Asked, answer
from packlight.server.errors import ApiError
from packlight.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    TextChoice,
    TokenLogprob,
    TopLogprob,
)
from packlight.server.service import service_of
from packlight.server.token_text import LEAST, TokenTexts
from packlight.server.wire import ChatRequest, Message, ResponseFormat

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    body = await service.read(request, ChatRequest)
    turns = [turn(message, f"messages.{place}") for place, message in enumerate(body.messages)]
    ids = await service.in_thread(template_ids, service.engine.tokenizer, turns)
    asked = Asked(
        body,
        [service.check_ids(ids, "messages")],
        limit=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        schema=schema_text(body.response_format),
    )
    return await answer(service, request, asked, ChatShape(service.token_texts))


def turn(message: Message, param: str) -> dict[str, str]:
    """A message as chat templates take it.

    Raises:
        ApiError: another role, no text, or something that is not text.
    """
    if message.role not in _ROLES:
        raise _unsupported(f"the role of {param} is one of {', '.join(_ROLES)}, not {message.role!r}", f"{param}.role")
    for name in ("refusal", "audio", "function_call", "tool_calls", "tool_call_id"):
        if getattr(message, name) not in (None, []):
            raise _unsupported(f"{param}.{name} is not supported: turns are text", f"{param}.{name}")
    if message.content is None:
        raise ApiError(400, f"{param} has no content: give some text", f"{param}.content", "invalid_value")
    made = {"role": _ROLES[message.role], "content": _text(message.content, f"{param}.content")}
    return made if message.name is None else {**made, "name": message.name}


def template_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    """The conversation as tokens, up to where the assistant's turn begins.

    Raises:
        ApiError: the checkpoint has no template, or its template refuses the turns.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template: use /v1/completions", "messages", "unsupported_parameter")
    try:
        encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
    return list(encoded["input_ids"])


def schema_text(wanted: ResponseFormat | None) -> str | None:
    """The JSON schema that an answer must follow. Raises ApiError where it is missing."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return '{"type":"object"}'
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        param = "response_format.json_schema.schema"
        raise ApiError(400, f"{param} is missing: give a JSON schema", param, "missing_required_parameter")
    return json.dumps(wanted.json_schema.schema_)


class ChatShape:
    """Answers as OpenAI's chat completions."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def choice(self, index: int, answer: Answer) -> ChatChoice:
        """A whole answer."""
        return ChatChoice.model_construct(
            index=index,
            message=AssistantMessage.model_construct(role="assistant", content=answer.text, refusal=None),
            logprobs=self._logprobs(answer.tokens),
            finish_reason=answer.finish_reason,
        )

    def opening(self, num_answers: int) -> list[ChatChunkChoice | TextChoice]:
        """Who speaks."""
        return [_chunk(index, ChatDelta.model_construct(role="assistant", content="")) for index in range(num_answers)]

    def chunks(self, index: int, delta: Delta, finish: FinishReason | None) -> list[ChatChunkChoice | TextChoice]:
        """Text first, then a chunk of its own that says how the answer ended."""
        logprobs = self._logprobs(delta.tokens)
        made: list[ChatChunkChoice | TextChoice] = []
        if delta.text or logprobs is not None:
            made.append(_chunk(index, ChatDelta.model_construct(content=delta.text), logprobs))
        if finish is not None:
            made.append(_chunk(index, ChatDelta.model_construct(), None, finish))
        return made

    def _logprobs(self, tokens: list[Token] | tuple[Token, ...]) -> ChatLogprobs | None:
        if all(token.logprob is None for token in tokens):
            return None
        content = [
            TokenLogprob.model_construct(
                **self._one(token.id, LEAST if token.logprob is None else token.logprob),
                top_logprobs=[TopLogprob.model_construct(**self._one(other, logprob)) for other, logprob in token.top],
            )
            for token in tokens
        ]
        return ChatLogprobs.model_construct(content=content, refusal=None)

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._texts.of(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": data}


def _chunk(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish: FinishReason | None = None
) -> ChatChunkChoice:
    return ChatChunkChoice.model_construct(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)


def _text(content: str | list[dict[str, Any]], param: str) -> str:
    """The text of a message; its parts are put together as they are."""
    if isinstance(content, str):
        return content
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise _unsupported(f"{param}: parts of type {kind!r} are not supported: only text is", param)
        if not isinstance(text, str):
            raise ApiError(400, f"{param}: a part of type text needs a text", param, "invalid_type")
    return "".join(part["text"] for part in content)


def _unsupported(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "unsupported_value")
