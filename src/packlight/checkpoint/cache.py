"""The cache of converted checkpoints: keyed by content, written beside and renamed, shared by processes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from packlight.errors import CheckpointError, TargetError

_CHUNK_BYTES = 1 << 22


def cache_root() -> Path:
    """`$PACKLIGHT_CACHE`, or `~/.cache/packlight`."""
    return Path(os.environ.get("PACKLIGHT_CACHE") or Path.home() / ".cache" / "packlight")


def file_sha256(*paths: Path) -> str:
    """SHA-256, hexadecimal, of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path") from error
    return digest.hexdigest()


def build_once(final: Path, build: Callable[[Path], None]) -> Path:
    """`final`, built by `build(directory)` where it does not exist yet.

    `build` fills a temporary directory beside `final`, which is renamed at the end, so `final` is whole or absent.
    Processes that build the same at once do the work twice; the first to finish wins. What a killed process left
    behind is removed.

    Raises:
        TargetError: the cache cannot be written.
    """
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent)
        temporary = final.parent / f".{final.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        try:
            build(temporary)
            _rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise TargetError(
            f"the cache {final.parent} cannot be written: {error.strerror}; free space or set PACKLIGHT_CACHE"
        ) from error
    return final


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary directories of processes of this host that are no longer alive."""
    for path in parent.glob(".*.tmp"):
        # The host name may itself hold dots: count from the right.
        parts = path.name.rsplit(".", 3)
        if len(parts) == 4 and parts[0].endswith(f".{socket.gethostname()}") and not _is_alive(parts[1]):
            shutil.rmtree(path, ignore_errors=True)


def _rename(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        # Another process was first; what it built from the same content is the same.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not final.is_dir():
            raise


def _is_alive(pid: str) -> bool:
    if os.name == "nt":  # there, signal 0 is not a question: it is Ctrl-C
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
