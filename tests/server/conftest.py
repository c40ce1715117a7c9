"""A real server on a free port, around the scripted engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from tests.server.scripted_engine import ScriptedEngine, byte_tokenizer
from transformers import PreTrainedTokenizerBase

from packlight.server.app import build_app
from packlight.server.run import address_of, bind, uvicorn_config
from packlight.server.settings import Served, Settings

MODEL = "scripted"
PLAIN: dict[str, Any] = {"timeout": 30, "verify": False}
"""Of a request: no certificates are read, which takes longer than the request."""


@dataclass
class Running:
    """A server, its engine and what it logged."""

    url: str
    engine: ScriptedEngine
    app: Starlette
    lines: list[str] = field(default_factory=list)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """A request of its own connection."""
        return httpx.post(f"{self.url}{path}", json=body, **PLAIN, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", **PLAIN, **options)

    def complete(self, prompt: Any = "x", **fields: Any) -> httpx.Response:
        """A text completion, greedy unless it says otherwise."""
        return self.post("/v1/completions", {"model": MODEL, "prompt": prompt, "temperature": 0, **fields})

    def chat(self, text: Any = "hello", **fields: Any) -> httpx.Response:
        """A chat completion, greedy unless it says otherwise."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0, **fields})

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait for something that comes soon, or fail."""
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, "it did not come"
            time.sleep(0.005)

    @property
    def in_flight(self) -> int:
        return int(self.app.state.service.loop.in_flight)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def start(tokenizer: PreTrainedTokenizerBase) -> Iterator[Start]:
    """`start(engine={...}, directory=..., **settings)`: a server for one test."""
    with ExitStack() as stack:

        def begin(engine: dict[str, Any] | None = None, directory: Path | None = None, **settings: Any) -> Running:
            made = ScriptedEngine(tokenizer, **(engine or {}))
            return stack.enter_context(running(made, Settings(**settings), directory))

        yield begin


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerBase) -> Iterator[Running]:
    """A server that the tests of a file share."""
    with running(ScriptedEngine(tokenizer, dimensions=4), Settings(max_body_bytes=1 << 16)) as one:
        yield one


@contextmanager
def running(engine: ScriptedEngine, settings: Settings, directory: Path | None = None) -> Iterator[Running]:
    """Serve in a thread for the length of a block."""
    lines: list[str] = []
    app = build_app(engine, Served(MODEL, directory), settings, lines.append)
    bound: socket.socket = bind("127.0.0.1", 0)
    served = uvicorn.Server(uvicorn_config(app))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [bound]})
    thread.start()
    one = Running(address_of(bound), engine, app, lines)
    one.wait_until(lambda: served.started)
    try:
        yield one
    finally:
        engine.may_step.set()
        served.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
