"""`fit` from a budget to an artifact: a grid for every matrix, one for all, or none, and what is told about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli import stand_ins
from tests.cli.conftest import save_llama
from tests.cli.driver import Ended, assert_one_sentence, assert_refused, call, contents
from tests.runtime.architectures import save_architecture

from packlight.checkpoint.open import open_checkpoint
from packlight.checkpoint.shards import SINGLE_NAME
from packlight.compress import sensitivity
from packlight.evidence import LEDGER_NAME, Measurement, read
from packlight.measure import bandwidth
from packlight.plan.layout import artifact_bytes
from packlight.plan.memory import runtime_bytes
from packlight.plan.recipes import MEMORY_MARGIN
from packlight.report.spending import spending
from packlight.runtime.load import load_model
from packlight.spec import Budget, Grid, Precision, format_size, parse_size

SMALL: tuple[object, ...] = ("--context", 32, "--window", 32, "--tokens", 128, "--windows", 3)
"""No memory yet: that is what the tests are about."""
MEASURED_ON = "Kutuzov slept, and nobody dared to wake him before the council had come to its end. " * 5
WEIGHING, WEIGHTING, MAKING_UP = "what every matrix costs", "which tokens matter", "making up calibration text"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def stand_in(patched: pytest.MonkeyPatch) -> None:
    """Neither children nor a probe."""
    stand_ins.put_in(patched.setattr)
    patched.setattr(bandwidth, "memory_bandwidth", lambda *arguments: 1e10)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this file's own: what matrices cost is found once."""
    with pytest.MonkeyPatch.context() as patched:
        directory = tmp_path_factory.mktemp("cache")
        patched.setenv("PACKLIGHT_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its weights, not the overheads, decide: about 1 MB in bfloat16."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64}
    return save_llama(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True, **sizes)


def words(model: Path, out: Path, memory: str, *flags: object) -> list[object]:
    """The command line; quality is measured on a short text, which is sooner tokenized."""
    data = model.parent / "measured_on.txt"
    data.write_text(MEASURED_ON)
    return ["fit", model, *SMALL, "--data", data, "--memory", memory, *flags, "--out", out]


def fit(model: Path, out: Path, memory: str, *flags: object) -> Ended:
    return call(*words(model, out, memory, *flags))


@pytest.fixture(scope="module")
def least(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The least budget that is met, as the refusal of a smaller one names it."""
    ended = fit(model, tmp_path_factory.mktemp("none") / "out", "1kB", "-q")
    said = re.search(r"allow (\S+ \S+) or more", ended.err)
    assert said is not None, ended.err
    return parse_size(said.group(1))


@pytest.fixture(scope="module")
def tight(least: int) -> str:
    """A budget that forces a mix: a little more than the least."""
    return f"{least + 60_000}B"


@dataclass(frozen=True)
class Fitted:
    """An artifact and what its making said."""

    path: Path
    ended: Ended
    rows: list[Measurement]
    config: dict[str, Any]
    recipe: dict[str, Any]


def fitted(model: Path, out: Path, memory: str, *flags: object) -> Fitted:
    ended = fit(model, out, memory, *flags)
    assert ended.code == 0, ended.err
    config = json.loads((out / "config.json").read_text())
    return Fitted(out, ended, read(out / LEDGER_NAME), config, yaml.safe_load((out / "recipe.yaml").read_text()))


@pytest.fixture(scope="module")
def mixed(model: Path, tight: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """What `fit` makes by default where memory is tight, with its table."""
    with pytest.MonkeyPatch.context() as patched:
        stand_in(patched)
        return fitted(model, tmp_path_factory.mktemp("mixed") / "out", tight, "--explain")


def same_but_for_the_ledger(first: Path, second: Path) -> None:
    a, b = contents(first, [LEDGER_NAME]), contents(second, [LEDGER_NAME])
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def test_a_tight_budget_gives_every_matrix_its_grid(mixed: Fitted, model: Path) -> None:
    packed, original = open_checkpoint(mixed.path), open_checkpoint(model)
    stored = packed.spec.stored
    assert stored is not None
    assert mixed.config["quantization_config"]["quant_method"] == "packlight"
    assert len({stored.grid_of(t) for t in packed.spec.quantizable}) > 1
    assert (mixed.path / SINGLE_NAME).stat().st_size == artifact_bytes(original.spec, stored)
    assert mixed.recipe["steps"][0]["method"] == "gptq"
    load_model(packed)
    for stage in ("probing", WEIGHING, "chose ", WEIGHTING, "compressing block by block (gptq)", "proving"):
        assert stage in mixed.ended.err
    assert "the promise is kept" in mixed.ended.out


def test_the_table_is_the_ledger(mixed: Fitted, model: Path) -> None:
    """Every line of the table, and its sums, are those of the rows; the rows name the grids of the artifact."""
    rows = {row.subject: row for row in mixed.rows if row.name == "predicted_kl"}
    whole = rows.pop("packed")
    matrices = {t.name: t for t in open_checkpoint(model).spec.tensors if t.kind != "other"}
    assert rows.keys() == matrices.keys()
    stored = open_checkpoint(mixed.path).spec.stored
    assert stored is not None
    for name, row in rows.items():
        assert row.note is not None
        assert Grid.parse(row.note.partition(",")[0]) == stored.grid_of(matrices[name])
    assert sum(row.value for row in rows.values()) == pytest.approx(whole.value)  # type: ignore[misc]
    spent = spending(mixed.rows)
    assert sum(one.nats for one in spent) == pytest.approx(whole.value)
    assert whole.note is not None
    assert f"{sum(one.nbytes for one in spent)} bytes in memory" in whole.note
    assert f"{sum(one.count for one in spent)} matrices" in whole.note
    table = mixed.ended.out[mixed.ended.out.index("predicted nats") :]
    lines = [" ".join(line.split()) for line in table.splitlines()]
    for one in spent:
        wanted = f"{one.role} {one.grid} {one.count} {format_size(one.nbytes)} {one.nats:.4f}"
        assert wanted in lines
    total = sum(one.nbytes for one in spent)
    assert f"all {len(matrices)} {format_size(total)} {whole.value:.4f}" in lines
    assert [row.predicted for row in mixed.rows if row.name == "kl" and row.subject == "packed"] == [whole.value]


def test_what_was_bought_keeps_to_the_budget(mixed: Fitted, tight: str) -> None:
    promised = next(row.predicted for row in mixed.rows if row.name == "peak_bytes" and row.subject == "packed")
    assert promised is not None
    assert promised <= parse_size(tight)


def test_more_memory_is_predicted_to_lose_less(model: Path, mixed: Fitted, least: int, tmp_path: Path) -> None:
    """And the second budget does not ask again what matrices cost: it is in the cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sensitivity, "sensitivity", lambda *a, **k: pytest.fail("asked again what matrices cost"))
        more = fitted(model, tmp_path / "out", f"{least + 160_000}B")
    losses = [
        next(row.value for row in made.rows if row.name == "predicted_kl" and row.subject == "packed")
        for made in (mixed, more)
    ]
    assert losses[1] < losses[0]  # type: ignore[operator]


