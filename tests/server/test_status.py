"""How the server says how it is, what it logs, and whom browsers let ask."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import MODEL, Running, Start

from packlight.evidence import LEDGER_NAME, Measurement, append
from packlight.server import page_files


def numbers(server: Running) -> dict[str, float]:
    """Samples without labels, and those with, as Prometheus reads them."""
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True) * bool(sample.labels): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
    }


def test_metrics(start: Start) -> None:
    server = start()
    for _ in range(3):
        server.complete("hello", max_tokens=4)
    server.complete("hello", max_tokens=0)
    server.get("/v1/models/a")
    server.get("/v1/models/b")
    server.get("/" + "x" * 50)
    found = numbers(server)
    assert found['packlight_requests_total{"route": "/v1/completions", "status": "200"}'] == 3
    assert found['packlight_requests_total{"route": "/v1/completions", "status": "400"}'] == 1
    assert found['packlight_requests_total{"route": "/v1/models/{name:path}", "status": "404"}'] == 2
    assert found['packlight_requests_total{"route": "other", "status": "404"}'] == 1
    assert found["packlight_generated_tokens_total"] == 12
    assert found["packlight_prompt_tokens_total"] == 15
    assert found["packlight_reused_tokens_total"] == 8
    assert found["packlight_time_to_first_token_seconds_count"] == 3
    assert found["packlight_time_per_token_seconds_count"] == 3
    assert found["packlight_batch_size_count"] == 12
    assert found["packlight_queue_depth"] == 0
    assert found["packlight_kv_capacity_tokens"] == 4 * 512
    assert found["packlight_tokens_per_second"] > 0
    assert found["packlight_engine_up"] == 1


def test_stats_while_something_runs(start: Start) -> None:
    server = start(engine={"users": 1})
    server.engine.may_step.clear()
    pending = [httpx.Client(timeout=30) for _ in range(3)]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 4}
        asked = [pool.submit(one.post, f"{server.url}/v1/completions", json=body) for one in pending]
        server.wait_until(lambda: server.in_flight == 3)
        stats = server.get("/stats").json()
        assert stats["waiting"] + stats["running"] == 3
        server.engine.may_step.set()
        assert {one.result().status_code for one in asked} == {200}
    for one in pending:
        one.close()
    after = server.get("/stats").json()
    assert (after["running"], after["waiting"], after["kv_tokens"]) == (0, 0, 0)
    assert after["generated_tokens"] == 12 and after["tokens_per_second"] == pytest.approx(12 / 5)
    assert after["context"] == 512 and after["is_accepting"] is True


def test_evidence(start: Start, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps:\n- rtn:\n    bits: 4\n")
    rows = [Measurement("perplexity", 12.5, "1", "whole", predicted=12), Measurement("kl", float("inf"), "nats", "w")]
    append(tmp_path / LEDGER_NAME, rows)
    found = start(directory=tmp_path).get("/evidence").json()
    assert found["model"] == MODEL
    assert found["recipe"] == {"steps": [{"rtn": {"bits": 4}}]}
    assert found["rows"][0] == {"name": "perplexity", "value": 12.5, "unit": "1", "subject": "whole", "predicted": 12}
    assert found["rows"][1]["value"] == "inf"
    assert start(directory=tmp_path / "none").get("/evidence").json() == {"model": MODEL, "recipe": None, "rows": []}


def test_the_page(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "page.js").write_text("'use strict';")
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(page_files, "files", lambda package: tmp_path)
    server = start(keys=("key",))
    found = server.get("/")
    assert found.status_code == 200 and "<title>page" in found.text
    assert found.headers["content-type"].startswith("text/html")
    policy = found.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    script = server.get("/page/page.js")
    assert script.text == "'use strict';" and "javascript" in script.headers["content-type"]
    for path in ("/page/none.js", "/page/..%2fsecret.txt", "/page/%2e%2e/secret.txt", "/page/"):
        response = httpx.get(httpx.URL(server.url + path))
        assert response.status_code in (401, 404) and "secret\n" not in response.text


def test_the_log_has_a_line_of_json_per_request_and_no_prompt(start: Start) -> None:
    server = start()
    server.chat("my secret words", max_tokens=3)
    server.complete("my secret words", stop="another secret")
    server.complete("my secret words", tools=[])
    server.complete("my secret words", max_tokens=3, stream=True)
    server.get("/v1/models?my=secret")
    server.wait_until(lambda: len(server.lines) == 5)
    lines = [json.loads(line) for line in server.lines]
    assert "secret" not in "".join(server.lines)
    assert [line["status"] for line in lines] == [200, 200, 400, 200, 200]
    assert lines[0]["path"] == "/v1/chat/completions" and lines[0]["method"] == "POST"
    assert (lines[3]["prompt_tokens"], lines[3]["completion_tokens"]) == (15, 3)
    assert all(line["seconds"] >= 0 and "is_cut" not in line for line in lines)


def test_browsers_of_other_origins_are_not_let_in_by_default(server: Running) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{server.url}/v1/chat/completions", headers=ask)
    assert preflight.status_code == 405
    for response in (preflight, server.get("/v1/models", headers=ask)):
        assert not any(name.startswith("access-control") for name in response.headers)


def test_browsers_of_a_named_origin_are_let_in(start: Start) -> None:
    server = start(keys=("key",), cors_origins=("https://a.example",))
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{server.url}/v1/chat/completions"
    allowed = httpx.options(url, headers=ask | {"Origin": "https://a.example"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "Authorization" in allowed.headers["access-control-allow-headers"]
    refused = server.get("/v1/models", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(url, headers=ask | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_head_and_keep_alive(server: Running) -> None:
    with httpx.Client() as client:
        assert client.head(f"{server.url}/health").status_code == 200
        assert client.get(f"{server.url}/health").json() == {"status": "ok"}


def test_every_file_that_the_real_page_names_is_served(server: Running) -> None:
    found = server.get("/").text
    named = re.findall(r'(?:href|src)="(/[^"]+)"', found)
    assert named
    for name in named:
        file = server.get(name)
        assert file.status_code == 200, name
        named += [more for more in re.findall(r'from "(/page/[^"]+)"', file.text) if more not in named]
    assert len(named) > 5
