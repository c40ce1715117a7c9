"""Who may ask."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from tests.server.conftest import MODEL, Start
from tests.server.test_requests import error_of

from packlight.errors import UsageError
from packlight.server.auth import is_loopback, read_keys

KEYS = ("first-key", "second-key")
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_right_wrong_and_missing_keys(start: Start) -> None:
    server = start(keys=KEYS)
    for key in KEYS:
        assert server.post("/v1/completions", BODY, headers=bearer(key)).status_code == 200
    for headers in (
        {},
        {"Authorization": "first-key"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "Bearer"},
    ):
        response = server.post("/v1/completions", BODY, headers=headers)
        assert error_of(response, 401)["code"] == "missing_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("first", "first-key2", "FIRST-KEY", "first-key,second-key", "é"):
        headers = {b"Authorization": f"Bearer {key}".encode()}
        assert error_of(server.post("/v1/completions", BODY, headers=headers), 401)["code"] == "invalid_api_key"


def test_what_is_open_and_what_is_not(start: Start) -> None:
    server = start(keys=KEYS)
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 200
    for path in ("/", "/page/none.js"):
        assert server.get(path).status_code in (200, 404)
    for path in ("/v1/models", "/metrics", "/stats", "/evidence", "/nothing", "//health", "/page"):
        assert server.get(path).status_code == 401, path
        assert server.get(path, headers=bearer(KEYS[0])).status_code in (200, 404)


def test_a_thousand_wrong_keys(start: Start) -> None:
    server = start(keys=KEYS, requests_per_minute=60)
    begin = time.monotonic()
    with httpx.Client() as client:
        for attempt in range(1000):
            url = f"{server.url}/v1/models"
            assert client.get(url, headers=bearer(f"wrong-{attempt}")).status_code == 401
    assert time.monotonic() - begin < 30
    assert server.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200
    assert all('"status": 401' in line for line in server.lines[:1000])
    assert not any("wrong-" in line for line in server.lines)


def test_keys_are_no_part_of_the_log(start: Start) -> None:
    server = start(keys=KEYS)
    server.get("/v1/models", headers=bearer(KEYS[0]))
    server.wait_until(lambda: bool(server.lines))
    assert KEYS[0] not in server.lines[0]
    assert '"key": "anonymous"' not in server.lines[0]


def test_other_hosts_are_refused_where_there_are_no_keys(start: Start) -> None:
    server = start()
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:80", ""):
        assert server.get("/v1/models", headers={"Host": host}).status_code in (400, 403)
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "sub.localhost"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 200
    assert start(is_host_checked=False).get("/v1/models", headers={"Host": "a.example"}).status_code == 200
    with_keys = start(keys=KEYS)
    assert with_keys.get("/v1/models", headers={"Host": "a.example", **bearer(KEYS[0])}).status_code == 200


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two  \n")
    assert read_keys(path, {}) == ("one", "two")
    assert read_keys(None, {"PACKLIGHT_API_KEYS": " a b\nc "}) == ("a", "b", "c")
    assert read_keys(None, {}) == ()
    for content in (b"", b"# nothing\n", b"two words\n", "schlüssel\n".encode(), b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError):
            read_keys(path, {})
    with pytest.raises(UsageError, match="No such file"):
        read_keys(tmp_path / "none", {})


def test_loopback() -> None:
    for name in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LOCALHOST", "a.localhost"):
        assert is_loopback(name), name
    for name in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"):
        assert not is_loopback(name), name
