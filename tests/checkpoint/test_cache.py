"""The cache holds whole things or nothing, whoever writes to it at the same time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packlight.checkpoint.cache import build_once, cache_root, file_sha256, remove_leftovers
from packlight.errors import CheckpointError, TargetError


def test_the_root_is_the_environments_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("PACKLIGHT_CACHE")
    assert cache_root() == Path.home() / ".cache" / "packlight"


def test_a_directory_is_built_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "x").write_text("1")

    final = tmp_path / "deep" / "final"
    assert build_once(final, build) == build_once(final, build) == final
    assert len(built) == 1 and (final / "x").read_text() == "1"
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").touch()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        build_once(tmp_path / "final", build)
    assert list(tmp_path.iterdir()) == []


def test_builders_at_the_same_time_agree(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        for name in "abc":
            (directory / name).write_text(name)

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: build_once(tmp_path / "final", build), range(16)))
    assert results == {tmp_path / "final"}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = socket.gethostname()
    dead, alive = tmp_path / f".k.{host}.{child.pid}.0a.tmp", tmp_path / f".k.{host}.{os.getpid()}.0b.tmp"
    elsewhere, unrelated = tmp_path / f".k.not-{host}-x.{child.pid}.0c.tmp", tmp_path / ".mine.tmp"
    for path in (dead, alive, elsewhere, unrelated):
        path.mkdir()
    remove_leftovers(tmp_path)
    assert [path.exists() for path in (dead, alive, elsewhere, unrelated)] == [False, True, True, True]


def test_a_cache_that_is_a_file_is_a_target_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="set PACKLIGHT_CACHE"):
        build_once(tmp_path / "file" / "final", lambda directory: None)


def test_a_hash_of_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_sha256(tmp_path / "absent")
