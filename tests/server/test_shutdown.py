"""SIGTERM: no more requests are taken, what is in flight is answered or told, and the process exits with 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.server.scripted_engine import expected
from tests.server.sockets import send_request
from tests.server.test_requests import error_of

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.url = process.stdout.readline().strip()

    def complete(self, prompt: str = "x", **fields: object) -> httpx.Response:
        body = {"model": "scripted", "prompt": prompt, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)

    def wait_for(self, num_answers: int) -> None:
        """Until so many are in flight."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            stats = httpx.get(f"{self.url}/stats").json()
            if stats["running"] + stats["waiting"] >= num_answers:
                return
            time.sleep(0.01)
        raise AssertionError("they did not come")

    def end(self) -> None:
        """Send SIGTERM, and wait until the server knows."""
        self.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while httpx.get(f"{self.url}/ready").status_code == 200:
            assert time.monotonic() < until


@contextmanager
def process(step_s: float, grace_s: float, *more: str) -> Iterator[Process]:
    """Start one; it must exit with 0 by itself."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.server.serving_process", str(step_s), str(grace_s), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    try:
        yield Process(started)
        out, err = started.communicate(timeout=30)
        assert started.returncode == 0, err
        assert err == ""
        assert out.splitlines()[-1] == ("cut off" if more else "closed")
    finally:
        started.kill()
        started.communicate()


def test_what_is_in_flight_is_answered() -> None:
    with process(0.02, 20) as server, ThreadPoolExecutor(12) as pool:
        prompts = [f"p{number}" for number in range(12)]
        asked: list[Future[httpx.Response]] = [
            pool.submit(server.complete, prompt, max_tokens=60, stream=number % 2 == 1)
            for number, prompt in enumerate(prompts)
        ]
        server.wait_for(12)
        server.end()
        refused = server.complete()
        assert error_of(refused, 503)["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/health").status_code == 200
        for number, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            response = one.result(timeout=20)
            assert response.status_code == 200
            if number % 2:
                assert response.text.endswith("data: [DONE]\n\n")
            else:
                assert response.json()["choices"][0]["text"] == expected(prompt.encode(), 60)


def test_what_takes_longer_than_the_grace_is_told() -> None:
    with process(0.02, 0.5) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.complete, max_tokens=90_000)
        stream = pool.submit(server.complete, max_tokens=90_000, stream=True)
        deaf = send_request(
            server.url,
            "/v1/completions",
            {"model": "scripted", "prompt": "x", "max_tokens": 90_000, "stream": True},
            receive_buffer=4096,
        )
        server.wait_for(3)
        begin = time.monotonic()
        server.end()
        assert error_of(whole.result(timeout=10), 503)["code"] == "shutting_down"
        text = stream.result(timeout=10).text
        assert '"code":"shutting_down"' in text and "[DONE]" not in text
        server.process.wait(timeout=10)
        assert 0.5 <= time.monotonic() - begin < 9
        deaf.close()


def test_a_step_that_never_comes_back_does_not_keep_the_process() -> None:
    with process(0, 0.2, "stuck") as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete)
        server.wait_for(1)
        server.end()
        assert error_of(asked.result(timeout=10), 503)


def test_an_idle_server_ends_at_once_as_at_ctrl_c() -> None:
    with process(0, 20) as server, httpx.Client() as client:
        client.get(f"{server.url}/health")  # and stays connected
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.process.wait(timeout=10)
        assert time.monotonic() - begin < 5
