"""What the tests of the runtime share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runtime.architectures import save_architecture


@pytest.fixture(scope="session")
def architecture_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`architecture_dir("qwen2")`: a small random model of that family, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            save_architecture(name, made[name])
        return made[name]

    return make
