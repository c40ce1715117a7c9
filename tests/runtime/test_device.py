"""Devices by name; what only a GPU shows is in `test_cuda.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.cli.driver import assert_refused
from tests.conftest import TinyModel

from packlight.errors import UsageError
from packlight.runtime.device import choose_device


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    assert choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="no CUDA device"):
        choose_device("cuda")
    words = ("generate", tiny_model_dir(), "--raw", "--prompt", "x", "--device", "cuda")
    assert_refused(words, tmp_path, says="there is no CUDA device that torch can use here")


def test_a_device_that_nobody_knows(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    words = ("generate", tiny_model_dir(), "--raw", "--prompt", "x", "--device", "tpu")
    assert_refused(words, tmp_path, says="a device is one of auto, cpu, cuda, not 'tpu'")
