"""A server in a process of its own, as `packlight serve` runs it, around the scripted engine.

`python -m tests.server.serving_process STEP_S GRACE_S [stuck]` prints its address when it is ready.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.server.scripted_engine import ScriptedEngine, byte_tokenizer

from packlight.server.app import build_app
from packlight.server.run import address_of, bind, serve
from packlight.server.settings import Served, Settings


def main(step_s: float, grace_s: float, is_stuck: bool) -> None:
    """Serve until a signal comes."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = byte_tokenizer(Path(directory))
    engine = ScriptedEngine(tokenizer, context=100_000, users=8, step_s=step_s)
    if is_stuck:
        engine.may_step.clear()
    settings = Settings(grace_s=grace_s)
    bound = bind("127.0.0.1", 0)
    app = build_app(engine, Served("scripted"), settings, lambda line: print(line, flush=True))
    address = address_of(bound)
    is_done = serve(app, bound, settings, lambda: print(address, flush=True))
    print("closed" if is_done else "cut off", flush=True)
    if not is_done:
        os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:] == ["stuck"])
