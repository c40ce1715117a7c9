"""The study of sparsity on the tiny model: real numbers, in their places, and not measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.driver import call

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, UsageError
from packlight.evidence import Measurement, read
from packlight.lab import sparsity as lab
from packlight.lab import sparsity_properties as properties
from packlight.lab.sparsity_figures import (
    by_model,
    contradictions_table,
    draw,
    gaussian,
    properties_table,
    spearman,
    tables,
)
from packlight.measure.quality import evaluate
from packlight.ops.sparsity import gini, num_needed, pq_index, tail_ratio
from packlight.runtime.load import load_model

UP = "model.layers.0.mlp.up_proj.weight"
LACKS = {
    "PQ Index 0.5, 1": set(),
    "PQ Index 1, 2": set(),
    "Gini": set(),
    "Hoyer": {"Cloning", "Babies"},
    "soft sparsity 0.5": {"Cloning", "Babies"},
    "PQ Index 0.2, 0.8": {"Robin Hood"},
    "PQ Index 2, 4": {"Robin Hood"},
    "l2 / l1": {"Cloning", "Babies"},
    "kurtosis": {"Robin Hood", "Cloning", "Babies"},
    "entropy of energy": {"Robin Hood", "Cloning", "Babies"},
    "share of zeros": {"Robin Hood", "Rising Tide", "Bill Gates"},
    "share below 0.5": {"Robin Hood", "Scaling", "Rising Tide", "Bill Gates", "Babies"},
    "-l1": {"Robin Hood", "Scaling", "Cloning", "Bill Gates", "Babies"},
    "-l0.5": {"Scaling", "Cloning", "Bill Gates", "Babies"},
    "-log": {"Robin Hood", "Scaling", "Cloning", "Bill Gates", "Babies"},
}
"""Each of these follows from the formula by hand; that the others hold is what the search cannot prove."""


# --- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", properties.MEASURES, ids=lambda measure: measure.name)
def test_the_search_finds_what_a_measure_lacks_and_nothing_else(measure: properties.Measure) -> None:
    found = properties.search(measure, trials=250)
    assert {one.property for one in found if one.contradictions} == LACKS[measure.name]
    assert all((one.first is None) == (one.contradictions == 0) for one in found)


def test_a_contradiction_says_which_vectors_and_what_they_were_given() -> None:
    hoyer = next(measure for measure in properties.MEASURES if measure.name == "Hoyer")
    found = properties._contradiction(hoyer, (1.0, 0.0), (1.0, 0.0, 0.0, 0.0), "rises")
    assert found == "(1, 0) → (1, 0 × 3): 1 → 1, stays"
    assert properties._contradiction(hoyer, (2.0, 1.0), (2.0, 1.0, 0.0), "rises") is None


def test_a_measure_that_falls_where_it_should_stay_is_seen() -> None:
    size = properties.Measure("size", "-d", lambda w: torch.tensor(-float(w.shape[-1])))
    found = {one.property: one.contradictions for one in properties.search(size, trials=20)}
    assert found["Cloning"] == found["Babies"] == 20 and found["Scaling"] == 0


# --- matrices --------------------------------------------------------------------------------------------------------


def test_the_matrices_of_some_blocks(tiny_model_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir())
    every = [tensor.name for tensor in lab.matrices(checkpoint)]
    assert len(every) == 2 * 7 + 2 and not any("norm" in name for name in every)
    one = [tensor.name for tensor in lab.matrices(checkpoint, 1)]
    assert {lab.block_of(name) for name in one} == {None, 0} and len(one) == 9
    assert lab._spread(range(30), 4) == {0, 10, 19, 29}
    assert lab._spread(range(3), 8) == {0, 1, 2}
    with pytest.raises(UsageError, match="at least one block"):
        lab.matrices(checkpoint, 0)


def test_what_is_measured_on_a_matrix(tiny_model_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir())
    w = load_file(tiny_model_dir() / "model.safetensors")[UP].flatten()
    rows = {row.name: row for row in lab.measured(checkpoint, UP, "tiny: up")}
    assert rows["pq_index_1_2"].value == pytest.approx(float(pq_index(w, 1, 2)))
    assert rows["gini"].value == pytest.approx(float(gini(w)))
    assert rows["soft_sparsity_0.5"].value < 0
    for kept in lab.KEPT:
        row = rows[kept.name]
        number = round(row.value * len(w))
        assert row.predicted <= row.value and row.n == len(w)
        assert float(tail_ratio(w, number, kept.p)) <= kept.eta < float(tail_ratio(w, number - 1, kept.p))


@pytest.mark.slow
def test_a_packed_matrix_is_measured_as_what_it_stands_for(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    assert call("quantize", tiny_model_dir(), "--bits", "4", "--out", out, "-q").code == 0
    packed = open_checkpoint(out)
    exact, found = lab.weights(open_checkpoint(tiny_model_dir()), UP), lab.weights(packed, UP)
    assert found.shape == exact.shape
    assert 0 < float((found.float() - exact).abs().max()) < 0.1
    monkeypatch.setattr("packlight.lab.sparsity_study.QUICK_TRIALS", 4)
    ended = call("lab", "sparsity", out, "--quick", "--out", tmp_path / "study", "--threads", 1)
    assert ended.code == 0 and "packed is quantized" in ended.err
    assert not any(row.name == lab.HALF for row in read(tmp_path / "study" / "evidence.jsonl"))


def test_a_matrix_that_the_model_has_not_is_a_row_without_a_value(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(open_checkpoint(tiny_model_dir()))
    row = lab.divergence(model, "other.weight", [[1, 2]], lab.dense_reference(model, [[1, 2]]), "tiny: other")
    assert row.value is None and row.note is not None and "no dense matrix" in row.note


def test_half_of_a_matrix_is_zeroed_and_comes_back(tiny_model_dir: Callable[..., Path]) -> None:
    windows = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    model = load_model(open_checkpoint(tiny_model_dir()))
    reference = lab.dense_reference(model, windows)
    row = lab.divergence(model, UP, windows, reference, "tiny: up")
    assert isinstance(row.value, float) and row.value > 1e-5 and row.n == 10
    assert evaluate(model, windows, reference, lambda: None).kl == pytest.approx(0, abs=1e-9)
    # The same by hand, on another copy of the model.
    other = load_model(open_checkpoint(tiny_model_dir()))
    weight = other.get_parameter(UP)
    with torch.no_grad():
        weight[weight.abs() < weight.abs().median()] = 0
    assert evaluate(other, windows, reference, lambda: None).kl == pytest.approx(row.value, rel=0.05)


def test_a_head_is_zeroed_in_the_model_and_not_in_the_reference(tiny_model_dir: Callable[..., Path]) -> None:
    """Tied or not: with the reference's head zeroed too, the divergence of an untied one would be 0."""
    for tied, name in ((False, "lm_head.weight"), (True, "model.embed_tokens.weight")):
        model = load_model(open_checkpoint(tiny_model_dir(tied=tied)))
        head = model.get_output_embeddings()
        reference = lab.dense_reference(model, [[1, 2, 3]])
        before, seen = head.weight.detach().clone(), []
        handle = head.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))  # noqa: B023 - at once
        row = lab.divergence(model, name, [[1, 2, 3]], reference, "head")
        handle.remove()
        assert row.value > 1e-4
        assert int(((seen[0] == 0) & (before != 0)).sum()) >= before.numel() // 2 - 64  # the padding token's were 0
        assert torch.equal(head.weight, before) and torch.equal(reference.head.weight, before)


