"""Rates of kernels, found by running small models."""

from __future__ import annotations

import math

import pytest
import torch

from packlight.measure import hardware
from packlight.measure.hardware import calibrate
from packlight.spec import Hardware, KernelRate


def test_a_kernel_gets_positive_rates() -> None:
    ticks: list[int] = []
    before = KernelRate(1e9, 1e-6, 1e10)
    machine = Hardware("cpu", 2, torch.get_num_threads(), 10**9, rates={"float32": before})
    found = calibrate(machine, ["int8"], lambda: ticks.append(1))
    assert ticks == [1]
    assert set(found.rates) == {"float32", "int8"} and found.rates["float32"] == before
    rate = found.rates["int8"]
    for value in vars(rate).values():
        assert math.isfinite(value) and value >= 0
    assert machine.rates == {"float32": before}  # the machine that was handed in is left alone


def test_two_sizes_give_the_two_unknowns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 2 GB/s and 10 us a layer, by the formula of `KernelRate`, is found again."""

    def times(kernel: str, hidden: int) -> tuple[int, float, float]:
        size = 1000 * hidden
        return size, size / 2e9 + hardware._LAYERS * 10e-6, 1.0

    monkeypatch.setattr(hardware, "_times", times)
    found = calibrate(Hardware("cpu", 1, torch.get_num_threads(), 1), ["int4"]).rates["int4"]
    assert list(vars(found).values())[:2] == pytest.approx([2e9, 10e-6])


def test_a_small_model_as_slow_as_a_large_one_gives_no_negative_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_times", lambda kernel, hidden: (hidden, 1.0 / hidden, 1e-9))
    found = calibrate(Hardware("cpu", 1, torch.get_num_threads(), 1), ["int4"]).rates["int4"]
    assert all(math.isfinite(value) and value >= 0 for value in vars(found).values())
