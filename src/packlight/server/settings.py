"""What whoever starts the server decides about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packlight.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How the server treats its clients.

    Args:
        keys: one of these must come with each request; empty: anybody may ask.
        is_host_checked: refuse requests that name another host than this machine, as a page of a foreign site does
            whose name was made to lead here. For servers without keys.
        max_queue: answers that may wait for a place in the batch.
        max_body_bytes: of a request.
        max_tokens: of an answer; None: what the context leaves.
        requests_per_minute: of one key, and as many at once after a pause; None: no limit.
        timeout_s: from the arrival of a request to the end of its answer.
        grace_s: for the answers in flight when the server is told to end.
        cors_origins: origins whose pages may call the server; `*` is any.

    Raises:
        UsageError: a value outside its range.
    """

    keys: tuple[str, ...] = ()
    is_host_checked: bool = True
    max_queue: int = 128
    max_body_bytes: int = 1 << 20
    max_tokens: int | None = None
    requests_per_minute: float | None = None
    timeout_s: float = 600.0
    grace_s: float = 30.0
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--max-queue", self.max_queue, 1),
            ("--max-body", self.max_body_bytes, 1024),
            ("--max-tokens", self.max_tokens, 1),
            ("--grace", self.grace_s, 0),
        ):
            if value is not None and not least <= value < float("inf"):
                raise UsageError(f"{name} must be at least {least}, not {value}")
        for name, number in (("--rate-limit", self.requests_per_minute), ("--timeout", self.timeout_s)):
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(f"{name} must be above 0, not {number}")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise UsageError(f"--cors-origin is * or an origin such as https://example.org, not {origin!r}")


@dataclass(frozen=True)
class Served:
    """The model by the name that clients give, and the artifact's directory where it has one."""

    name: str
    directory: Path | None = None
