"""llama.cpp behind the interface of a serving engine: it computes and batches, in threads of its own.

`xllamacpp` brings llama.cpp with the loop of its server. Each request that is computed has a thread here, which waits
for that loop and puts what it says into a queue; `step` reads the queue.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from packlight.checkpoint.gguf import GgufHeader, read_gguf
from packlight.checkpoint.tokenizer import write_gguf_tokenizer
from packlight.errors import CheckpointError, MissingExtraError, PacklightError, UsageError
from packlight.runtime.sampling import Sampling
from packlight.runtime.serving.engine import Delta, Request, ServingEngine, Stats
from packlight.runtime.serving.grammar import STRICT, GrammarMaker
from packlight.runtime.serving.llamacpp_flight import MARGIN, Chunk, Flight, Vocabulary
from packlight.runtime.tokenizer import read_tokenizer

if TYPE_CHECKING:
    import xllamacpp

WAIT_S = 0.005
"""How long a step waits for llama.cpp to say something."""

DEFAULT_CONTEXT = 4096
"""Tokens of a request where nobody says otherwise: llama.cpp reserves them for each user when it starts, and what
models were made for may be a hundred times more."""

CHUNK = 256
"""Tokens of prompts that are computed at once, while everybody else's next token waits."""

_PADDING = 256
"""llama.cpp's contexts are multiples of this."""
_RANDOM_SEED = 0xFFFFFFFF
"""What llama.cpp takes for `any seed`."""

Event = tuple[Flight, Chunk | None]
"""What llama.cpp said to a request; None: its slot is free."""


class LlamaCppEngine(ServingEngine):
    """A GGUF file, served by llama.cpp.

    Args:
        path: the file.
        context: tokens of a request, at most; None: as the model has it, no more than 4096.
        users: requests that are computed at once, at most; the KV cache holds a whole context for each.
        threads: threads to compute with; None leaves llama.cpp's choice.

    Raises:
        CheckpointError: a damaged file, or one that llama.cpp or its tokenizer's reader does not know.
        MissingExtraError: xllamacpp is absent.
        UsageError: a context that the model was not made for.
    """

    def __init__(self, path: Path, context: int | None = None, users: int = 16, threads: int | None = None) -> None:
        self.name = "llama.cpp"
        header = read_gguf(path)
        self.context, self.users = _context(header, context), users
        self.tokenizer = _tokenizer(header)
        self.vocabulary = Vocabulary(self.tokenizer)
        self._grammars = GrammarMaker(self.tokenizer, _stops(header, self.tokenizer))
        self._server: xllamacpp.Server | None = _start(path, self.context, users, threads)
        self._pool = ThreadPoolExecutor(users, "llamacpp")
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._waiting: deque[Flight] = deque()
        self._running: dict[str, Flight] = {}
        self._jobs: dict[Flight, Future[None]] = {}
        """One for each slot of llama.cpp that is not known to be free, those of forgotten requests among them."""
        self._steps = self._prompt_tokens = self._reused_tokens = self._generated_tokens = 0
        self._stats = self._count()

    def check(self, request: Request) -> None:
        tokens, known = len(request.prompt), len(self.vocabulary)
        if tokens == 0:
            raise UsageError("the prompt is empty: give at least one token")
        if tokens >= self.context:
            raise UsageError(
                f"the prompt has {tokens} tokens and there is room for {self.context}, answer included: shorten it"
            )
        if not all(0 <= token < known for token in request.prompt):
            raise UsageError(f"the prompt has a token that the model does not know: ids are 0 to {known - 1}")
        if request.schema is not None:
            self._grammars.check(request.schema)

    def add(self, request: Request) -> None:
        self.check(request)
        limit = min(request.sampling.max_tokens, self.context - len(request.prompt))
        self._waiting.append(Flight(request, self.vocabulary, limit))
        self._stats = self._count()

    def cancel(self, request_id: str) -> None:
        self._waiting = deque(flight for flight in self._waiting if flight.request.id != request_id)
        flight = self._running.pop(request_id, None)
        if flight is not None:
            flight.is_over = True  # its thread tells llama.cpp so at the next token
        self._stats = self._count()

    def step(self) -> list[Delta]:
        deltas = list(self._expire())
        self._submit()
        for flight, chunk in self._collect():
            if chunk is None:
                self._release(flight)
            elif not flight.is_over:
                self._take(flight, chunk)
        self._submit()
        deltas += self._give()
        self._steps += bool(deltas)
        self._stats = self._count()
        return deltas

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def stats(self) -> Stats:
        return self._stats

    def embed(self, prompts: list[tuple[int, ...]]) -> list[list[float]]:
        raise UsageError("llama.cpp makes no embeddings here: serve the model with --engine torch")

    def close(self) -> None:
        for request_id in list(self._running):
            self.cancel(request_id)
        self._waiting.clear()
        self._pool.shutdown(wait=True)
        self._server = None

    def _expire(self) -> Iterator[Delta]:
        """End what has no time left."""
        now = time.monotonic()
        for flight in [*self._running.values(), *self._waiting]:
            if flight.request.deadline is not None and flight.request.deadline <= now:
                self.cancel(flight.request.id)
                flight.end("deadline")
                yield flight.delta()

    def _submit(self) -> None:
        """Hand requests to llama.cpp while it has slots. It would queue more, but could not be told to forget them."""
        while self._waiting and len(self._jobs) < self.users:
            flight = self._waiting.popleft()
            self._running[flight.request.id] = flight
            self._jobs[flight] = self._pool.submit(self._ask, flight)

    def _ask(self, flight: Flight) -> None:
        """In a thread of its own: the request from its first token to its last."""

        def hear(chunk: Chunk) -> bool:
            self._events.put((flight, chunk))
            return flight.is_over or flight.has_all(chunk)

        assert self._server is not None
        try:
            self._server.handle_completions(_wire(flight), hear)
        finally:
            self._events.put((flight, None))

    def _collect(self) -> Iterator[Event]:
        """All that was said, after a moment's wait where nothing was."""
        if not self._jobs:
            return
        try:
            yield self._events.get(timeout=WAIT_S)
            while True:
                yield self._events.get_nowait()
        except Empty:
            return

    def _take(self, flight: Flight, chunk: Chunk) -> None:
        if "error" in chunk:
            self.cancel(flight.request.id)
            raise PacklightError(f"llama.cpp failed on a request: {chunk['error'].get('message', chunk['error'])}")
        first, before = flight.is_new, flight.num_tokens
        flight.push(chunk)
        if first and not flight.is_new:
            self._reused_tokens += flight.reused_tokens
            self._prompt_tokens += len(flight.request.prompt) - flight.reused_tokens
        self._generated_tokens += flight.num_tokens - before

    def _release(self, flight: Flight) -> None:
        """A slot is free. An answer that llama.cpp did not end was as long as it may be."""
        job = self._jobs.pop(flight)
        if not flight.is_over:
            flight.end("length")
        job.result()  # raises what the thread raised

    def _give(self) -> list[Delta]:
        deltas = [flight.delta() for flight in self._running.values() if flight.has_news]
        for delta in deltas:
            if delta.finish is not None:
                del self._running[delta.id]
        return deltas

    def _count(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_tokens=sum(len(flight.request.prompt) + flight.num_tokens for flight in self._running.values()),
            kv_capacity_tokens=self.context * self.users,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=0,
        )


