"""What Prometheus reads at `/metrics`, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from packlight.server.loop import EngineLoop

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that were not computed, as an earlier request began with them.",
    "generated_tokens": "Tokens of answers.",
    "preemptions": "Requests that were put back in the queue as memory ran out.",
    "steps": "Steps of the engine.",
}


class Metrics:
    """Counters and histograms; `watch` adds the engine's own numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "packlight_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "packlight_request_seconds", "From a request's arrival to its end.", ["route"], registry=self.registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._next = self._histogram("time_per_token_seconds", "Mean of an answer, without the first.", _TOKEN_SECONDS)
        self._batch = self._histogram("batch_size", "Answers that a step added to.", _BATCH)

    def watch(self, loop: EngineLoop) -> None:
        """Report the engine's numbers too, as they are when somebody asks."""
        self.registry.register(_EngineNumbers(loop))

    def stepped(self, num_answers: int) -> None:
        """A step added to so many answers."""
        self._batch.observe(num_answers)

    def requested(self, route: str, status: int, seconds: float) -> None:
        """A request has ended. `route` is the pattern, of which there are few."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def began(self, seconds: float) -> None:
        """The first token of an answer has come."""
        self._first.observe(seconds)

    def ended(self, seconds_after_first: float, num_tokens: int) -> None:
        """An answer is whole."""
        if num_tokens > 1:
            self._next.observe(seconds_after_first / (num_tokens - 1))

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"packlight_{name}", what, buckets=buckets, registry=self.registry)


class _EngineNumbers(Collector):
    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        stats = self._loop.engine.stats()
        for name, what, value in (
            ("engine_up", "Whether the engine works.", float(self._loop.failure is None)),
            ("running", "Answers that are computed.", stats.running),
            ("queue_depth", "Answers that wait for a place.", self._loop.waiting()),
            ("kv_tokens", "Tokens that the KV cache holds.", stats.kv_tokens),
            ("kv_capacity_tokens", "Tokens that the KV cache can hold.", stats.kv_capacity_tokens),
            ("tokens_per_second", "Of all answers together, over the last seconds.", self._loop.tokens_per_second()),
        ):
            yield GaugeMetricFamily(f"packlight_{name}", what, value=value)
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"packlight_{name}", what, value=getattr(stats, name))
