"""Keeping weights out of the heap that activations live in.

glibc serves blocks below a threshold from one heap and larger ones from mappings of their own, and raises the
threshold whenever a large block is freed. While a model is loaded, temporaries are freed all the time, so that weights
soon land in the heap between holes that are never given back: a third of a small model's size. Here every block is
mapped while a model is loaded, and afterwards only those that glibc would map at most.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LOADING = 64 * 1024
_RUNNING = 32 * 1024 * 1024
"""glibc's own upper limit of the threshold that it adapts (mallopt(3))."""


@contextmanager
def weights_apart() -> Iterator[None]:
    """Blocks that are allocated inside get mappings of their own; a no-op where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LOADING)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _RUNNING)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING)
        libc.malloc_trim(0)


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c")
    if name is None:
        return None
    libc = ctypes.CDLL(name)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
