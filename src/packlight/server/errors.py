"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from packlight.errors import PacklightError, UsageError

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(PacklightError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence for whoever wrote the client.
        param: the field of the body that is to blame.
        code: a word for programs.
        retry_after_s: when it is worth asking again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's word for the class of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return INVALID if self.status < 500 else SERVER

    def document(self) -> dict[str, Any]:
        """The body, which is also what a stream that has begun ends with."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """What is sent."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.document(), self.status, headers)


def from_validation(error: ValidationError) -> ApiError:
    """The first of what pydantic found wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON in UTF-8: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument: {param}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"missing required parameter: {param}", param, "missing_required_parameter")
    return ApiError(400, f"{param or 'the body'}: {_lower(first)}", param, _code(first))


async def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for what this package raises."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_usage_error(request: Request, error: Exception) -> Response:
    """What an engine refuses is the client's mistake: it says what was given and what is allowed."""
    assert isinstance(error, UsageError)
    return ApiError(400, str(error)).response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What starlette itself refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    words = {404: f"there is no {where}", 405: f"{where} is not allowed: see the Allow header"}
    response = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code=None).response()
    response.headers.update(error.headers or {})
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has the traceback, the client has a sentence."""
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error").response()


def _code(error: ErrorDetails) -> str:
    return "invalid_type" if error["type"].endswith("_type") else "invalid_value"


def _lower(error: ErrorDetails) -> str:
    return error["msg"][:1].lower() + error["msg"][1:]
