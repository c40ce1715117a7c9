"""The bodies of requests, as OpenAI defines them, and vLLM's names for what OpenAI lacks.

A field that OpenAI does not know is refused, as OpenAI refuses it. A field that it knows and that this server cannot
fulfil is refused as soon as it asks for something: `tools: []` passes, `tools: [...]` does not. Fields that do not
change the answer (`user`, `prompt_cache_key` and the like) pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packlight.runtime.sampling import MAX_LOGPROBS
from packlight.server.errors import ApiError, from_validation

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_INPUTS = 256
DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI makes of a completion that names no limit."""

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Body = TypeVar("_Body", bound=BaseModel)


class _Wire(BaseModel):
    """Types as JSON has them: no number in quotes, no NaN, no further fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Wire):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampled(_Wire):
    """What chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check(self) -> Self:
        """Refuse what is not supported. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options belongs to stream: true", "stream_options", "invalid_value")
        _refuse(self, frequency_penalty=(0,), presence_penalty=(0,), logit_bias=({},))
        return self


class Message(_Wire):
    """One turn. What it may hold is checked in `chat.py`, which can say it better."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class JsonSchema(_Wire):
    """A named schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Wire):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: str | None = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self) -> Self:
        """Refuse what is not supported. Raises ApiError."""
        super().check()
        _refuse(
            self,
            tools=([],),
            functions=([],),
            tool_choice=("none", "auto"),
            function_call=("none", "auto"),
            modalities=(["text"],),
            metadata=({},),
            reasoning_effort=("none",),
            service_tier=("auto", "default"),
            store=(False,),
            verbosity=("medium",),
            audio=(),
            moderation=(),
            parallel_tool_calls=(),
            prediction=(),
            web_search_options=(),
        )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs belongs to logprobs: true", "top_logprobs", "invalid_value")
        return self


class CompletionRequest(Sampled):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    best_of: int | None = None
    echo: Any = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Any = None

    def check(self) -> Self:
        """Refuse what is not supported. Raises ApiError."""
        super().check()
        _refuse(self, echo=(False,), suffix=("",), best_of=(1,) if self.n in (None, 1) else ())
        return self


class EmbeddingRequest(_Wire):
    """The body of `/v1/embeddings`."""

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    dimensions: Any = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    def check(self) -> Self:
        """Refuse what is not supported. Raises ApiError."""
        _refuse(self, dimensions=())
        return self


def parse(body: bytes, kind: type[_Body]) -> _Body:
    """A body as its model. Raises ApiError, 400, that names what is wrong first."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def _refuse(body: BaseModel, **harmless: tuple[Any, ...]) -> None:
    """Refuse fields with other values than null and those that ask for nothing."""
    for name, values in harmless.items():
        given = getattr(body, name)
        if given is not None and not any(type(given) is type(value) and given == value for value in _typed(values)):
            raise ApiError(400, f"{name} is not supported by this server: leave it out", name, "unsupported_parameter")


def _typed(values: tuple[Any, ...]) -> list[Any]:
    """With each integer its float: JSON does not tell 0 from 0.0."""
    return [*values, *(float(value) for value in values if type(value) is int)]
