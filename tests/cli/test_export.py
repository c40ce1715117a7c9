"""`packlight export`: what is refused, before anything is read or compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.driver import assert_one_sentence, call
from torch._inductor import config


@pytest.fixture
def tiny(tiny_model_dir) -> Path:
    return tiny_model_dir(tied=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "zip"), "there is no export format 'zip': choose one of compiled"),
        (("--to", "compiled", "--context", 257), "beyond the model's 256: give at most 256"),
        (("--to", "compiled", "--dtype", "int8"), "dtype is one of float32, bfloat16, float16, not 'int8'"),
        (("--to", "compiled", "--batch", 0), "--batch"),
        (("--to", "compiled", "--context", 0), "--context"),
    ],
)
def test_bad_words(tiny: Path, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    assert_one_sentence(call("export", tiny, "-q", "--out", tmp_path / "out", *words), says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert_one_sentence(call("export", tiny, "--to", "compiled", "--out", tmp_path / "out"), says="exists already")


def test_no_compiler(tiny: Path, tmp_path: Path) -> None:
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        ended = call("export", tiny, "--to", "compiled", "-q", "--out", tmp_path / "out")
    assert_one_sentence(ended, says="needs a C++ compiler and none was found: install one")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model(tmp_path: Path) -> None:
    ended = call("export", tmp_path / "nowhere", "--to", "compiled", "-q", "--out", tmp_path / "out")
    assert_one_sentence(ended)
    assert list(tmp_path.iterdir()) == []
