"""An engine that fails: whoever waits is told, whoever comes is told at once, and nothing hangs."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.server.conftest import MODEL, Start
from tests.server.test_requests import error_of

SECRET = "a prompt that nobody else may read"


@pytest.mark.parametrize("failure", [RuntimeError("boom"), MemoryError(), SystemExit(1)], ids=repr)
def test_a_crash(start: Start, caplog: pytest.LogCaptureFixture, failure: BaseException) -> None:
    server = start(engine={"users": 2})
    server.engine.may_step.clear()
    with ThreadPoolExecutor(5) as pool, caplog.at_level(logging.ERROR):
        waiting = [pool.submit(server.complete, SECRET, stream=stream) for stream in (False, True, False, False)]
        assert server.engine.is_stepping.wait(10)  # what comes from now on waits for the end of the step
        embedding = pool.submit(server.post, "/v1/embeddings", {"model": MODEL, "input": "x"})
        server.wait_until(lambda: server.in_flight == 5)
        server.engine.fails_with = failure
        server.engine.may_step.set()
        for one in [*waiting, embedding]:
            error = error_of(one.result(timeout=10), 500)
            assert (error["type"], error["code"]) == ("server_error", "engine_failed")
    health = server.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "failed", "reason": type(failure).__name__}
    assert server.get("/ready").status_code == 503
    begin = time.monotonic()
    for response in (server.complete(), server.chat(stream=True)):
        assert error_of(response, 503)["code"] == "engine_failed"
    assert error_of(server.post("/v1/embeddings", {"model": MODEL, "input": "x"}), 503)
    assert time.monotonic() - begin < 5
    assert "packlight_engine_up 0.0" in server.get("/metrics").text
    assert server.get("/stats").json()["is_accepting"] is False
    assert server.in_flight == 0
    assert "the engine failed" in caplog.text
    assert SECRET not in caplog.text


def test_a_crash_in_the_middle_of_a_stream_ends_it_with_an_error(start: Start) -> None:
    import openai

    server = start(engine={"step_s": 0.01, "context": 10_000})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=5000, stream=True)
        next(stream)
        server.engine.fails_with = RuntimeError("boom")
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)