def test_of_equal_magnitudes_half_goes_too() -> None:
    assert len(lab.smaller_half(torch.ones(3, 3))) == 4
    assert set(lab.smaller_half(torch.tensor([[3.0, -1.0], [0.5, -4.0]])).tolist()) == {1, 2}


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verb, quick, on the tiny model; then again on a tied one, which joins in."""
    out = tmp_path_factory.mktemp("lab") / "sparsity"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("packlight.lab.sparsity_study.QUICK_TRIALS", 40)
        for model in (tiny_model_dir(), renamed(tiny_model_dir(tied=True), out.parent / "tied")):
            ended = call("lab", "sparsity", model, "--quick", "--tokens", 256, "--out", out, "--threads", 1)
            assert ended.code == 0, ended.err
    assert "Which measure has which property" in ended.out and "half of a matrix zeroed" in ended.err
    return out


def renamed(directory: Path, name: Path) -> Path:
    shutil.copytree(directory, name)
    return name


def test_every_question_has_its_rows(study: Path) -> None:
    rows = read(study / "evidence.jsonl")
    models = by_model(rows)
    assert {model: len(matrices) for model, matrices in models.items()} == {"tiny": 16, "tied": 15}
    for matrices in models.values():
        for values in matrices.values():
            assert values[lab.HALF] > 0 and values.keys() >= {*lab.MEASURES, *(kept.name for kept in lab.KEPT)}
    assert len([row for row in rows if row.name.startswith("against_")]) == 6 * len(properties.MEASURES)
    assert all(row.command and row.commit and row.environment["threads"] == 1 for row in rows)


def test_the_same_command_measures_nothing_again(study: Path, tiny_model_dir: Callable[..., Path]) -> None:
    before = (study / "evidence.jsonl").read_text()
    words = ["lab", "sparsity", tiny_model_dir(), "--quick", "--tokens", 256, "--out", study, "--threads", 1, "--json"]
    ended = call(*words)
    assert (study / "evidence.jsonl").read_text() == before
    assert len(json.loads(ended.out)["rows"]) == len(read(study / "evidence.jsonl"))


def test_the_plot_and_the_tables_are_there(study: Path) -> None:
    drawn, text = (study / "plot.svg").read_text(), (study / "tables.md").read_text()
    for words in ("PQ Index 0.5, 1", "must stay, counted", "KL, smaller half zeroed", "tied"):
        assert words in drawn
    for words in ("| Hoyer | yes | yes | yes | no | yes |", "**tied, medians**", "| up_proj | 2 |", "Contradictions"):
        assert words in text


def test_without_text_the_model_is_never_loaded(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packlight.lab.sparsity_study.load_model", None)
    monkeypatch.setattr("packlight.lab.sparsity_study.QUICK_TRIALS", 4)
    out = tmp_path / "out"
    assert call("lab", "sparsity", tiny_model_dir(), "--quick", "--tokens", 0, "--out", out, "-q").code == 0
    assert not any(row.name == lab.HALF for row in read(out / "evidence.jsonl"))
    assert "| – |" in (out / "tables.md").read_text()


def test_no_bound_is_above_its_count(study: Path) -> None:
    rows = [row for row in read(study / "evidence.jsonl") if row.name.startswith("kept_")]
    assert len(rows) == 31 * len(lab.KEPT)
    assert all(0 < row.predicted <= row.value <= 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--blocks", "0"], "--blocks"),
        (["--tokens", "100"], "100 tokens are less than one window of 128"),
        (["--tokens", "-1"], "--tokens"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bad_flags(tiny_model_dir: Callable[..., Path], tmp_path: Path, flags: list[str], said: str) -> None:
    ended = call("lab", "sparsity", tiny_model_dir(), "--out", tmp_path / "out", *flags)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_rows_of_another_text_or_model_are_not_mixed(
    study: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    ended = call("lab", "sparsity", tiny_model_dir(), "--quick", "--tokens", 128, "--out", study)
    assert ended.code == 2 and "measured tiny on 254 positions, not 127" in ended.err and ended.err.count("\n") == 1
    other = renamed(tiny_model_dir(tied=True), tmp_path / "tiny")
    ended = call("lab", "sparsity", other, "--quick", "--tokens", 256, "--out", study)
    assert ended.code == 2 and "holds another model that is called tiny" in ended.err and ended.err.count("\n") == 1


def test_a_damaged_matrix_is_named(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    broken = renamed(tiny_model_dir(), tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state[UP][3, 3] = float("nan")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight of .* holds an infinity or NaN"):
        list(lab.measured(open_checkpoint(broken), UP, "broken: up"))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_rank_correlation_needs_numbers_that_vary() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [5, 4, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_gaussian_numbers_have_what_is_said_of_them() -> None:
    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    known = gaussian()
    for name in ("pq_index_0.5_1", "pq_index_1_2", "gini", "hoyer"):
        assert float(lab.MEASURES[name](w)) == pytest.approx(known[name], abs=2e-3)
    kept = lab.KEPT[-1]
    assert int(num_needed(w, kept.lost, kept.p)) / len(w) == pytest.approx(known[kept.name], abs=2e-3)


def test_nothing_measured_draws_an_empty_plot() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, [])
    assert len(figure.axes) == 9
    assert tables([]) == []


def test_what_was_contradicted_is_listed() -> None:
    rows = [Measurement(properties.row_name(name), 0, "vectors", "Gini", n=9) for name in properties.PROPERTIES]
    hoyer = [Measurement(properties.row_name(name), 0, "vectors", "Hoyer", n=9) for name in properties.PROPERTIES]
    hoyer[3] = Measurement("against_cloning", 7, "vectors", "Hoyer", n=9, note="these")
    assert properties_table([*rows, *hoyer]).rows == (
        ("Gini", *["yes"] * 6),
        ("Hoyer", "yes", "yes", "yes", "no", "yes", "yes"),
    )
    assert contradictions_table([*rows, *hoyer]).rows == (("Hoyer", "Cloning", "7 of 9", "these"),)
