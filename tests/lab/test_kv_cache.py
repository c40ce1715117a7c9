"""The study of KV caches on the tiny model: real numbers, in their places, and not measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.driver import call

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import MissingExtraError, TargetError
from packlight.evidence import Measurement, read
from packlight.lab import kv_cache as lab
from packlight.lab.kv_cache_figures import draw, growth_table, tables
from packlight.lab.study import Study
from packlight.plan.kv_cache import KINDS
from packlight.runtime.load import load_model


def test_a_step_asks_with_one_vector_and_adds_one_column(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(open_checkpoint(tiny_model_dir()))
    steps = lab.growth(model, 5, 3)
    assert [step.query for step in steps] == [(1, 4, tokens, 16) for tokens in (5, 1, 1, 1)]
    assert [step.keys for step in steps] == [(1, 2, tokens, 16) for tokens in (5, 6, 7, 8)]
    column = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    assert [step.cache_bytes for step in steps] == [tokens * column for tokens in (5, 6, 7, 8)]
    assert growth_table(steps).rows[1] == ("6", "(1, 4, 1, 16)", "(1, 2, 6, 16)", f"{6 * column:,}", f"+{column:,}")


@pytest.fixture(scope="module")
def study(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verb, quick, on the tiny model."""
    out = tmp_path_factory.mktemp("lab") / "kv"
    with pytest.MonkeyPatch.context() as patched:  # six processes would take a minute
        patched.setattr(lab.child, "ask", lambda arguments, request, threads: lab._measure(**request))
        ended = call("lab", "kv-cache", tiny_model_dir(), "--quick", "--context", 200, "--out", out, "--threads", 1)
    assert ended.code == 0, ended.err
    assert ended.out.count("cache,") >= len(KINDS)
    return out


def test_every_question_has_its_rows(study: Path) -> None:
    rows = read(study / "evidence.jsonl")
    found = {(row.name, row.subject): row for row in rows}
    for length in (32, 128):
        assert found["uncached_token_s", f"{length} tokens"].value > 0
        assert found["cached_token_s", f"{length} tokens"].unit == "s"
    assert found["break_even_tokens", "prompt of 1 tokens"].unit == "tokens"
    for kind in KINDS:
        held = found["kv_cache_bytes", f"{kind} cache, 128 tokens"]
        assert held.value == held.predicted > 0
        assert found["peak_bytes", f"{kind} cache, 128 tokens"].predicted > 0
        exact = kind in ("static", "growing", "offloaded")
        assert (found["kl", f"{kind} cache, 128 tokens"].value == pytest.approx(0, abs=1e-6)) is exact
    assert all(row.command and row.commit and row.environment["threads"] == 1 for row in rows)


def test_a_kind_is_measured_in_a_process_of_its_own(tiny_model_dir: Callable[..., Path]) -> None:
    rows = lab.kind(open_checkpoint(tiny_model_dir()), "float32", "int8", 200, 50, 1)
    found = {row.name: row.value for row in rows}
    assert found["peak_bytes"] > 0 and found["cached_token_s"] > 0 and found["kv_cache_bytes"] > 0


def test_the_same_command_measures_nothing_again(study: Path, tiny_model_dir: Callable[..., Path]) -> None:
    before = (study / "evidence.jsonl").read_text()
    words = ["lab", "kv-cache", tiny_model_dir(), "--quick", "--context", 200, "--out", study, "--threads", 1, "--json"]
    ended = call(*words)
    assert (study / "evidence.jsonl").read_text() == before
    assert len(json.loads(ended.out)["rows"]) == len(read(study / "evidence.jsonl"))


def test_the_plot_and_the_tables_are_there(study: Path) -> None:
    drawn = (study / "plot.svg").read_text()
    for words in ("time of one token, ms", "without a cache", "held, planned", "sliding"):
        assert words in drawn
    assert "| static cache, 128 tokens |" in (study / "tables.md").read_text()


def test_medians_add_up_from_token_to_token() -> None:
    assert lab._sums([[1.0, 2.0, 3.0], [2.0, 2.0, 9.0], [9.0, 5.0, 3.0]]) == [2.0, 4.0, 7.0]


def test_an_answer_for_which_no_cache_pays_is_said(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(tiny_model_dir())
    monkeypatch.setattr(lab, "_answer_s", lambda decoder, model, prompt: [1.0] * lab.MOST_NEW)
    (row,) = lab.break_even(load_model(checkpoint), checkpoint, lab.Hardware("cpu", 1, 1, 1), 4, repeats=2)
    assert row.value is None and row.note is not None and row.note.endswith("not within 24 tokens")
    assert tables([row])[0].rows == (("4", "none measured", "–"),)


def test_nothing_measured_draws_an_empty_plot() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, [])
    assert len(figure.axes) == 2
    assert tables([]) == []


# --- studies ----------------------------------------------------------------------------------------------------


def test_a_study_keeps_rows_and_measures_only_what_lacks(tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(subject: str) -> list[Measurement]:
        asked.append(subject)
        return [Measurement("x_s", 1.0, "s", subject)]

    for _ in range(2):
        study = Study(tmp_path / "new" / "study", 1)
        for subject in ("a", "b"):
            study.measure("x_s", subject, lambda: measure(subject))  # noqa: B023 - called at once
    assert asked == ["a", "b"]
    assert [row.subject for row in study.rows] == ["a", "b"]


def test_a_directory_of_something_else_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(TargetError, match="exists and is no study"):
            Study(out, 1)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib, .* pip install 'packlight\[lab\]'"):
        Study(tmp_path / "study", 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--context", "300"], "takes 256 tokens, not 300"),
        (["--context", "10"], "--context"),
        (["--dtype", "int3"], "--dtype is one of"),
    ],
)
def test_bad_flags(tiny_model_dir: Callable[..., Path], tmp_path: Path, flags: list[str], said: str) -> None:
    ended = call("lab", "kv-cache", tiny_model_dir(), "--out", tmp_path / "out", *flags)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1
