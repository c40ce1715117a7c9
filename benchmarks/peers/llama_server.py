"""llama.cpp's own HTTP server, as the package xllamacpp brings it, on one GGUF file until it is told to end."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of each slot")
    parser.add_argument("--users", type=int, required=True, help="slots")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = str(given.model)
    params.port = given.port
    params.n_parallel, params.n_ctx = given.users, given.users * given.context
    params.n_threads_http = 8 * given.users  # each stream holds one
    params.verbosity, params.ui = 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
