"""How the server is: for orchestrators, for Prometheus and for the page."""

from __future__ import annotations

import time
from dataclasses import asdict

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from packlight.server.errors import ApiError
from packlight.server.evidence_page import evidence
from packlight.server.responses import Model, Models
from packlight.server.service import Service, service_of


async def models(request: Request) -> Response:
    """The one model."""
    service = service_of(request)
    return JSONResponse(Models(data=[_model(service)]).model_dump())


async def model(request: Request) -> Response:
    """The model by its name."""
    service = service_of(request)
    service.check_model(request.path_params["name"])
    return JSONResponse(_model(service).model_dump())


async def health(request: Request) -> Response:
    """Whether the engine works: 200, or 503 until the server is started again."""
    loop = service_of(request).loop
    if loop.failure is not None:
        return JSONResponse({"status": "failed", "reason": loop.failure}, 503)
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be taken now: 503 while the queue is full, the server ends, or the engine failed."""
    loop = service_of(request).loop
    if loop.is_accepting:
        return JSONResponse({"status": "ready"})
    reason = "engine failed" if loop.failure is not None else "shutting down" if loop.is_draining else "queue full"
    return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "1"})


async def metrics(request: Request) -> Response:
    """Prometheus's format."""
    return Response(service_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def stats(request: Request) -> Response:
    """The engine's numbers, and the server's."""
    service = service_of(request)
    numbers = asdict(service.engine.stats())
    return JSONResponse(
        {
            **numbers,
            "waiting": service.loop.waiting(),
            "tokens_per_second": round(service.loop.tokens_per_second(), 2),
            "max_queue": service.settings.max_queue,
            "context": service.engine.context,
            "uptime_s": round(time.time() - service.started_at, 1),
            "is_accepting": service.loop.is_accepting,
        }
    )


async def evidence_rows(request: Request) -> Response:
    """What was compressed and what it cost."""
    service = service_of(request)
    return JSONResponse(await service.in_thread(evidence, service.served))


async def missing(request: Request) -> Response:
    """Any other path."""
    raise ApiError(404, f"there is no {request.method} {request.url.path}")


def _model(service: Service) -> Model:
    return Model(id=service.served.name, created=int(service.started_at))
