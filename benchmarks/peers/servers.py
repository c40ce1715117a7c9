"""The servers of `benchmarks/serving.py`: how each is started, asked and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S, END_S = 300.0, 60.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Options:
    """What all servers are started with."""

    model: str
    directory: Path
    gguf: Path | None
    packed: Path | None
    context: int
    users: int
    max_queue: int
    threads: int
    transformers_python: str


@dataclass(frozen=True)
class Server:
    """How one is started and asked.

    Args:
        command: without the port, which stands behind `--port`.
        model: its name in requests.
        ready: answers 200 once requests can be served.
        body: fields that it alone wants in a request.
    """

    name: str
    command: tuple[str, ...]
    model: str
    ready: str
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    server: Server
    url: str
    pid: int

    def rss_bytes(self) -> int:
        """Resident memory of the process and those that it started."""
        return sum(_rss_bytes(pid) for pid in _family(self.pid))


def servers(options: Options) -> dict[str, Server]:
    """Those that the options allow, by name."""
    made = [_packlight("packlight", options.model, "torch", options)]
    if options.packed is not None:
        made.append(_packlight("packlight packed", str(options.packed), "torch", options))
    made += [_transformers("transformers", options), _transformers("transformers CB", options, *_batching(options))]
    if options.gguf is not None:
        made += [_packlight("packlight llama.cpp", str(options.gguf), "llamacpp", options), _llamacpp(options)]
    return {server.name: server for server in made}


@contextmanager
def running(server: Server, threads: int) -> Iterator[Running]:
    """A server from its start to its end.

    Raises:
        RuntimeError: it did not come up; with the end of what it said.
    """
    port = _free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*server.command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(lambda: _is_ready(url + server.ready), process, log, server.name)
            yield Running(server, url, process.pid)
        finally:
            _end(process)


def _packlight(name: str, model: str, engine: str, options: Options) -> Server:
    limits = ("--context", str(options.context), "--users", str(options.users), "--max-queue", str(options.max_queue))
    rest = ("--threads", str(options.threads), "--name", "bench", "--access-log", os.devnull)
    command = (sys.executable, "-m", "packlight", "serve", model, "--engine", engine, *limits, *rest)
    return Server(name, command, "bench", "/ready", {"stream_options": {"include_usage": True}})


def _transformers(name: str, options: Options, *more: str) -> Server:
    start = "from transformers.cli.transformers import main; main()"
    model = str(options.directory)
    command = (options.transformers_python, "-c", start, "serve", model, "--device", "cpu", *more)
    return Server(name, command, model, "/health")


def _batching(options: Options) -> Sequence[str]:
    """Its KV cache is as large as the others': left to itself it takes most of the memory that is free."""
    block = 32
    blocks = options.users * options.context // block
    return "--continuous-batching", "--cb-block-size", str(block), "--cb-num-blocks", str(blocks)


def _llamacpp(options: Options) -> Server:
    program = Path(__file__).with_name("llama_server.py")
    limits = ("--context", str(options.context), "--users", str(options.users), "--threads", str(options.threads))
    return Server("llama.cpp", (sys.executable, str(program), str(options.gguf), *limits), "bench", "/health")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _await(is_up: Callable[[], bool], process: subprocess.Popen[bytes], log: Any, name: str) -> None:
    give_up = time.monotonic() + START_S
    while not is_up():
        if process.poll() is not None or time.monotonic() > give_up:
            log.seek(0)
            said = " / ".join(log.read().strip().splitlines()[-3:])
            raise RuntimeError(f"{name} did not come up: {said or 'it said nothing'}")
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]
