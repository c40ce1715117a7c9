"""A client that goes away frees what it held; one that does not read holds nobody up."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from tests.server.conftest import MODEL, Running, Start
from tests.server.scripted_engine import expected
from tests.server.sockets import read_all, send_request

SLOW = {"step_s": 0.01, "context": 100_000}


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 50_000, **fields}


def assert_freed(server: Running, num_answers: int = 1) -> None:
    server.wait_until(lambda: server.engine.is_idle and server.in_flight == 0)
    server.wait_until(lambda: len(server.lines) == 1)
    server.wait_until(lambda: len(server.engine.cancelled) == num_answers)
    generated = server.engine.stats().generated_tokens
    time.sleep(0.05)
    assert server.engine.stats().generated_tokens == generated
    assert server.complete(max_tokens=2).status_code == 200


def test_in_the_middle_of_a_stream(start: Start) -> None:
    server = start(engine=SLOW)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body_of(stream=True, n=2), timeout=30) as response:
        lines = response.iter_lines()  # kept, since the connection goes with it
        assert next(lines).startswith("data: ")
        assert server.in_flight == 2
    assert_freed(server, num_answers=2)
    assert '"status": 200' in server.lines[0] and '"is_cut": true' in server.lines[0]


def test_before_a_whole_answer(start: Start) -> None:
    server = start(engine=SLOW)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body_of(), timeout=0.3)
    assert_freed(server)
    assert '"status": 499' in server.lines[0]


def test_while_it_waits_in_the_queue(start: Start) -> None:
    server = start(engine={**SLOW, "users": 1})
    first = send_request(server.url, "/v1/completions", body_of(stream=True))
    server.wait_until(lambda: server.engine.stats().running == 1)
    second = send_request(server.url, "/v1/completions", body_of(stream=True))
    server.wait_until(lambda: server.in_flight == 2)
    second.close()
    server.wait_until(lambda: server.in_flight == 1)
    assert server.engine.stats().running == 1
    first.close()
    server.wait_until(lambda: server.in_flight == 0)
    server.wait_until(lambda: len(server.engine.cancelled) == 2)


def test_a_client_that_closes_for_writing_only(start: Start) -> None:
    """uvicorn takes a half-closed connection for one that is gone: nothing may be left behind."""
    server = start(engine=SLOW)
    connection = send_request(server.url, "/v1/completions", body_of(stream=True))
    connection.recv(100)
    connection.shutdown(1)
    server.wait_until(lambda: server.in_flight == 0)
    connection.close()


def test_before_its_body_is_sent(server: Running) -> None:
    connection = send_request(server.url, "/v1/completions", body_of())
    connection.close()
    torn = send_request(server.url, "/v1/completions", {})
    torn.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    torn.close()
    server.wait_until(lambda: server.in_flight == 0 and not server.app.state.in_progress)
    assert server.get("/health").status_code == 200


def test_a_slow_reader_holds_nobody_up_and_gets_its_answer(start: Start) -> None:
    server = start(engine={"context": 100_000})
    num_tokens = 20_000
    slow = send_request(server.url, "/v1/completions", body_of(stream=True, max_tokens=num_tokens), receive_buffer=4096)
    server.wait_until(lambda: server.engine.stats().running == 1)
    start_s = time.monotonic()
    assert server.complete(max_tokens=20).status_code == 200
    assert time.monotonic() - start_s < 5
    server.wait_until(lambda: server.in_flight == 0, 30)  # the engine is done, though hardly anything was read
    assert server.app.state.in_progress
    data = read_all(slow).decode()
    slow.close()
    texts = [part.split('"', 1)[0] for part in data.split('"text":"')[1:]]
    assert "".join(texts) == expected(b"x", num_tokens)
    assert "[DONE]" in data


def test_a_reader_that_never_reads_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.server.answering.STALL_S", 0.2)
    server = start(engine={"context": 100_000}, timeout_s=1.0)
    deaf = send_request(server.url, "/v1/completions", body_of(stream=True, max_tokens=90_000), receive_buffer=4096)
    server.wait_until(lambda: len(server.app.state.in_progress) == 1)
    server.wait_until(lambda: not server.app.state.in_progress and server.in_flight == 0)
    deaf.close()
