"""Who may ask: API keys, compared in constant time, and the host that a request names."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from packlight.errors import UsageError
from packlight.server.errors import ApiError
from packlight.server.settings import Settings

ENVIRONMENT = "PACKLIGHT_API_KEYS"
ANONYMOUS = "anonymous"
_OPEN_PATHS = ("/", "/health", "/ready")
_OPEN_FOLDER = "/page/"


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys: one a line of a file, where a line that begins with # is a remark, or separated by blanks in
    the environment variable PACKLIGHT_API_KEYS.

    Raises:
        UsageError: the file cannot be read or has no key; a key that no HTTP header can carry.
    """
    if path is None:
        return _checked(environment.get(ENVIRONMENT, "").split(), ENVIRONMENT)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the key file {path} cannot be read: {reason}") from error
    keys = _checked((line.strip() for line in lines if line.strip() and not line.startswith("#")), str(path))
    if not keys:
        raise UsageError(f"the key file {path} holds no key: put one on each line")
    return keys


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address or a host name."""
    name = address.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


class Authentication:
    """Middleware: puts who asks into the scope as `client_key`, a fingerprint; refuses others with 401.

    The page's files, `/health` and `/ready` are open, as browsers and orchestrators ask for them without a key.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.is_host_checked = settings.is_host_checked and not settings.keys
        self._digests = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope["client_key"] = self._admit(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> str:
        if self.is_host_checked and not is_loopback(_host_name(headers.get("host", "localhost"))):
            raise ApiError(
                403,
                "this server has no keys and answers to localhost only: start it with keys or with --allow-anonymous",
                code="host_not_allowed",
            )
        if not self._digests or path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
            return ANONYMOUS
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "an API key is missing: send Authorization: Bearer KEY", code="missing_api_key")
        return self._known(_digest(key.strip()))

    def _known(self, given: bytes) -> str:
        """The fingerprint of a known key. All keys are looked at, whichever it is, so that time tells nothing."""
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        return given.hex()[:12]


def _checked(keys: Iterable[str], where: str) -> tuple[str, ...]:
    found = tuple(keys)
    if any(not key.isascii() or not key.isprintable() or " " in key for key in found):
        raise UsageError(f"a key of {where} has characters that no HTTP header carries: use ASCII without blanks")
    return found


def _digest(key: str) -> bytes:
    # Digests have one length, so that a comparison does not tell how long the keys are.
    return hashlib.sha256(key.encode()).digest()


def _host_name(host: str) -> str:
    """The Host header without its port: `[::1]:8000`, `localhost:8000`."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
