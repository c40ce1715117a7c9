"""A server whose answers a test writes: the routes that the page uses, over real HTTP, with a hand on every piece."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import packlight

PAGE = Path(packlight.__file__).parent / "server" / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
STATS = {
    "running": 0,
    "waiting": 0,
    "kv_tokens": 0,
    "kv_capacity_tokens": 4096,
    "steps": 0,
    "prompt_tokens": 0,
    "reused_tokens": 0,
    "generated_tokens": 0,
    "preemptions": 0,
    "tokens_per_second": 0.0,
}


@dataclass
class Script:
    """What the server says next, and what it heard.

    Args:
        pieces: of the next answers; each is sent as soon as `allowed` is above its place.
        allowed: how many pieces may go out; `release` raises it.
        refusals: (status, headers, message) of the next requests, which are answered with these first.
        key: that requests must bear; None: none.
        is_cut: whether the connection ends after the pieces, without a word.
        failure: what a stream says after its pieces, instead of its end; None: it ends well.
    """

    pieces: list[str] = field(default_factory=lambda: ["Good ", "morning."])
    allowed: int = 1000
    finish: str = "stop"
    refusals: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    key: str | None = None
    is_cut: bool = False
    failure: str | None = None
    stats: dict[str, Any] = field(default_factory=lambda: dict(STATS))
    evidence: dict[str, Any] = field(default_factory=lambda: {"model": "scripted", "recipe": None, "rows": []})
    heard: list[dict[str, Any]] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)

    def release(self, num_pieces: int) -> None:
        """Let so many pieces more go out."""
        self.allowed += num_pieces

    async def events(self) -> AsyncIterator[str]:
        """An answer in OpenAI's chunks."""
        is_whole = False
        try:
            for place, piece in enumerate(self.pieces):
                while place >= self.allowed:
                    await asyncio.sleep(0.01)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if self.failure is not None:
                yield _event({"error": {"message": self.failure, "type": "server_error"}})
            elif not self.is_cut:
                yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
                usage = {"prompt_tokens": 9, "completion_tokens": len(self.pieces), "total_tokens": 9}
                yield _event({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
            is_whole = True
        finally:
            if not is_whole:
                self.disconnected.set()


@contextmanager
def serve(script: Script) -> Iterator[str]:
    """The address of a server that follows a script."""
    server = uvicorn.Server(uvicorn.Config(_app(script), host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def _app(script: Script) -> Starlette:
    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        return FileResponse(PAGE / name, headers=HEADERS)

    def answer(request: Request, body: Mapping[str, Any]) -> Response:
        return _refusal(script, request) or JSONResponse(body)

    async def models(request: Request) -> Response:
        return answer(request, {"object": "list", "data": [{"id": script.evidence["model"], "object": "model"}]})

    async def stats(request: Request) -> Response:
        return answer(request, script.stats)

    async def evidence(request: Request) -> Response:
        return answer(request, script.evidence)

    async def chat(request: Request) -> Response:
        if refused := _refusal(script, request):
            return refused
        script.heard.append(await request.json())
        if script.refusals:
            status, headers, message = script.refusals.pop(0)
            return JSONResponse({"error": {"message": message, "type": "error"}}, status, headers)
        return StreamingResponse(script.events(), media_type="text/event-stream")

    routes = [("/", page), ("/page/{name}", page), ("/v1/models", models), ("/stats", stats), ("/evidence", evidence)]
    chat_route = Route("/v1/chat/completions", chat, methods=["POST"])
    return Starlette(routes=[*(Route(path, endpoint) for path, endpoint in routes), chat_route])


def _refusal(script: Script, request: Request) -> Response | None:
    if script.key is None or request.headers.get("authorization") == f"Bearer {script.key}":
        return None
    return JSONResponse({"error": {"message": "no such key", "type": "authentication_error"}}, 401)


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n"
