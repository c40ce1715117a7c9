"""A KV cache outside the memory that computes: on disk beside a CPU, in main memory beside a GPU.

One layer at a time is resident. On a CPU the buffers are a shared mapping of a nameless file in packlight's cache
directory: the pages of a layer are handed back once the next layer is attended to, and the system writes them out when
it needs the room.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch

from packlight.checkpoint.cache import cache_root
from packlight.errors import TargetError
from packlight.runtime.kv_static import StaticLayer
from packlight.spec import format_size


class OffloadedLayer(StaticLayer):
    """A static layer whose buffers lie elsewhere; `chain` makes the layers of one cache."""

    def __init__(self, capacity: int, resident: weakref.WeakSet[OffloadedLayer]) -> None:
        super().__init__(capacity)
        self.resident = resident  # the one layer of the cache whose pages are in memory, shared by all
        self.maps: list[mmap.mmap] = []

    @classmethod
    def chain(cls, num_layers: int, capacity: int) -> list[OffloadedLayer]:
        """Layers of which one at a time is in memory."""
        resident: weakref.WeakSet[OffloadedLayer] = weakref.WeakSet()
        return [cls(capacity, resident) for _ in range(num_layers)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.resident - {self}:
            layer.release()
            self.resident.discard(layer)
        self.resident.add(self)
        keys, values = super().update(key_states, value_states)
        return keys.to(key_states.device), values.to(key_states.device)

    def keep(self, tokens: int, batch: int) -> None:
        super().keep(tokens, batch)
        self.maps = self.maps[-2:]  # those of buffers that were replaced go

    def release(self) -> None:
        """Hand the pages back to the system; their content stays in the file."""
        for each in self.maps:
            each.madvise(mmap.MADV_DONTNEED)

    def resident_bytes(self) -> int:
        """Bytes of the filled part where this is the layer in memory, else 0."""
        if self not in self.resident or self.keys is None or self.values is None:
            return 0
        return sum(buffer[:, :, : self.length].nbytes for buffer in (self.keys, self.values))

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        shape = (batch, heads, self.capacity, width)
        # Not the device of `states`: they may be what this cache held before, in main memory.
        if (device := torch.device(self.device or "cpu").type) != "cpu":
            return torch.zeros(shape, dtype=states.dtype, pin_memory=device == "cuda")
        nbytes = math.prod(shape) * states.element_size()
        directory = cache_root()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            _reserve(file.fileno(), nbytes, directory)
            self.maps.append(mmap.mmap(file.fileno(), nbytes))
        return torch.frombuffer(self.maps[-1], dtype=states.dtype).view(shape)


def _reserve(file: int, nbytes: int, directory: Path) -> None:
    """Blocks on disk for the whole file: writing to a mapping on a full disk would kill the process."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        raise TargetError(
            f"{directory} has no room for a KV cache of {format_size(nbytes)}: {error.strerror}; "
            "free space or set PACKLIGHT_CACHE"
        ) from error
