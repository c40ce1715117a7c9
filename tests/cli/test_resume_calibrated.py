"""Jobs that look at a text, cut short anywhere: the same command again makes the artifact of an undisturbed run."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.cli import stand_ins
from tests.cli.conftest import save_llama
from tests.cli.driver import Ended, call, listing
from tests.cli.interrupting import (
    assert_interrupted,
    assert_same_artifact,
    blocks_of,
    interrupt_in,
    start_and_end,
)

from packlight.compress import calibration, sensitivity
from packlight.compress import run as compress
from packlight.compress.prune import sparsegpt as pruning
from packlight.compress.quantize import gptq, learned
from packlight.compress.sweep import Sweep
from packlight.evidence import LEDGER_NAME, read
from packlight.measure import bandwidth

BLOCKS = 4
ENGLISH = "The little princess went round the table with quick, short, swaying steps. " * 8
TEXT: tuple[object, ...] = ("-q", "--windows", 9, "--window", 32)
"""More windows than one sweep takes."""
COMMANDS: dict[str, tuple[object, ...]] = {
    "gptq": ("quantize", *TEXT, "--method", "gptq", "--bits", 3, "--asymmetric"),
    "plain": ("quantize", *TEXT, "--method", "gptq", "--option", "guided=false", "--embeddings", 8),
    "self": ("quantize", *TEXT, "--method", "gptq", "--data", "self"),
    "learned": ("quantize", *TEXT, "--method", "learned", "--bits", 2, "--scale-bits", 6, "--option", "epochs=2"),
    "wanda": ("prune", *TEXT, "--method", "wanda"),
    "sparsegpt": ("prune", *TEXT, "--method", "sparsegpt", "--scope", "2:4", "--storage", "bitmask"),
    "fit": ("fit", "-q", "--context", 32, "--window", 32, "--tokens", 64, "--windows", 3),
}


def stand_in(patched: pytest.MonkeyPatch) -> None:
    stand_ins.put_in(patched.setattr)
    patched.setattr(bandwidth, "memory_bandwidth", lambda *arguments: 1e10)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of each test's own, so that every stage is gone through."""
    stand_in(monkeypatch)
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": BLOCKS - 2, "max_position_embeddings": 64}
    return save_llama(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True, **sizes)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`undisturbed("gptq")`: the artifact of a command that nothing disturbed, made once."""
    directory = tmp_path_factory.mktemp("undisturbed")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            with pytest.MonkeyPatch.context() as patched:
                stand_in(patched)
                patched.setenv("PACKLIGHT_CACHE", str(directory / "cache"))
                ended = give(name, model, directory / name)
            assert ended.code == 0, ended.err
        return directory / name

    return make


def give(name: str, model: Path, out: Path) -> Ended:
    return call(*words(name, model), "--out", out)


def words(name: str, model: Path) -> list[object]:
    """A command line but for its target; a short text is sooner tokenized than the bundled one."""
    text = model.parent / "text.txt"
    text.write_text(ENGLISH)
    verb, *flags = COMMANDS[name]
    if verb == "fit":
        flags += ["--memory", least(model), "--data", text, "--calibration", text]
    return [verb, model, *([] if "--data" in flags else ["--data", text]), *flags]


@cache
def least(model: Path) -> str:
    """The least budget that is met, as the refusal of a smaller one names it: it leaves no choice but a mix."""
    ended = call(*COMMANDS["fit"], model, "--memory", "1kB", "--out", model / "out")
    said = re.search(r"allow (\S+ \S+) or more", ended.err)
    assert said is not None
    return said.group(1)


def interrupt_half_written(patched: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in the middle of a block's file."""
    real, calls = compress.save_file, 0

    def half(tensors: Any, path: Path, notes: Any) -> None:
        nonlocal calls
        calls += 1
        real(tensors, path, notes)
        if calls > after:
            with path.open("r+b") as stream:
                stream.truncate(path.stat().st_size // 2)
            raise KeyboardInterrupt

    patched.setattr(compress, "save_file", half)


def goes_on(name: str, model: Path, out: Path, wanted: Path, stored: list[int]) -> None:
    """The same command again: no block twice, the same bytes, nothing left behind, the same rows."""
    ended = give(name, model, out)
    assert ended.code == 0, ended.err
    assert stored == list(range(BLOCKS)), "no block is done twice"
    assert_same_artifact(out, wanted)
    assert [path for path in listing(out.parent) if not path.startswith("out")] == []
    assert rows_of(out) == rows_of(wanted)


def rows_of(artifact: Path) -> dict[tuple[str, str], Any]:
    """What the ledger says about blocks, text and matrices; of several rows for one quantity the last counts."""
    names = ("relative_error", "relative_output_error", "block_loss", "calibration_tokens", "predicted_kl")
    rows = [row for row in read(artifact / LEDGER_NAME) if row.name in names]
    return {(row.name, row.subject): (row.value, row.note) for row in rows}


MOMENTS: list[tuple[str, Any, str, int]] = [
    ("gptq", Sweep, "forward", 0),
    ("gptq", Sweep, "_pull_back", 2),  # in the second sweep
    ("gptq", gptq, "gptq", 9),  # in the second layer
    ("plain", compress, "_store", 3),
    ("self", calibration, "sample_windows", 0),
    ("learned", learned._Learner, "result", 8),
    ("wanda", compress, "_store", 2),
    ("sparsegpt", pruning, "sparsegpt", 9),  # in the second layer
    ("fit", sensitivity, "_block_losses", 3),
    ("fit", compress, "_store", 2),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]}-{moment[2]}-{moment[3]}")
