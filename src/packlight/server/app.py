"""The Starlette app around an engine: routes, and what every request passes on its way to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from packlight.errors import UsageError
from packlight.runtime.serving.engine import ServingEngine
from packlight.server import page_files, status
from packlight.server.access_log import AccessLog
from packlight.server.auth import Authentication
from packlight.server.chat import chat_completions
from packlight.server.completions import completions
from packlight.server.embeddings import embeddings
from packlight.server.errors import ApiError, on_api_error, on_bug, on_http_exception, on_usage_error
from packlight.server.limits import RateLimit
from packlight.server.service import Service
from packlight.server.settings import Served, Settings

ROUTES: tuple[Route, ...] = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/models", status.models),
    Route("/v1/models/{name:path}", status.model),
    Route("/health", status.health),
    Route("/ready", status.ready),
    Route("/metrics", status.metrics),
    Route("/stats", status.stats),
    Route("/evidence", status.evidence_rows),
    Route("/", page_files.index),
    Route("/page/{name}", page_files.named),
)


def build_app(
    engine: ServingEngine,
    served: Served,
    settings: Settings,
    write_line: Callable[[str], None] | None = None,
) -> Starlette:
    """An app that owns the engine: it starts with the app's lifespan and is closed at its end.

    `app.state.service` is the service, `app.state.in_progress` holds an entry for each HTTP request.

    Args:
        write_line: takes the lines of the access log; None: there is none.
    """
    service = Service(engine, served, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        app.state.is_closed = await asyncio.to_thread(service.close, max(1.0, min(10.0, settings.grace_s)))

    app = Starlette(
        routes=ROUTES,
        middleware=_middleware(service, settings, write_line),
        lifespan=lifespan,
        exception_handlers={
            ApiError: on_api_error,
            UsageError: on_usage_error,
            HTTPException: on_http_exception,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.in_progress = set()
    app.state.is_closed = False
    return app


def _middleware(service: Service, settings: Settings, write_line: Callable[[str], None] | None) -> list[Middleware]:
    """From the outside in. CORS comes before the keys, since browsers send none when they ask whether they may."""
    made = [Middleware(AccessLog, metrics=service.metrics, routes=_pattern, write=write_line)]
    if settings.cors_origins:
        made.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("Authorization", "Content-Type"),
                expose_headers=("Retry-After",),
            )
        )
    made.append(Middleware(Authentication, settings=settings))
    if settings.requests_per_minute is not None:
        made.append(Middleware(RateLimit, per_minute=settings.requests_per_minute))
    return made


def _pattern(scope: Scope) -> str:
    """The route's path with its parameters' names, so that metrics stay few."""
    routes: tuple[BaseRoute, ...] = ROUTES
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            return route.path
    return "other"
