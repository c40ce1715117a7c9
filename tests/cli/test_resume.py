"""Ctrl-C and `kill -9` in the middle, then the same command again: the artifact of an undisturbed run, to the byte."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli import stand_ins
from tests.cli.driver import assert_one_sentence, call, contents, listing, run, spawn
from tests.cli.interrupting import (
    assert_interrupted,
    assert_same_artifact,
    blocks_of,
    interrupt_in,
    start_and_end,
)

from packlight.checkpoint import save
from packlight.compress import run as compress

BLOCKS = 14
QUANTIZE: tuple[object, ...] = ("-q", "--bits", 4)
FIT: tuple[object, ...] = ("-q", "--memory", "9MB", "--context", 32, "--window", 32, "--tokens", 256)


@pytest.fixture(autouse=True)
def _cheap(request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:
        request.getfixturevalue("stand_ins")


@pytest.fixture(scope="module")
def undisturbed(deep_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The artifact of each verb from a run that nothing disturbed, by verb."""
    directory = tmp_path_factory.mktemp("undisturbed")
    made = {"quantize": directory / "quantized", "fit": directory / "fitted"}
    with pytest.MonkeyPatch.context() as patched:
        stand_ins.put_in(patched.setattr)
        assert call("quantize", deep_dir, *QUANTIZE, "--out", made["quantize"]).code == 0
        assert call("fit", deep_dir, *FIT, "--out", made["fit"]).code == 0
    return made


MOMENTS: list[tuple[Any, str, int]] = [
    (compress, "_store", 0),
    (compress, "_store", 1),
    (compress, "_store", 7),
    (compress, "_store", 13),
    (save, "write_shards", 0),
    (stand_ins.pipeline.proof, "record", 0),
    (stand_ins.pipeline.proof, "prove", 0),
    (stand_ins.pipeline, "model_card", 0),
    (save, "_sync", 2),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[1]}-{moment[2]}")
def test_quantize_goes_on_after_ctrl_c(
    moment: tuple[Any, str, int], deep_dir: Path, out: Path, undisturbed: dict[str, Path], stored: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, *moment)
        assert_interrupted(call("quantize", deep_dir, *QUANTIZE, "--out", out))
    assert not out.exists()
    first = len(stored)
    assert call("quantize", deep_dir, *QUANTIZE, "--out", out).code == 0
    assert stored == list(range(BLOCKS)), f"{first} blocks were finished before, and none is done twice"
    assert_same_artifact(out, undisturbed["quantize"])
    assert list(listing(out.parent)) == ["out", *(f"out/{name}" for name in listing(out))]


@pytest.mark.parametrize(
    "moment",
    [
        (compress, "_store", 7),
        (stand_ins.pipeline, "footprint", 1),
        (stand_ins.pipeline, "compare", 0),
        (stand_ins.pipeline.proof, "prove", 0),
    ],
    ids=lambda moment: f"{moment[1]}-{moment[2]}",
)
def test_fit_goes_on_after_ctrl_c(
    moment: tuple[Any, str, int], deep_dir: Path, out: Path, undisturbed: dict[str, Path], stored: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, *moment)
        assert_interrupted(call("fit", deep_dir, *FIT, "--out", out))
    assert not out.exists()
    ended = call("fit", deep_dir, *FIT, "--out", out)
    assert ended.code == 0, ended.err
    assert stored == list(range(BLOCKS))
    assert_same_artifact(out, undisturbed["fit"])


@pytest.mark.parametrize(
    ("how", "verb", "flags"),
    [
        (signal.SIGINT, "quantize", QUANTIZE),
        (signal.SIGKILL, "quantize", QUANTIZE),
        (signal.SIGINT, "fit", FIT),
        (signal.SIGKILL, "fit", FIT),
    ],
)
def test_a_real_signal(
    how: signal.Signals,
    verb: str,
    flags: tuple[object, ...],
    deep_dir: Path,
    out: Path,
    undisturbed: dict[str, Path],
    stored: list[int],
) -> None:
    ended = start_and_end(how, 5, out, verb, deep_dir, *flags)
    if how == signal.SIGINT:
        assert_interrupted(ended)
    else:
        assert ended.code == -signal.SIGKILL
    assert not out.exists()
    finished = len(blocks_of(out))
    assert 5 <= finished < BLOCKS
    done = call(verb, deep_dir, *flags, "--out", out)
    assert done.code == 0, done.err
    assert stored == list(range(finished, BLOCKS))
    assert_same_artifact(out, undisturbed[verb])


def test_another_request_discards_what_is_there(deep_dir: Path, out: Path, stored: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 7)
        assert call("quantize", deep_dir, "-q", "--bits", 4, "--out", out).code == 130
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 3)
        assert call("quantize", deep_dir, "-q", "--bits", 8, "--out", out).code == 130
    assert stored == [*range(7), *range(3)]
    stored.clear()
    assert call("quantize", deep_dir, "-q", "--bits", 4, "--out", out).code == 0
    assert stored == list(range(BLOCKS))


def test_damage_to_the_model_in_between_is_another_request(tiny: Path, out: Path, stored: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 2)
        assert call("quantize", tiny, *QUANTIZE, "--out", out).code == 130
    config = tiny / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    assert call("quantize", tiny, *QUANTIZE, "--out", out).code == 0
    assert stored == [0, 1, 0, 1, 2, 3]


def test_two_at_once(tiny: Path, out: Path) -> None:
    with pytest.raises(ZeroDivisionError), save.job(out, {}, 0):
        before = listing(out.parent)
        for argv in (("quantize", tiny, *QUANTIZE), ("fit", tiny, *FIT)):
            assert_one_sentence(call(*argv, "--out", out), says="another process is making")
        assert listing(out.parent) == before
        raise ZeroDivisionError


def test_a_finished_job_shows_its_result_at_once(tiny: Path, out: Path, stored: list[int]) -> None:
    flags: tuple[object, ...] = ("--memory", "1GB", "--context", 32, "--window", 32, "--tokens", 256)
    first = call("fit", tiny, *flags, "-q", "--json", "--out", out)
    assert first.code == 0, first.err
    before, stored[:] = contents(out), []
    start = time.monotonic()
    again = call("fit", tiny, *flags, "--json", "--out", out)
    assert time.monotonic() - start < 5
    assert again.code == 0
    assert again.out == first.out
    assert "nothing to do" in again.err
    assert stored == []
    for changed in (("--context", 64), ("--users", 2), ("--memory", "2GB"), ("--max-loss", "50"), ("--tokens", 288)):
        assert_one_sentence(call("fit", tiny, *flags, "-q", *changed, "--out", out), says="exists already")
    assert_one_sentence(call("quantize", tiny, "-q", "--out", out), says="exists already")
    assert contents(out) == before


@pytest.mark.slow
def test_fit_with_everything_real_survives_a_kill(deep_dir: Path, out: Path, tmp_path: Path) -> None:
    """Probe, measuring and proving children and all; killed at several moments of one job."""
    argv = ("fit", deep_dir, *FIT)
    for seconds in (6, 9, 14, 20, 30):
        process = spawn(*argv, "--out", out)
        try:
            process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert run(*argv, "--out", out).code in (0, 3)
    assert run(*argv, "--out", tmp_path / "undisturbed").code in (0, 3)
    assert_same_artifact(out, tmp_path / "undisturbed")