def test_ctrl_c(
    moment: tuple[str, Any, str, int],
    model: Path,
    out: Path,
    undisturbed: Callable[[str], Path],
    stored: list[int],
) -> None:
    name, owner, function, after = moment
    wanted = undisturbed(name)
    stored.clear()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, owner, function, after)
        assert_interrupted(give(name, model, out))
    assert not out.exists()
    goes_on(name, model, out, wanted, stored)


def test_ctrl_c_in_the_middle_of_a_file(
    model: Path, out: Path, undisturbed: Callable[[str], Path], stored: list[int]
) -> None:
    wanted, after = undisturbed("gptq"), 2
    stored.clear()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_half_written(patched, after)
        assert_interrupted(give("gptq", model, out))
    assert stored == list(range(after))
    assert (out.parent / ".out.partial" / "blocks" / f"{after:04d}.part").exists()
    goes_on("gptq", model, out, wanted, stored)


def test_memory_that_has_become_short_in_between(
    model: Path, out: Path, undisturbed: Callable[[str], Path], stored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states in memory first, then on disk: the finished blocks are taken all the same."""
    wanted = undisturbed("gptq")
    stored.clear()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 2)
        assert_interrupted(give("gptq", model, out))
    assert not (out.parent / ".out.partial" / "activations").exists()
    monkeypatch.setattr(calibration, "SHARE_OF_FREE_RAM", 0.0)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 1)
        assert_interrupted(give("gptq", model, out))
    streams = (out.parent / ".out.partial" / "activations").iterdir()
    assert [path.name for path in streams] == ["inputs.bin"]
    goes_on("gptq", model, out, wanted, stored)


def test_another_text_is_another_job(model: Path, out: Path, stored: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 2)
        assert_interrupted(give("plain", model, out))
    stored.clear()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in(patched, compress, "_store", 2)
        assert_interrupted(call(*words("plain", model), "--windows", 4, "--out", out))
    assert stored == [0, 1]


def test_a_kill(model: Path, out: Path, undisturbed: Callable[[str], Path], stored: list[int]) -> None:
    """SIGKILL of a process of its own when two blocks are there."""
    wanted = undisturbed("gptq")
    stored.clear()
    ended = start_and_end(signal.SIGKILL, 2, out, *words("gptq", model), pause=0.15)
    assert ended.code == -signal.SIGKILL
    assert not out.exists()
    finished = len(blocks_of(out))
    assert 2 <= finished < BLOCKS
    stored += range(finished)
    goes_on("gptq", model, out, wanted, stored)
