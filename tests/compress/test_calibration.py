"""The calibration text: the user's, the bundled one, the model's own; in memory or on disk it gives the same blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyModel

from packlight import pipeline
from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress import calibration as under_test
from packlight.compress import run as compress
from packlight.compress.calibration import WINDOWS_NAME, CalibrationText, Prepared, parse_data, prepare
from packlight.compress.registry import build
from packlight.compress.walk import Calibration, WalkResult
from packlight.errors import TextError, UsageError
from packlight.measure.text import calibration_text, load_text
from packlight.plan.memory import stream_bytes
from packlight.runtime.tokenizer import load_tokenizer

IDS = list(range(1, 40))
GPTQ: dict[str, Any] = {"method": "gptq", "bits": 3, "guided": False}
ASYMMETRIC = GPTQ | {"asymmetry": 0.5}
"""Reads all three streams of hidden states."""


class Heard(pipeline.Silent):
    """Remembers what it was told, stages too."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, label: str, total: int) -> Callable[[], None]:
        self.lines.append(label)
        return lambda: None

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline.proof, "prove", lambda *arguments: iter(()))


@pytest.fixture
def checkpoint(tiny_model_dir: TinyModel) -> Checkpoint:
    return open_checkpoint(tiny_model_dir())


def quiet() -> None:
    return None


def blocks_of(
    checkpoint: Checkpoint, calibration: Calibration, work: Path, options: dict[str, Any] = GPTQ
) -> dict[str, bytes]:
    """Every finished block of a GPTQ job by its bytes, and the logits at the end."""
    step, result = build(options), WalkResult()
    list(compress.run(step, checkpoint, work, "packlight", IDS, calibration, result))
    assert result.proof_logits is not None
    found = {path.name: path.read_bytes() for path in compress.block_files(work)}
    return found | {"logits": result.proof_logits.numpy().tobytes()}


