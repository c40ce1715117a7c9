"""The queue, the rate and the deadline: who comes too often or too late is told when to come again."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.server.conftest import MODEL, Running, Start
from tests.server.scripted_engine import expected
from tests.server.test_requests import error_of

from packlight.errors import UsageError
from packlight.server.limits import TokenBucket
from packlight.server.settings import Settings


def test_the_bucket() -> None:
    now = 0.0
    bucket = TokenBucket(3, lambda: now)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 20]
    now = 15.0
    assert bucket.take() == 5
    now = 20.0
    assert bucket.take() == 0
    now = 1e6
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 20]
    assert TokenBucket(0.5, lambda: 0.0).take() == 0


def test_the_rate_of_each_key(start: Start) -> None:
    server = start(keys=("a", "b"), requests_per_minute=2)
    ask = {key: {"Authorization": f"Bearer {key}"} for key in "ab"}
    assert [server.get("/v1/models", headers=ask["a"]).status_code for _ in range(3)] == [200, 200, 429]
    refused = server.get("/v1/models", headers=ask["a"])
    assert error_of(refused, 429)["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert server.get("/v1/models", headers=ask["b"]).status_code == 200
    assert server.get("/health").status_code == 200
    assert server.get("/stats", headers=ask["a"]).status_code == 200


def test_a_full_queue(start: Start) -> None:
    server = start(engine={"users": 1}, max_queue=2)
    server.engine.may_step.clear()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.complete, letter, max_tokens=3) for letter in "ab"]
        server.wait_until(lambda: server.in_flight == 2)
        refused = server.complete("c")
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        assert error_of(server.post("/v1/embeddings", {"model": MODEL, "input": "x"}), 429)
        server.engine.may_step.set()
        texts = [one.result().json()["choices"][0]["text"] for one in asked]
    assert texts == [expected(b"a", 3), expected(b"b", 3)]
    assert server.get("/ready").status_code == 200


def test_overload(start: Start) -> None:
    """Ten times what the queue holds at once: each is answered rightly or told to come again, and nothing is left."""
    server = start(engine={"users": 4, "step_s": 0.001}, max_queue=8)

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, int, str]:
        body = {"model": MODEL, "prompt": f"{number}", "max_tokens": 10, "temperature": 0}
        response = await client.post(f"{server.url}/v1/completions", json=body)
        text = response.json()["choices"][0]["text"] if response.status_code == 200 else ""
        return number, response.status_code, text

    async def ask_all() -> list[tuple[int, int, str]]:
        limits = httpx.Limits(max_connections=120)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(120)))

    answers = asyncio.run(ask_all())
    assert {status for _, status, _ in answers} == {200, 429}
    for number, status, text in answers:
        assert text == (expected(str(number).encode(), 10) if status == 200 else "")
    assert server.in_flight == 0 and server.engine.is_idle


def test_a_deadline_ends_an_answer_as_it_is(start: Start) -> None:
    server = start(engine={"step_s": 0.02, "context": 10_000}, timeout_s=0.4)
    choice = server.complete(max_tokens=5000).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert 2 < len(choice["text"]) < 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token(start: Start, stream: bool) -> None:
    server = start(engine={"step_s": 0.02, "users": 1, "context": 10_000}, timeout_s=0.4)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.complete, max_tokens=5000)
        server.wait_until(lambda: server.engine.stats().running == 1)
        server.engine.users = 0
        assert error_of(server.complete(stream=stream), 504)["code"] == "timeout"


def test_a_step_that_does_not_come_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.server.loop.LATE_S", 0.1)
    server = start(timeout_s=0.2)
    server.engine.may_step.clear()
    begin = time.monotonic()
    assert error_of(server.complete(), 504)
    assert time.monotonic() - begin < 5
    assert server.in_flight == 0
    server.engine.may_step.set()
    server.wait_until(lambda: server.engine.is_idle)
    assert len(server.engine.cancelled) == 1


def test_a_body_that_does_not_come(start: Start) -> None:
    from tests.server.sockets import read_all, send_request

    server = start(timeout_s=0.3)
    connection = send_request(server.url, "/v1/completions", {})
    read_all(connection)
    connection.close()
    slow = send_request(server.url, "/health", {})
    read_all(slow)
    slow.close()
    host = server.url.removeprefix("http://")
    torn = send_request(server.url, "/v1/completions", {})
    torn.close()
    import socket

    with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=10) as lazy:
        lazy.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Connection: close\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in lazy.recv(100)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_queue": 0},
        {"max_body_bytes": 10},
        {"max_tokens": 0},
        {"requests_per_minute": 0.0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"grace_s": -1.0},
        {"cors_origins": ("example.org",)},
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--"):
        Settings(**fields)  # type: ignore[arg-type]


def test_a_running_server_is_ready(server: Running) -> None:
    assert server.get("/ready").json() == {"status": "ready"}
