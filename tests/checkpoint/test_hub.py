"""Hub repositories come through huggingface_hub, and its failures become one sentence. The hub is a local stand-in."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from safetensors.torch import save
from torch import ones

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
COMMIT = "a" * 40
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 32}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "tie_word_embeddings": True}
WEIGHTS = save({"model.embed_tokens.weight": ones(32, 64)})
REPOSITORIES = {
    "org/whole": {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"PK\x03\x04",
        "modeling_x.py": b"boom",
        "onnx/model.safetensors": WEIGHTS,
    },
    "org/pickled": {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"PK\x03\x04"},
    "org/other": {"README.md": b"#", "x.json": b"{}"},
}


class Hub(BaseHTTPRequestHandler):
    """`/api/models/ORG/NAME[/revision|/tree]` and `/ORG/NAME/resolve/REVISION/FILE`."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name == "org/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name == "org/broken":
            self.answer(503, b"{}", {})
        elif name not in REPOSITORIES:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            self.answer(200, json.dumps(self.describe(name, parts)).encode(), {"Content-Type": "application/json"})
        else:
            self.send(REPOSITORIES[name]["/".join(parts[4:])])

    def describe(self, name: str, parts: list[str]) -> object:
        files = REPOSITORIES[name]
        if "tree" in parts:
            return [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
        siblings = [{"rfilename": file} for file in files]
        return {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def send(self, data: bytes) -> None:
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import sys
from packlight.checkpoint.open import open_checkpoint, read_spec
from packlight.errors import CheckpointError
try:
    if sys.argv[1] == "open":
        found = open_checkpoint(sys.argv[2])
        print(*sorted(path.name for path in found.path.iterdir()), found.spec.num_params)
    else:
        print(read_spec(sys.argv[2]).num_params, "torch" in sys.modules)
except CheckpointError as error:
    print("ERROR", error)
"""


def packlight(home: Path, endpoint: str, *arguments: str, **extra: str) -> str:
    """The settings are read when huggingface_hub is imported, so each case is a process of its own."""
    names = ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy")
    kept = {key: value for key, value in os.environ.items() if key not in names and key.lower() not in names}
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | hub | extra, check=False, timeout=60)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_a_repository_is_fetched_without_pickles_or_code_and_read_offline(tmp_path: Path, endpoint: str) -> None:
    whole = "config.json model.safetensors 2048"
    assert packlight(tmp_path, endpoint, "open", "org/whole") == whole
    assert packlight(tmp_path, "http://127.0.0.1:9", "open", "org/whole", HF_HUB_OFFLINE="1") == whole
    assert packlight(tmp_path, "http://127.0.0.1:9", "open", "org/whole") == whole


def test_a_spec_needs_only_the_config(tmp_path: Path, endpoint: str) -> None:
    Hub.asked.clear()
    params, has_torch = packlight(tmp_path, endpoint, "spec", "org/whole").split()
    assert int(params) > 2048 and has_torch == "False"
    assert not any("resolve" in path and path.endswith("safetensors") for path in Hub.asked)


@pytest.mark.parametrize(
    ("name", "extra", "sentence"),
    [
        ("org/absent", {}, "the hub has no repository org/absent that you may read"),
        ("org/gated", {}, "the hub repository org/gated is gated"),
        ("org/pickled", {}, "org/pickled has no safetensors weights: pickled weights are refused"),
        ("org/other", {}, "org/other has no config.json"),
        ("org/whole", {"HF_HUB_OFFLINE": "1"}, "org/whole is not in the local hub cache and HF_HUB_OFFLINE is set"),
        ("org/whole", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub is out of reach"),
        ("org--x/a..b", {}, "is not the name of a hub repository"),
    ],
)
def test_failures_are_one_sentence(
    tmp_path: Path, endpoint: str, name: str, extra: dict[str, str], sentence: str
) -> None:
    answer = packlight(tmp_path, endpoint, "open", name, **extra)
    assert answer.startswith("ERROR") and sentence in answer and "\n" not in answer
