"""One line of JSON for each request: who, what, how long, how many tokens. Nothing of what was asked or answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packlight.server.metrics import Metrics
from packlight.server.responses import Usage

GONE = 499
"""The status of a request whose client went away before it was answered; nginx's word for it."""
_LONGEST_PATH = 200


class AccessLog:
    """Middleware, the outermost: times each request, counts it, and writes its line.

    Args:
        routes: patterns of paths that metrics tell apart; all others are one.
        write: takes a line; None writes nothing.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Callable[[Scope], str], write: Callable[[str], None] | None
    ) -> None:
        self.app, self.metrics, self.routes, self.write = app, metrics, routes, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["arrived_at"] = time.monotonic()
        status, is_whole = GONE, False

        async def counted(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        in_progress = scope["app"].state.in_progress
        in_progress.add(id(scope))
        try:
            await self.app(scope, receive, counted)
        finally:
            in_progress.discard(id(scope))
            seconds = time.monotonic() - scope["arrived_at"]
            self.metrics.requested(self.routes(scope), status, seconds)
            if self.write is not None:
                self.write(json.dumps(_line(scope, status, seconds, is_whole)))


def line_writer(stream: TextIO) -> Callable[[str], None]:
    """Writes lines to a stream until that fails, as when nobody reads a pipe any more."""
    is_open = True

    def write(line: str) -> None:
        nonlocal is_open
        if is_open:
            try:
                print(line, file=stream, flush=True)
            except OSError:
                is_open = False

    return write


def _line(scope: Scope, status: int, seconds: float, is_whole: bool) -> dict[str, Any]:
    client = scope.get("client")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": None if client is None else client[0],
        "key": scope.get("client_key"),
        "method": scope["method"],
        "path": scope["path"][:_LONGEST_PATH],
        "status": status,
        "seconds": round(seconds, 4),
    }
    usage = scope.get("usage")
    if isinstance(usage, Usage):
        line |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    return line if is_whole else line | {"is_cut": True}
