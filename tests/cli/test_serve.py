"""`packlight serve` as a user starts it: what is wrong is said before anything is loaded, and a model is served."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.cli.driver import assert_one_sentence, call, run

from packlight.server.auth import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "nowhere.invalid"], "--host"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--port", "70000"], "port"),
        (["--api-key-file", "none"], "none"),
        (["--max-body", "big"], "big"),
        (["--kv-memory", "much"], "much"),
        (["--rate-limit", "0"], "--rate-limit"),
        (["--timeout", "-1"], "--timeout"),
        (["--grace", "-1"], "--grace"),
        (["--cors-origin", "example.org"], "--cors-origin"),
        (["--access-log", "none/log"], "none/log"),
        (["--engine", "steam"], "steam"),
        (["--max-queue", "0"], "max-queue"),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "",
)
def test_a_wrong_flag_is_one_sentence(tiny: Path, flags: list[str], says: str) -> None:
    port = [] if "--port" in flags else ["--port", "0"]
    assert_one_sentence(call("serve", tiny, *port, *flags), says=says)


def test_a_port_in_use_is_one_sentence(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_sentence(call("serve", tiny, "--port", port), says=f"port {port}")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert_one_sentence(call("serve", tmp_path / "none", "--port", 0), says="none")


def test_a_model_is_served(tiny: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key\n")
    log = tmp_path / "log"
    flags = ["--context", 64, "--users", 2, "--threads", 1, "--api-key-file", keys, "--access-log", log]
    with serving(tiny, *flags) as url, httpx.Client(timeout=60) as client:
        assert client.get(f"{url}/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer secret-key"
        name = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        assert name == "tiny"
        body = {"model": name, "prompt": "The quick brown", "max_tokens": 8, "temperature": 0}
        answer = client.post(f"{url}/v1/completions", json=body).json()
        generated = run("generate", tiny, "--raw", "--prompt", "The quick brown", "--max-tokens", 8, "--json")
        assert answer["choices"][0]["text"] == json.loads(generated.out)["text"]
        assert client.post(f"{url}/v1/completions", json=body | {"max_tokens": 64}).status_code == 400
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [401, 200, 200, 400]


@contextmanager
def serving(model: Path, *flags: object) -> Iterator[str]:
    """The command in a process of its own; its address, from the line that says it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "packlight", "serve", str(model), "--port", "0", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("packlight: serving tiny with torch at http://127.0.0.1:"), line + process.stderr.read()
        assert "context 64 tokens, KV cache of 128 tokens" in line
        yield line.split(" at ")[1].split(",")[0]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()
