"""Clients of a server, in a process of their own: each asks, reads its stream to the end, and asks again.

    echo JOB | python benchmarks/peers/load.py

A job is JSON: `url`, `body` (fields of every request), `prompts`, `clients`, and `seconds` or null. Without seconds
each prompt is asked once; with them the clients go round the prompts until the time is up, and one that is refused asks
again after a moment. The last line of stdout is a JSON list, one object for each request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

REQUEST_S = 1800.0
PAUSE_S = 0.2
"""After a refusal: what `Retry-After` asks for would leave the server without the load that it is to bear."""


@dataclass
class Outcome:
    """One request. Times are seconds of one clock; `first` and `last` of a piece with text."""

    prompt: int
    status: int = 0
    start: float = 0.0
    first: float | None = None
    last: float | None = None
    end: float = 0.0
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    retry_after: str | None = None


async def load(job: dict[str, Any]) -> list[Outcome]:
    """What came of every request."""
    outcomes: list[Outcome] = []
    until = None if job["seconds"] is None else time.perf_counter() + job["seconds"]
    numbers: Iterator[int] = iter(range(len(job["prompts"])))
    if until is not None:
        numbers = itertools.cycle(numbers)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # some servers close them unasked
    async with httpx.AsyncClient(base_url=job["url"], timeout=REQUEST_S, limits=limits, trust_env=False) as client:

        async def keep_asking() -> None:
            for number in numbers:
                if until is not None and time.perf_counter() > until:
                    return
                outcome = Outcome(number)
                await ask(client, job, outcome)
                outcomes.append(outcome)
                if outcome.status in (429, 503):
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(keep_asking() for _ in range(job["clients"])))
    return outcomes


async def ask(client: httpx.AsyncClient, job: dict[str, Any], outcome: Outcome) -> None:
    """One request to its end; what goes wrong is written down."""
    body = {**job["body"], "prompt": job["prompts"][outcome.prompt], "stream": True}
    outcome.start = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            outcome.status = response.status_code
            outcome.retry_after = response.headers.get("retry-after")
            if response.status_code == 200:
                await _read(_events(response), outcome)
            else:
                outcome.error = (await response.aread()).decode(errors="replace")[:200]
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.end = time.perf_counter()


async def _read(events: AsyncIterator[bytes], outcome: Outcome) -> None:
    async for event in events:
        piece = json.loads(event)
        if "error" in piece:
            outcome.error = str(piece["error"])[:200]
            continue
        for choice in piece.get("choices", ()):
            outcome.finish = choice.get("finish_reason") or outcome.finish
            if choice.get("text"):
                outcome.last = time.perf_counter()
                outcome.first = outcome.first or outcome.last
                outcome.text += choice["text"]
        if piece.get("usage"):
            outcome.tokens = piece["usage"]["completion_tokens"]
            outcome.prompt_tokens = piece["usage"]["prompt_tokens"]


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each."""
    rest = b""
    async for part in response.aiter_raw():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield line[6:]


def main() -> None:
    outcomes = asyncio.run(load(json.load(sys.stdin)))
    print(json.dumps([asdict(outcome) for outcome in outcomes]))


if __name__ == "__main__":
    main()
