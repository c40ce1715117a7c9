"""How much anybody may ask for: requests per minute, bytes of a body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from packlight.server.auth import ANONYMOUS
from packlight.server.errors import ApiError


class TokenBucket:
    """As many requests as the bucket holds at once, and `per_minute` in the long run.

    Args:
        clock: seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = per_minute / 60
        self.capacity = max(1.0, per_minute)
        self._clock = clock
        self._level, self._at = self.capacity, clock()

    def take(self) -> float:
        """0 where a request may go on, or else the seconds until one may."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self.rate


class RateLimit:
    """Middleware: a bucket for each key, and one for all who have none. Only `/v1/` counts.

    There are as many buckets as keys: unknown keys do not come this far.
    """

    def __init__(self, app: ASGIApp, per_minute: float) -> None:
        self.app = app
        self.per_minute = per_minute
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            key = scope.get("client_key", ANONYMOUS)
            wait_s = self._buckets.setdefault(key, TokenBucket(self.per_minute)).take()
            if wait_s:
                message = f"more than {self.per_minute:g} requests a minute: ask again in {wait_s:.1f} s"
                error = ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413 where it is longer, without reading it to its end; 408 where it does not come in time.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="timeout") from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than the {max_bytes:,} bytes allowed", code="request_too_large")