def test_a_stage_that_the_cache_spares_is_not_announced(model: Path, mixed: Fitted, least: int, tmp_path: Path) -> None:
    ended = fit(model, tmp_path / "out", f"{least + 80_000}B")
    assert ended.code == 0
    assert WEIGHTING not in ended.err
    assert WEIGHING not in ended.err


def test_uniform_is_what_transformers_loads(model: Path, least: int, tmp_path: Path) -> None:
    said = re.search(r"allow (\S+ \S+) or more", fit(model, tmp_path / "none", "1kB", "--uniform").err)
    assert said is not None
    assert parse_size(said.group(1)) > least, "its smallest grid is 4 bits wide"
    made = fitted(model, tmp_path / "out", said.group(1), "--uniform", "--explain")
    quantization = made.config["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    assert len(quantization["config_groups"]) == 1
    stored = open_checkpoint(made.path).spec.stored
    assert stored is not None and stored.tensors == () and len(stored.grids) == 1
    assert WEIGHING not in made.ended.err
    assert "nothing was weighed" in made.ended.out
    assert not [row for row in made.rows if row.name == "predicted_kl"]


def test_a_large_budget_leaves_the_model_as_it_is(model: Path, tmp_path: Path) -> None:
    made = fitted(model, tmp_path / "out", "1GB", "--explain")
    assert made.recipe["steps"] == [{"method": "cast", "dtype": "float32"}]
    assert "quantization_config" not in made.config
    assert "nothing was weighed" in made.ended.out
    for stage in (WEIGHING, WEIGHTING, "calibration:"):
        assert stage not in made.ended.err
    assert next(row.value for row in made.rows if row.name == "kl" and row.subject == "packed") < 1e-6


def test_a_budget_between_goes_to_bfloat16(model: Path, tmp_path: Path) -> None:
    needed = runtime_bytes(open_checkpoint(model).spec, Precision("bfloat16"), Budget(context=32)).total
    made = fitted(model, tmp_path / "out", f"{int(needed * MEMORY_MARGIN) + 1}B", "-q")
    assert made.recipe["steps"] == [{"method": "cast", "dtype": "bfloat16"}]


@pytest.mark.parametrize("method", ["rtn", "learned"])
def test_other_methods(method: str, model: Path, tight: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("All happy families are alike. " * 20)
    made = fitted(
        model, tmp_path / "out", tight, "--method", method, "--explain", "--calibration", tmp_path / "mine.txt"
    )
    assert made.recipe["calibration"]["text"] == "mine.txt"
    assert made.recipe["steps"][0]["method"] == method
    reads_text = method == "learned"
    assert (WEIGHTING in made.ended.err) is ("calibration:" in made.ended.err) is reads_text
    assert bool([row for row in made.rows if row.name == "calibration_tokens"]) is reads_text
    assert "predicted nats" in made.ended.out


def test_a_method_that_cannot_be_fitted(model: Path, tight: str, tmp_path: Path) -> None:
    for method in ("nosuch", "cast"):
        assert_refused(words(model, tmp_path / "out", tight, "-q", "--method", method), tmp_path, says=method)


def test_text_that_the_model_makes_up(model: Path, tight: str, tmp_path: Path) -> None:
    made = fitted(model, tmp_path / "a", tight, "--calibration", "self")
    assert MAKING_UP in made.ended.err
    assert made.recipe["calibration"]["text"] == "text made up by the model"
    assert made.recipe["calibration"]["sha256"] is None
    note = next(row.note for row in made.rows if row.name == "calibration_tokens")
    assert note is not None and "made up by the model" in note
    again = fitted(model, tmp_path / "b", tight, "--calibration", "self", "-q")
    same_but_for_the_ledger(made.path, again.path)


def test_bad_calibration_text(model: Path, tight: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.dat").write_bytes(bytes(range(256)) * 10)
    for name, says in (
        ("nowhere.txt", "there is no text file"),
        ("short.txt", "less than one window"),
        ("binary.dat", "not UTF-8"),
        (".", "is a directory"),
    ):
        argv = words(model, tmp_path / "out", tight, "-q", "--calibration", tmp_path / name)
        assert_refused(argv, tmp_path, says=says)


@pytest.mark.parametrize("flags", [["--windows", "0"], ["--windows", "many"], ["--calibration", ""]], ids=str)
def test_bad_flags(flags: list[str], model: Path, tight: str, tmp_path: Path) -> None:
    assert_refused(words(model, tmp_path / "out", tight, "-q", *flags), tmp_path)


def test_a_budget_that_nothing_meets(model: Path, least: int, tmp_path: Path) -> None:
    """The smallest choice is named, and the budget that the sentence asks for is met."""
    for flags, smallest in (([], "int2-g32-asym"), (["--uniform"], "int4-row-sym"), (["--method", "rtn"], "int2")):
        argv = words(model, tmp_path / "out", "2kB", "-q", *flags)
        assert_refused(argv, tmp_path, code=3, says=f"no recipe fits: the smallest, {smallest}")
    made = fitted(model, tmp_path / "out", f"{least}B", "-q")
    assert {step["bits"] for step in made.recipe["steps"]} == {2}


def test_twice_gives_the_same_bytes(model: Path, tight: str, mixed: Fitted, tmp_path: Path) -> None:
    """Whatever the directory, and whether anything comes from the cache."""
    again = fitted(model, tmp_path / "somewhere else" / "b", tight, "-q")
    same_but_for_the_ledger(mixed.path, again.path)


def test_the_same_command_again_shows_the_table_again(mixed: Fitted, model: Path, tight: str) -> None:
    again = fit(model, mixed.path, tight, "--explain")
    assert again.code == 0
    assert again.out == mixed.ended.out
    assert "nothing to do" in " ".join(again.err.split())
    for flags in (["--method", "rtn"], ["--uniform"], ["--calibration", "self"], ["--windows", 2]):
        assert_one_sentence(fit(model, mixed.path, tight, "-q", *flags), says="exists already")


def test_json_holds_what_was_bought(mixed: Fitted, model: Path, tight: str) -> None:
    document = json.loads(fit(model, mixed.path, tight, "--json", "--explain").out)
    assert document["promise_kept"] is True
    rows = [row for row in document["rows"] if row["name"] == "predicted_kl"]
    assert len(rows) == 1 + len([t for t in open_checkpoint(model).spec.tensors if t.kind != "other"])


def test_another_architecture(tmp_path: Path) -> None:
    """Positions that are learned, biases and norms with biases."""
    save_architecture("opt", tmp_path / "opt")
    said = re.search(r"allow (\S+ \S+) or more", fit(tmp_path / "opt", tmp_path / "out", "1kB", "-q").err)
    assert said is not None
    made = fitted(tmp_path / "opt", tmp_path / "out", said.group(1), "-q")
    assert made.config["quantization_config"]["quant_method"] == "packlight"
    load_model(open_checkpoint(made.path))


@pytest.mark.parametrize(("name", "says"), [("gpt2", "Conv1D"), ("gpt_neox", "other names")])
def test_architectures_that_cannot_be_quantized(name: str, says: str, tmp_path: Path) -> None:
    """The sentence that `quantize --method rtn` says, before anything is weighed."""
    save_architecture(name, tmp_path / name)
    said = re.search(r"allow (\S+ \S+) or more", fit(tmp_path / name, tmp_path / "out", "1kB", "-q").err)
    assert said is not None
    assert_one_sentence(fit(tmp_path / name, tmp_path / "out", said.group(1), "-q"), says=says)


def test_names_that_no_text_can_pass_through(tmp_path: Path) -> None:
    save_architecture("gpt_neox", tmp_path / "model")
    argv = ["quantize", tmp_path / "model", "-q", "--windows", 2, "--window", 32, "--out", tmp_path / "out"]
    assert_refused([*argv, "--method", "gptq"], tmp_path, says="other names")