@pytest.mark.parametrize(("options", "names"), [(GPTQ, {"inputs"}), (ASYMMETRIC, {"inputs", "exact", "targets"})])
def test_hidden_states_on_disk_give_the_same_bytes(
    options: dict[str, Any], names: set[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = {}
    for on_disk in (False, True):
        work = tmp_path / str(on_disk)
        text = prepare(checkpoint, CalibrationText(windows=5, window=32, on_disk=on_disk), build(options).reading)
        assert text.size.on_disk is on_disk
        calibration, _ = text.ready(work, quiet)
        found[on_disk] = blocks_of(checkpoint, calibration, work / "blocks", options)
        streams = list((work / "activations").glob("*")) if on_disk else []
        assert {path.stem for path in streams} == (names if on_disk else set())
        assert sum(path.stat().st_size for path in streams) == (stream_bytes(checkpoint.spec, text.size) * on_disk)
    assert found[True] == found[False]
    assert len(found[True]) == checkpoint.spec.num_layers + 3


def test_what_an_earlier_job_left_on_disk_does_not_matter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = prepare(checkpoint, CalibrationText(windows=3, window=32, on_disk=True), build(ASYMMETRIC).reading)
    wanted = blocks_of(checkpoint, text.ready(tmp_path / "a", quiet)[0], tmp_path / "a" / "blocks", ASYMMETRIC)
    calibration, _ = text.ready(tmp_path / "b", quiet)
    for name in ("inputs", "exact", "targets"):
        calibration.allocate(name, checkpoint.spec.hidden_size).fill_(torch.nan)
    assert blocks_of(checkpoint, calibration, tmp_path / "b" / "blocks", ASYMMETRIC) == wanted


def test_hidden_states_go_to_disk_where_memory_is_short(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CalibrationText(windows=4, window=32)
    needed = stream_bytes(checkpoint.spec, prepare(checkpoint, asked).size)
    for share, wanted in ((0.9, True), (1.1, False)):
        free = int(needed * share / under_test.SHARE_OF_FREE_RAM)
        monkeypatch.setattr(under_test, "free_ram_bytes", lambda free=free: free)
        assert prepare(checkpoint, asked).size.on_disk is wanted
    monkeypatch.setattr(under_test, "free_ram_bytes", lambda: 0)
    assert not prepare(checkpoint, CalibrationText(windows=4, window=32, on_disk=False)).size.on_disk


def test_where_hidden_states_are_is_no_part_of_the_request(checkpoint: Checkpoint) -> None:
    asked = [prepare(checkpoint, CalibrationText(windows=4, on_disk=on_disk)).asked() for on_disk in (True, False)]
    assert asked[0] == asked[1]


def made_up(checkpoint: Checkpoint) -> Prepared:
    return prepare(checkpoint, CalibrationText("self", windows=3, window=20))


def test_text_that_the_model_makes_up(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every job, of the size that was asked for, kept beside the job's blocks and not made twice."""
    text = made_up(checkpoint)
    assert text.windows is None and text.sha256 is None
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ticks: list[int] = []
    first, _ = text.ready(tmp_path / "a", lambda: ticks.append(1))
    second, _ = made_up(checkpoint).ready(tmp_path / "b", quiet)
    assert first.windows == second.windows
    assert ticks
    assert [len(window) for window in first.windows] == [20, 20, 20]
    assert all(0 <= token < checkpoint.spec.vocab_size for window in first.windows for token in window)
    assert first.windows[0] != first.windows[1]
    assert json.loads((tmp_path / "a" / WINDOWS_NAME).read_text()) == first.windows
    monkeypatch.setattr(under_test, "sample_windows", lambda *arguments: pytest.fail("made twice"))
    again, _ = made_up(checkpoint).ready(tmp_path / "a", lambda: pytest.fail("made twice"))
    assert again.windows == first.windows


def test_half_written_text_is_made_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / WINDOWS_NAME).with_suffix(".part").write_text("[[1, 2")
    calibration, _ = made_up(checkpoint).ready(tmp_path, quiet)
    assert [len(window) for window in calibration.windows] == [20, 20, 20]
    assert {path.name for path in tmp_path.iterdir()} == {WINDOWS_NAME}


def test_the_recipe_says_how_made_up_text_was_drawn(checkpoint: Checkpoint) -> None:
    asked = made_up(checkpoint).asked()
    assert asked == {"text": "text made up by the model", "sha256": None, "windows": 3, "window": 20, "seed": 0}


@pytest.mark.parametrize("kind", ["bundled", "file", "self"])
def test_the_row_of_evidence_names_the_text_and_its_tokens(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 20)
    data = {"bundled": None, "file": file, "self": "self"}[kind]
    text = prepare(checkpoint, CalibrationText(data, windows=3, window=32))
    (tmp_path / "work").mkdir()
    calibration, row = text.ready(tmp_path / "work", quiet)
    digest = hashlib.sha256(json.dumps(calibration.windows).encode()).hexdigest()
    assert (row.name, row.value, row.unit, row.subject) == ("calibration_tokens", 96, "1", "packed")
    assert row.note is not None and digest in row.note and "3 windows of 32 tokens" in row.note
    if kind != "self":
        content = calibration_text().content if kind == "bundled" else file.read_text()
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        assert sha256[:12] in row.note
        assert text.asked()["sha256"] == sha256
        ids = load_tokenizer(checkpoint)(content, add_special_tokens=False, verbose=False)["input_ids"]
        assert [token for window in calibration.windows for token in window] == ids[:96]


def test_a_text_shorter_than_one_window(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(TextError, match="less than one window of 32"):
        prepare(checkpoint, CalibrationText(tmp_path / "short.txt", windows=3, window=32))


def test_a_text_of_fewer_windows_than_were_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a" * 100)
    text = prepare(checkpoint, CalibrationText(tmp_path / "some.txt", windows=9, window=32))
    assert text.windows is not None and len(text.windows) == text.size.windows == text.asked()["windows"] == 3


def test_windows_are_no_longer_than_the_models_context(checkpoint: Checkpoint) -> None:
    longest = checkpoint.spec.max_context
    for data in (None, "self"):
        text = prepare(checkpoint, CalibrationText(data, windows=2, window=10 * longest))  # type: ignore[arg-type]
        assert text.size.window == longest
        assert text.windows is None or [len(window) for window in text.windows] == [longest, longest]


@pytest.mark.parametrize("sizes", [{"windows": 0}, {"windows": -1}, {"window": 1}, {"window": 0}])
def test_sizes_that_calibrate_nothing(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least one window of 2 tokens"):
        CalibrationText(**sizes)


def test_what_a_user_writes() -> None:
    assert parse_data(None) is None
    assert parse_data("self") == "self"
    assert parse_data("mine.txt") == Path("mine.txt")
    assert parse_data("./self") == Path("self")


def test_the_bundled_calibration_text_is_not_what_quality_is_measured_on() -> None:
    """Not one paragraph of the first quarter, which is measured by default, is in it."""
    whole, text = load_text().content, calibration_text().content
    assert text in whole
    assert whole.index(text) >= len(whole) // 4
    assert whole.count(text) == 1
    first = [part for part in whole[: len(whole) // 4].split("\n\n") if len(part) > 60]
    assert len(first) > 100
    assert not [part for part in first if part in text]


@pytest.mark.parametrize(("on_disk", "place"), [(True, "on disk"), (False, "in memory")])
def test_where_hidden_states_are_is_said_before_the_first_block(
    on_disk: bool, place: str, tiny_model_dir: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, text = Heard(), CalibrationText(windows=3, window=32, on_disk=on_disk)
    enter = compress.walk

    def walk(*arguments: Any) -> Any:
        heard.lines.append("the walk begins")
        return enter(*arguments)

    monkeypatch.setattr(compress, "walk", walk)
    made = pipeline.quantize(str(tiny_model_dir()), tmp_path / "out", build(GPTQ), heard, calibration=text)
    said = next(line for line in heard.lines if line.startswith("calibration: "))
    assert said.endswith(f"of hidden states, {place}")
    assert "3 windows of 32 tokens" in said
    assert heard.lines.index(said) < heard.lines.index("the walk begins")
    assert [row.value for row in made.rows if row.name == "calibration_tokens"] == [96]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
