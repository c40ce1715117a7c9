"""What is wrong with a request is said in OpenAI's shape, and is never the server's fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.server.conftest import MODEL, Running, Start, running
from tests.server.scripted_engine import ScriptedEngine, byte_tokenizer

from packlight.server.settings import Settings

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/embeddings": {"model": MODEL, "input": "hi"}}
JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    document = response.json()
    assert document.keys() == {"error"}
    assert document["error"].keys() == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    error: dict[str, Any] = document["error"]
    return error


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": "\xc3"}', b'{"model": "\\ud800"}', b"[" * 10_000],
    ids=["empty", "torn", "list", "null", "string", "bytes", "torn character", "surrogate", "deep"],
)
def test_bodies_that_are_no_json_object(server: Running, path: str, body: bytes) -> None:
    error_of(httpx.post(server.url + path, content=body, headers=JSON, verify=False))


@pytest.mark.parametrize("path", ROUTES)
def test_other_types_of_body(server: Running, path: str) -> None:
    for headers in ({}, {"Content-Type": "text/plain"}):
        content = json.dumps(ROUTES[path]).encode()
        assert error_of(httpx.post(server.url + path, content=content, headers=headers, verify=False), 415)["code"]


@pytest.mark.parametrize("path", ROUTES)
def test_unknown_and_missing_fields(server: Running, path: str) -> None:
    error = error_of(server.post(path, ROUTES[path] | {"colour": "red"}))
    assert (error["param"], error["code"]) == ("colour", "unknown_parameter")
    for field in ROUTES[path].keys() - {"max_tokens"}:
        error = error_of(server.post(path, {key: value for key, value in ROUTES[path].items() if key != field}))
        assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("n", 0),
        ("n", 17),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", 5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("logit_bias", {"5": 1}),
        ("user", 5),
    ],
)
def test_values_that_no_answer_can_have(server: Running, field: str, value: Any) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = error_of(server.post(path, body | {field: value}))
        assert error["type"] == "invalid_request_error"
        named = str(error["param"] or error["message"]).replace(" ", "_")
        assert field.removesuffix("_options") in named


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server: Running, number: str) -> None:
    body = json.dumps(TEXT)[:-1] + f', "temperature": {number}}}'
    error_of(httpx.post(server.url + "/v1/completions", content=body, headers=JSON))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("service_tier", "flex"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("parallel_tool_calls", True),
    ],
)
def test_known_fields_that_are_not_supported_are_never_ignored(server: Running, field: str, value: Any) -> None:
    error = error_of(server.post("/v1/chat/completions", CHAT | {field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": [], "logit_bias": {}, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "store": False, "service_tier": "auto", "n": 1},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "seed": 1, "stop": None, "stream": False},
        dict.fromkeys(["tools", "audio", "stop", "n", "seed", "temperature", "top_p", "logprobs", "response_format"]),
        {"response_format": {"type": "text"}, "logprobs": False},
    ],
)
def test_fields_that_ask_for_nothing_pass(server: Running, fields: dict[str, Any]) -> None:
    assert server.post("/v1/chat/completions", CHAT | fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_chats_that_cannot_be(server: Running, fields: dict[str, Any], param: str) -> None:
    assert error_of(server.post("/v1/chat/completions", CHAT | fields))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, 256]}, "prompt"),
    ],
)
def test_completions_that_cannot_be(server: Running, fields: dict[str, Any], param: str) -> None:
    assert error_of(server.post("/v1/completions", TEXT | fields))["param"] == param


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [1.5], [[1], "a"], [["a"]], {}, 5, ["a"] * 65, [2**40], None])
def test_prompts_of_no_known_kind(server: Running, prompt: Any) -> None:
    assert error_of(server.post("/v1/completions", TEXT | {"prompt": prompt}))["param"].startswith("prompt")


def test_more_than_the_context(server: Running) -> None:
    for fields in ({"prompt": "x" * 512}, {"prompt": "x" * 500, "max_tokens": 13}):
        error = error_of(server.post("/v1/completions", TEXT | fields))
        assert error["code"] == "context_length_exceeded"
        assert "512" in error["message"] and "513" in error["message"]
    whole = server.complete("x" * 500, max_tokens=12).json()
    assert whole["usage"]["total_tokens"] == 512
    free = server.chat("x").json()
    assert free["usage"]["total_tokens"] == 512 and free["choices"][0]["finish_reason"] == "length"


def test_a_huge_body(server: Running) -> None:
    huge = TEXT | {"prompt": "x" * (1 << 17)}
    assert error_of(server.post("/v1/completions", huge), 413)["code"] == "request_too_large"

    def pieces() -> Any:
        yield from (b"x" * 1024 for _ in range(128))

    error_of(httpx.post(server.url + "/v1/completions", content=pieces(), headers=JSON), 413)


def test_unknown_paths_and_methods(server: Running) -> None:
    error_of(server.get("/v1/engines"), 404)
    error_of(server.post("/v1/models/", {}), 405)
    response = server.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(httpx.delete(server.url + "/v1/models"), 405)


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    with running(ScriptedEngine(byte_tokenizer(tmp_path, chat_template=None)), Settings()) as server:
        assert "/v1/completions" in error_of(server.chat("x"))["message"]
        assert server.complete("x").status_code == 200


def test_more_answers_than_the_queue_holds(start: Start) -> None:
    error = error_of(start(max_queue=3).complete(["a", "b"], n=2))
    assert "4 answers" in error["message"] and "3" in error["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "input", "n", "stop", "stream", "stream_options", "seed", "logprobs", "echo"),
        *("top_logprobs", "temperature", "top_p", "top_k", "tools", "response_format", "max_tokens", "logit_bias"),
        *("max_completion_tokens", "encoding_format", "dimensions", "user"),
    ]
)


@pytest.fixture(scope="module")
def connection() -> Iterator[httpx.Client]:
    """One for many requests."""
    with httpx.Client(timeout=30) as client:
        yield client


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(ROUTES)), changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_whatever_is_sent_the_server_makes_no_mistake(
    server: Running, connection: httpx.Client, path: str, changes: dict[str, Any]
) -> None:
    body = json.dumps(ROUTES[path] | changes).encode()
    response = connection.post(server.url + path, content=body, headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([*ROUTES, "/v1/models/x", "/", "/page/x", "/stats", "/%ff", "/page/..%2f..%2fapp.py"]),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"]),
    body=st.binary(max_size=64),
)
def test_whatever_bytes_are_sent_the_server_makes_no_mistake(
    server: Running, connection: httpx.Client, path: str, method: str, body: bytes
) -> None:
    response = connection.request(method, server.url + path, content=body, headers=JSON)
    assert response.status_code < 500, response.text
