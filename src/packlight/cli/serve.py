"""`packlight serve`: a model on the network, in OpenAI's wire format."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packlight.cli import options
from packlight.cli.output import complain
from packlight.errors import MissingExtraError, PacklightError, UsageError
from packlight.spec import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from packlight.runtime.serving.engine import ServingEngine
    from packlight.server.settings import Settings

_EXTRA = ("starlette", "uvicorn", "pydantic", "prometheus_client")
_STDOUT = "-"


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option("--host", help="Address to serve at; the default reaches this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="0 takes any free port.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; default: its directory's name.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="Keys, one a line; else from the environment, PACKLIGHT_API_KEYS."),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let others ask without a key, by whatever host name.")
    ] = False,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Answers that may wait for a place; more get status 429.", min=1)
    ] = 128,
    max_body: Annotated[str, typer.Option("--max-body", help="Size of a request.", metavar="SIZE")] = "1MiB",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Tokens of an answer, at most; default: the context.", min=1)
    ] = None,
    rate_limit: Annotated[
        float | None, typer.Option("--rate-limit", help="Requests a minute of one key; default: no limit.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of a request, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option("--grace", help="Seconds for what is in flight at SIGTERM.")] = 30.0,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a request, prompt and answer together.", min=1)
    ] = None,
    users: Annotated[int, typer.Option("--users", help="Answers computed at the same time.", min=1)] = 16,
    kv_memory: Annotated[
        str | None,
        typer.Option("--kv-memory", help="Of the KV cache; default: a context for each user.", metavar="SIZE"),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="What computes.", metavar="auto|torch|llamacpp")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model first, which takes a minute or more.")
    ] = False,
    threads: options.Threads = None,
    embeddings: Annotated[
        str | None, typer.Option("--embeddings", help="How vectors are made; default: as the checkpoint says.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Pages of this origin may ask; may be given again.")
    ] = None,
    access_log: Annotated[
        str, typer.Option("--access-log", help="File for a line of JSON per request; - is stdout.", metavar="FILE")
    ] = _STDOUT,
) -> None:
    """Serve a model at /v1/chat/completions and the like, with a page to try it at /.

    It ends at SIGTERM or Ctrl-C: new requests get status 503, those in flight are answered.

    [bold]Examples[/bold]

      packlight serve build/demo

      packlight serve demo --port 9000 --context 1024 --users 8

      packlight serve build/demo --host 0.0.0.0 --api-key-file keys.txt --rate-limit 60 --kv-memory 1GiB
    """
    _check_extra()
    from packlight.server.auth import read_keys
    from packlight.server.run import bind, check_reach
    from packlight.server.settings import Settings

    settings = Settings(
        keys=read_keys(api_key_file),
        is_host_checked=not allow_anonymous,
        max_queue=max_queue,
        max_body_bytes=parse_size(max_body),
        max_tokens=max_tokens,
        requests_per_minute=rate_limit,
        timeout_s=timeout,
        grace_s=grace,
        cors_origins=tuple(cors_origin or ()),
    )
    kv_bytes = None if kv_memory is None else parse_size(kv_memory)
    bound = bind(host, port)
    try:
        check_reach(bound, settings, allow_anonymous)
        write_line = _writer(access_log)
        from packlight.runtime.serving.open import ServingOptions, open_engine

        chosen = ServingOptions(engine, context, users, kv_bytes, compile, threads, embeddings)
        opened = open_engine(model, chosen, complain)
    except (PacklightError, OSError):
        bound.close()
        raise
    _serve(model, name, opened, settings, bound, write_line)


def _serve(
    model: str,
    name: str | None,
    engine: ServingEngine,
    settings: Settings,
    bound: socket,
    write_line: Callable[[str], None],
) -> None:
    import logging

    from packlight.checkpoint.open import short_name
    from packlight.server.app import build_app
    from packlight.server.run import address_of, serve
    from packlight.server.settings import Served

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    directory = Path(model).expanduser()
    served = Served(name or short_name(model), directory if directory.is_dir() else None)
    address = address_of(bound)

    def say_ready() -> None:
        capacity = engine.stats().kv_capacity_tokens
        complain(
            f"serving {served.name} with {engine.name} at {address}, context {engine.context} tokens, KV cache of "
            f"{capacity} tokens"
        )

    is_done = serve(build_app(engine, served, settings, write_line), bound, settings, say_ready)
    if not is_done:
        complain("the engine did not end in time and was cut off")
        sys.stdout.flush()
        os._exit(0)  # its thread may be in the middle of a computation, which a normal exit would wait for or crash in


def _check_extra() -> None:
    from importlib.util import find_spec

    for package in _EXTRA:
        if find_spec(package) is None:
            raise MissingExtraError(package.replace("_", "-"), "serve", "packlight serve")


def _writer(place: str) -> Callable[[str], None]:
    from packlight.server.access_log import line_writer

    if place == _STDOUT:
        return line_writer(sys.stdout)
    try:
        return line_writer(Path(place).open("a", encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the access log {place} cannot be written: {error.strerror}") from error
