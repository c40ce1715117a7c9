"""`/v1/embeddings`, where the model was made for it."""

from __future__ import annotations

import asyncio
import base64
import struct

from starlette.requests import Request
from starlette.responses import Response

from packlight.server.answering import unless_disconnected
from packlight.server.completions import prompts
from packlight.server.loop import timed_out
from packlight.server.responses import Embedding, Embeddings, EmbeddingUsage
from packlight.server.service import service_of
from packlight.server.wire import EmbeddingRequest


async def embeddings(request: Request) -> Response:
    """Vectors of one text or several."""
    service = service_of(request)
    body = await service.read(request, EmbeddingRequest)
    inputs = await prompts(service, body.input, "input")
    try:
        async with asyncio.timeout(service.settings.timeout_s):
            vectors = await unless_disconnected(request.receive, service.loop.embed(inputs))
    except TimeoutError:
        raise timed_out() from None
    num_tokens = sum(map(len, inputs))
    document = Embeddings(
        data=[
            Embedding(index=index, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
            for index, vector in enumerate(vectors or [])
        ],
        model=service.served.name,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )
    return Response(document.model_dump_json(), media_type="application/json")


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
