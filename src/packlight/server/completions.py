"""`/v1/completions`: prompts that are continued as they are."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from packlight.runtime.sampling import Token
from packlight.runtime.serving.engine import Delta
from packlight.runtime.text import TextStream
from packlight.runtime.tokenizer import raw_ids
from packlight.server.answering import Answer, Asked, answer
from packlight.server.responses import ChatChunkChoice, FinishReason, TextChoice, TextLogprobs
from packlight.server.service import Service, service_of
from packlight.server.token_text import LEAST, TokenTexts
from packlight.server.wire import DEFAULT_COMPLETION_TOKENS, CompletionRequest


async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    service = service_of(request)
    body = await service.read(request, CompletionRequest)
    asked = Asked(
        body,
        await prompts(service, body.prompt, "prompt"),
        limit=body.max_tokens,
        default_limit=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
    )
    return await answer(service, request, asked, TextShape(service.engine.tokenizer, service.token_texts))


async def prompts(
    service: Service, given: str | list[str] | list[int] | list[list[int]], param: str
) -> list[tuple[int, ...]]:
    """Token ids of texts, or of what is token ids already, one of either or several.

    Raises:
        ApiError: one is empty, too long, or holds an id that no token has.
    """
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    tokens = [
        await service.in_thread(raw_ids, service.engine.tokenizer, one) if isinstance(one, str) else one
        for one in several
    ]
    return [service.check_ids(list(ids), param) for ids in tokens]


class TextShape:
    """Answers as OpenAI's text completions."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: TokenTexts) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._offsets: dict[int, _Offsets] = {}

    def choice(self, index: int, answer: Answer) -> TextChoice:
        """A whole answer."""
        return self._choice(index, answer.text, answer.tokens, answer.finish_reason)

    def opening(self, num_answers: int) -> list[ChatChunkChoice | TextChoice]:
        """Nothing comes before the text."""
        return []

    def chunks(self, index: int, delta: Delta, finish: FinishReason | None) -> list[ChatChunkChoice | TextChoice]:
        """Text, and with the last of it how the answer ended."""
        choice = self._choice(index, delta.text, delta.tokens, finish)
        is_seen = delta.text or finish is not None or choice.logprobs is not None
        return [choice] if is_seen else []

    def _choice(
        self, index: int, text: str, tokens: list[Token] | tuple[Token, ...], finish: FinishReason | None
    ) -> TextChoice:
        return TextChoice.model_construct(
            index=index, text=text, logprobs=self._logprobs(index, tokens), finish_reason=finish
        )

    def _logprobs(self, index: int, tokens: list[Token] | tuple[Token, ...]) -> TextLogprobs | None:
        if all(token.logprob is None for token in tokens):
            return None
        offsets = self._offsets.setdefault(index, _Offsets(self._tokenizer))
        return TextLogprobs.model_construct(
            tokens=[self._texts.of(token.id)[0] for token in tokens],
            token_logprobs=[None if token.logprob is None else max(token.logprob, LEAST) for token in tokens],
            top_logprobs=[{self._texts.of(other)[0]: max(p, LEAST) for other, p in token.top} for token in tokens],
            text_offset=[offsets.of(token.id) for token in tokens],
        )


class _Offsets:
    """Where in an answer's text each of its tokens begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._stream = TextStream(tokenizer)
        self._place = 0

    def of(self, token: int) -> int:
        begin = self._place
        self._place += len(self._stream.push(token))
        return begin