def _context(header: GgufHeader, wanted: int | None) -> int:
    most: int = header.get(f"{header.architecture}.context_length", int)
    if wanted is not None and wanted > most:
        raise UsageError(f"a context of {wanted} tokens is more than the {most} that the model was made for")
    # llama.cpp ends an answer where the model's context does, in the middle of a character too.
    return min(most - MARGIN, DEFAULT_CONTEXT if wanted is None else wanted)


def _tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as directory:
        write_gguf_tokenizer(header, Path(directory))
        if not any(Path(directory).iterdir()):
            raise CheckpointError(f"{header.path} holds no tokenizer: give a .gguf file with one")
        return read_tokenizer(Path(directory))


def _stops(header: GgufHeader, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    return frozenset(token for token in (tokenizer.eos_token_id, *named) if isinstance(token, int))


def _start(path: Path, context: int, users: int, threads: int | None) -> xllamacpp.Server:
    try:
        import xllamacpp
    except ImportError as error:
        raise MissingExtraError("xllamacpp", "llamacpp", "serving with llama.cpp") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = users
    params.n_ctx = users * -(-(context + MARGIN) // _PADDING) * _PADDING
    params.n_predict = -1
    params.n_batch = params.n_ubatch = max(CHUNK, users)
    params.verbosity = 0
    # What slots held before is kept in them, and not beside them in memory that nobody planned.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    # Its tiles for long prompts round otherwise than for single tokens, and an answer would depend on its neighbours.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # It opens a port of its own on this machine, which is of no use here: a key that nobody knows keeps it shut.
    params.api_keys = [secrets.token_hex(32)]
    params.ui = params.endpoint_slots = False
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise CheckpointError(
            f"llama.cpp cannot load {path}: it is damaged, of an architecture that it does not know, or larger than "
            "the memory that is free"
        ) from error
    # A server that is ended before its loop has begun waits for ever for that loop's end: here it has begun.
    server.handle_completions({"prompt": [0], "n_predict": 1})
    return server


def _wire(flight: Flight) -> dict[str, Any]:
    """A request as llama.cpp's server takes it."""
    request = flight.request
    wire = {
        "prompt": list(request.prompt),
        "n_predict": flight.limit + MARGIN,
        "stream": True,
        "cache_prompt": True,
        "return_progress": True,  # so that it can be told to stop between the chunks of a long prompt
        "timings_per_token": True,  # they count the tokens, also those without a text
        "n_probs": max(1, request.sampling.logprobs or 0),  # token ids come only with log-probabilities
        "repeat_last_n": len(request.prompt) + flight.limit,  # all that came before
        **_sampling(request.sampling),
    }
    if request.schema is not None:
        wire["grammar"] = _grammar(request.schema)
    return wire


def _grammar(schema: str) -> str:
    """For llguidance, which is a part of this llama.cpp, with the options that `GrammarMaker` has checked it with."""
    document = json.loads(schema)
    if isinstance(document, dict):
        document["x-guidance"] = STRICT
    return f"%llguidance {{}}\nstart: %json {json.dumps(document)}"


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """In the order of `runtime.sampling`."""
    chosen = {"repeat_penalty": sampling.repetition_penalty, "seed": sampling.seed % _RANDOM_SEED}
    if sampling.temperature == 0:
        return chosen | {"samplers": ["penalties", "top_k"], "top_k": 1}
    return chosen | {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
