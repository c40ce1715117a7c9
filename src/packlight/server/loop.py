"""Where asyncio meets the engine: a thread that steps, and queues that the answers come out of.

The engine belongs to the thread. The event loop puts calls into an inbox; the thread makes them between two steps, and
hands what a step made to the event loop in one piece. Whatever else is here runs in the event loop, so that nothing
needs a lock.

An answer's queue has no bound of its own: a reader that is slow, or does not read at all, holds nobody up, and what
waits for it is at most its answer, which the limit of its tokens and its deadline bound.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol

from packlight.errors import UsageError
from packlight.runtime.serving.engine import Delta, Request, ServingEngine
from packlight.server.errors import ApiError

LATE_S = 10.0
"""After its deadline an answer has this long, since a step may be running, before it is given up without the engine."""
WINDOW_S = 5.0
"""What is now: tokens per second are counted over this long."""
EMBED_AT_ONCE = 8
"""Prompts that are embedded between two steps, so that answers go on meanwhile."""
_PAUSE_S = 0.001
_CRASHED = "the engine failed and answers nothing until the server is started again"
_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """What is told of each step, in the event loop."""

    def stepped(self, num_answers: int) -> None:
        """A step added to so many answers."""
        ...


class Batch:
    """The answers to one HTTP request. Leaving its `with` block cancels what is not finished."""

    def __init__(self, loop: EngineLoop, requests: Sequence[Request]) -> None:
        self.open = {request.id: index for index, request in enumerate(requests)}
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Delta] | ApiError] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        deadlines = [request.deadline for request in requests if request.deadline is not None]
        if deadlines:
            wait_s = max(0.0, max(deadlines) - time.monotonic()) + LATE_S
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.fail, timed_out())

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(index of the answer, what was added), until all are finished.

        Raises:
            ApiError: the engine failed, refused a request or is much too late.
        """
        left = len(self.open)
        while left:
            found = await self._queue.get()
            if isinstance(found, ApiError):
                raise found
            left -= found[1].finish is not None
            yield found

    def put(self, delta: Delta) -> None:
        """A piece of an answer has come."""
        self._queue.put_nowait((self.open[delta.id], delta))
        if delta.finish is not None:
            del self.open[delta.id]

    def fail(self, error: ApiError) -> None:
        """Whoever reads gets this error."""
        self._queue.put_nowait(error)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.cancel(self.open)


