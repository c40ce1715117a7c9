"""Peak memory sees what was allocated and freed again, and `flush` starts a new peak."""

from __future__ import annotations

import pytest
import torch

from packlight.measure.memory import current_bytes, flush, peak_bytes
from packlight.runtime.allocator import trim

SIZE = 96 * 2**20
COUNTING = 2 * 2**20
"""The kernel counts pages per thread and adds them up now and then; interpreters allocate a little in between."""


def test_a_tensor_that_came_and_went() -> None:
    flush()
    before = current_bytes()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    assert current_bytes() >= before + SIZE - COUNTING
    del tensor
    trim()  # a hole in the heap may have served it, and only this gives a hole's pages back
    assert current_bytes() < before + SIZE // 2
    assert peak_bytes() >= before + SIZE - COUNTING
    flush()
    assert peak_bytes() < before + SIZE // 2


def test_flush_collects_what_only_a_cycle_holds() -> None:
    flush()
    before = current_bytes()
    cycle: list[object] = [torch.ones(SIZE, dtype=torch.uint8)]
    cycle.append(cycle)
    del cycle
    flush()
    assert current_bytes() < before + SIZE // 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tensor_that_came_and_went_on_cuda() -> None:
    flush("cuda")
    before = current_bytes("cuda")
    tensor = torch.ones(SIZE, dtype=torch.uint8, device="cuda")
    assert current_bytes("cuda") == before + SIZE
    del tensor
    assert (current_bytes("cuda"), peak_bytes("cuda")) == (before, before + SIZE)
    flush("cuda")
    assert peak_bytes("cuda") == before
