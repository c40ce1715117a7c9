"""The app on a socket, until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from packlight.errors import UsageError
from packlight.server.auth import is_loopback
from packlight.server.loop import shutting_down
from packlight.server.service import Service
from packlight.server.settings import Settings

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none sends into one that is just closed."""
_FLUSH_S = 3
_TICK_S = 0.05


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything slow is done. It does not listen yet.

    Raises:
        UsageError: there is no such host, the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise UsageError(f"--host {host!r} is no address of this machine: {reason}") from error
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise UsageError(f"cannot serve at {host} port {port}: {error.strerror}") from error
    return made


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_reach(bound: socket.socket, settings: Settings, is_anonymous_allowed: bool) -> None:
    """Raises UsageError for a server that others reach and that has no keys, unless that is meant."""
    host = bound.getsockname()[0]
    if not is_loopback(host) and not settings.keys and not is_anonymous_allowed:
        raise UsageError(
            f"others can reach {host}, and there are no keys: give --api-key-file, or mean it with --allow-anonymous"
        )


def serve(app: Starlette, bound: socket.socket, settings: Settings, on_ready: Callable[[], None]) -> bool:
    """Serve until SIGTERM or SIGINT, and let what is in flight end.

    Returns:
        Whether everything came to its end; False where a step of the engine did not come back.
    """
    config = uvicorn_config(app)
    _Server(config, app, settings, on_ready).run(sockets=[bound])
    return bool(app.state.is_closed)


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs the app: it logs nothing of its own, and says nothing of itself."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
    )


class _Server(uvicorn.Server):
    """uvicorn's, which closes its door at a signal; this one first answers 503 for as long as answers are in flight."""

    def __init__(
        self, config: uvicorn.Config, app: Starlette, settings: Settings, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._app, self._settings, self._on_ready = app, settings, on_ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server in good order, and a second one at once. The process lives on."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for one in signals:
            loop.add_signal_handler(one, self._end)
        yield
        for one in signals:
            loop.remove_signal_handler(one)

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        service = self._app.state.service
        assert isinstance(service, Service)
        service.loop.is_draining = True
        until = time.monotonic() + self._settings.grace_s
        while self._is_busy(service) and time.monotonic() < until:
            await asyncio.sleep(_TICK_S)
        if self._is_busy(service):
            # What cannot be told to clients that do not read is cut off, which uvicorn would report as failures.
            service.loop.fail_all(shutting_down())
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.should_exit = True

    def _is_busy(self, service: Service) -> bool:
        return bool(service.loop.in_flight or self._app.state.in_progress)