class EngineLoop:
    """Runs an engine in a thread of its own for the tasks of one event loop.

    Args:
        max_waiting: answers that may wait for a place in the batch; more are refused with 429.
    """

    def __init__(self, engine: ServingEngine, max_waiting: int, watcher: Watcher) -> None:
        self.engine, self.max_waiting, self.watcher = engine, max_waiting, watcher
        self.is_draining = False
        self.failure: str | None = None
        """Why the engine answers no more; None while it does."""
        self.last_step_at = time.monotonic()
        self._batches: dict[str, Batch] = {}
        self._embedding: set[asyncio.Future[list[list[float]]]] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_ending = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._finished_at: deque[float] = deque(maxlen=32)
        self._made: deque[tuple[float, int]] = deque()

    def start(self) -> None:
        """Begin, for the tasks of the running event loop."""
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """End the thread and close the engine; False where a step did not come back in time. Blocks."""
        self._inbox.put(self._end)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self.engine.close()
        return True

    @property
    def in_flight(self) -> int:
        """Answers and embeddings that are not finished."""
        return len(self._batches) + len(self._embedding)

    def waiting(self) -> int:
        """Answers in flight that the engine does not compute yet."""
        return max(0, self.in_flight - self.engine.stats().running)

    @property
    def is_accepting(self) -> bool:
        """Whether a request would be taken now."""
        return self.failure is None and not self.is_draining and self.waiting() < self.max_waiting

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Put requests in the queue, all or none.

        Raises:
            ApiError: 429 where the queue is full, 503 where the engine failed or the server ends.
        """
        self._refuse_when_closed(len(requests))
        batch = Batch(self, requests)
        for request in requests:
            self._batches[request.id] = batch
            self._inbox.put(partial(self._add, request))
        return batch

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget requests; what the engine still makes of them is dropped."""
        for one in list(ids):
            if self._batches.pop(one, None) is not None and self.failure is None:
                self._inbox.put(partial(self.engine.cancel, one))

    async def embed(self, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """One vector per prompt.

        Raises:
            UsageError: the model was not made for it.
            ApiError: as `submit`; 500 where the engine fails meanwhile.
        """
        vectors: list[list[float]] = []
        for start in range(0, len(prompts), EMBED_AT_ONCE):
            self._refuse_when_closed(1)
            future: asyncio.Future[list[list[float]]] = self._asyncio.create_future()
            self._embedding.add(future)
            future.add_done_callback(self._embedding.discard)
            part = list(prompts[start : start + EMBED_AT_ONCE])
            self._inbox.put(partial(self._embed, part, future))
            vectors += await future
        return vectors

    def fail_all(self, error: ApiError) -> None:
        """Whoever waits gets this error, and the engine forgets the requests."""
        for batch in set(self._batches.values()):
            batch.fail(error)
        self.cancel(self._batches)
        for future in list(self._embedding):
            if not future.done():
                future.set_exception(error)

    def tokens_per_second(self) -> float:
        """Of all answers together, over the last seconds."""
        self._forget_old()
        return sum(tokens for _, tokens in self._made) / WINDOW_S

    def retry_after_s(self) -> float:
        """About how long it takes until an answer ends and a place is free."""
        if len(self._finished_at) < 2:
            return 1.0
        interval = (self._finished_at[-1] - self._finished_at[0]) / (len(self._finished_at) - 1)
        return min(60.0, max(1.0, interval))

    def _refuse_when_closed(self, num_answers: int) -> None:
        if self.failure is not None:
            raise ApiError(503, _CRASHED, code="engine_failed")
        if self.is_draining:
            raise shutting_down()
        waiting = self.waiting()
        if waiting + num_answers > self.max_waiting:
            raise ApiError(
                429,
                f"{waiting} answers wait already and {self.max_waiting} may: ask again later",
                code="queue_full",
                retry_after_s=self.retry_after_s(),
            )

    # In the event loop, called by the thread.

    def _deliver(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        self.last_step_at = now
        self._forget_old()
        self._made.append((now, sum(len(delta.tokens) for delta in deltas)))
        self.watcher.stepped(len({delta.id for delta in deltas}))
        for delta in deltas:
            batch = self._batches.get(delta.id)
            if batch is None:
                continue  # cancelled while the step ran
            if delta.finish is not None:
                del self._batches[delta.id]
                self._finished_at.append(now)
            batch.put(delta)

    def _refuse(self, request_id: str, error: UsageError) -> None:
        batch = self._batches.pop(request_id, None)
        if batch is not None:
            batch.fail(ApiError(400, str(error)))

    def _crashed(self, error: BaseException) -> None:
        self.failure = type(error).__name__
        self.fail_all(ApiError(500, _CRASHED, code="engine_failed"))

    def _forget_old(self) -> None:
        while self._made and self._made[0][0] < time.monotonic() - WINDOW_S:
            self._made.popleft()

    # In the thread.

    def _main(self) -> None:
        with _Reporting(self._report):
            self._run()

    def _run(self) -> None:
        while not self._is_ending:
            self._make_calls(wait_s=None if self.engine.is_idle else 0.0)
            if self._is_ending or self.engine.is_idle:
                continue
            start = time.monotonic()
            deltas = self.engine.step()
            if deltas:
                self._asyncio.call_soon_threadsafe(self._deliver, deltas)
            elif time.monotonic() - start < _PAUSE_S:
                self._make_calls(wait_s=_PAUSE_S)  # an engine that waits for others must not spin

    def _make_calls(self, wait_s: float | None) -> None:
        """All calls of the inbox; where there is none, wait so long for one, or for ever."""
        try:
            self._inbox.get(block=wait_s != 0.0, timeout=wait_s or None)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _end(self) -> None:
        self._is_ending = True

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except UsageError as error:
            self._asyncio.call_soon_threadsafe(self._refuse, request.id, error)

    def _embed(self, prompts: list[tuple[int, ...]], future: asyncio.Future[list[list[float]]]) -> None:
        if future.done():
            return  # whoever asked is gone
        try:
            vectors = self.engine.embed(prompts)
        except UsageError as error:
            self._asyncio.call_soon_threadsafe(_settle, future, error)
        else:
            self._asyncio.call_soon_threadsafe(_settle, future, vectors)

    def _report(self, error: BaseException) -> None:
        if self._asyncio.is_closed():
            return  # the server is gone, and with it everybody who waited
        _log.error("the engine failed", exc_info=error)
        self._asyncio.call_soon_threadsafe(self._crashed, error)


class _Reporting:
    """A block that hands on whatever it raises: a thread has no caller, and an engine may fail in any way."""

    def __init__(self, report: Callable[[BaseException], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._report(error)
        return True


def timed_out() -> ApiError:
    """Nothing was made before the deadline."""
    return ApiError(504, "the deadline passed before the answer began: ask again later", code="timeout")


def shutting_down() -> ApiError:
    """The server takes no more."""
    return ApiError(503, "the server is shutting down: ask again", code="shutting_down", retry_after_s=5)


def _settle(future: asyncio.Future[list[list[float]]], result: list[list[float]] | UsageError) -> None:
    if future.done():
        return
    if isinstance(result, UsageError):
        future.set_exception(result)
    else:
        future.set_result(result)
