"""The order of the rooms: what is chosen, what is claimed, what is judged, and what a comparison refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.conftest import change_config, save_llama
from tests.cli.stand_ins import put_in
from tests.conftest import TinyModel

from packlight import pipeline
from packlight.checkpoint.open import read_spec
from packlight.compress.registry import build
from packlight.errors import BudgetError, CheckpointError
from packlight.evidence import Measurement
from packlight.pipeline import Silent, Yardstick, choose, evaluate, fit, predictions, quantize, step_options
from packlight.plan.memory import runtime_bytes
from packlight.plan.recipes import candidates
from packlight.spec import Budget, Hardware, KernelRate, ModelSpec, Precision

RATE = KernelRate(1e9, 1e-5, 1e10)
MACHINE = Hardware("test", 2, 2, 10**10, 1e10, dict.fromkeys(pipeline.KERNELS, RATE))


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def spec(tiny_model_dir: TinyModel) -> ModelSpec:
    return read_spec(tiny_model_dir())


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch.setattr)


def test_every_candidate_has_a_step_that_gives_it(spec: ModelSpec) -> None:
    for precision in candidates(spec):
        assert build(step_options(precision, spec)).precision == precision, precision


def test_choose_takes_the_least_loss_within_the_budget(spec: ModelSpec) -> None:
    """More memory is never answered with more loss, and the choice keeps to the budget."""
    losses = []
    for memory in range(2_700_000, 3_700_000, 50_000):
        chosen = choose(spec, Budget(memory, 64), MACHINE)
        assert chosen.memory.total <= memory
        losses.append(chosen.loss_proxy)
    assert losses == sorted(losses, reverse=True)
    assert choose(spec, Budget(None, 64), MACHINE).precision == Precision("float32")


def test_choose_names_the_smallest(spec: ModelSpec) -> None:
    with pytest.raises(BudgetError, match=r"the smallest, int4-row-sym.* for 3 users: needs .* allow .* or more"):
        choose(spec, Budget(1000, 64, 3), MACHINE)
    with pytest.raises(BudgetError, match=r"for 1 user: decodes .* asked for$"):
        choose(spec, Budget(None, 64, min_tps=1e9), MACHINE)


def test_predictions_are_those_of_the_plan(spec: ModelSpec) -> None:
    claims = predictions(spec, Precision("bfloat16"), Budget(None, 64), MACHINE)
    assert claims["peak_bytes"] == runtime_bytes(spec, Precision("bfloat16"), Budget(None, 64)).total
    assert claims.keys() == {"peak_bytes", "decode_tps", "prefill_tps"}
    blind = replace(MACHINE, rates={}, bandwidth_bytes_per_s=None)
    assert predictions(spec, Precision("bfloat16"), Budget(None, 64), blind).keys() == {"peak_bytes"}


@pytest.mark.parametrize(
    ("budget", "missed"),
    [
        (Budget(), ()),
        (Budget(1_000_000, min_tps=50, max_loss_pct=10.1), ()),
        (Budget(999_999), ("it needs 1 MB and 1 MB were allowed",)),
        (Budget(min_tps=51), ("it decodes 50 tokens/s and 51 were asked for",)),
        (Budget(max_loss_pct=9.9), ("its perplexity is 10 % higher and 9.9 % were allowed",)),
    ],
)
def test_a_result_is_judged_by_what_was_measured(budget: Budget, missed: tuple[str, ...], tmp_path: Path) -> None:
    rows = [
        Measurement("perplexity", 20.0, "1", "original", note="a text"),
        Measurement("perplexity", 22.0, "1", "packed", note="a text"),
        Measurement("peak_bytes", 1_000_000, "bytes", "packed"),
        Measurement("decode_tps", 50.0, "tokens/s", "packed"),
    ]
    made = pipeline._judged(tmp_path, rows, budget)
    assert made.missed == missed
    assert made.is_promise_kept == (not missed)
    assert made.text == "a text"


def test_fit_tells_its_choice_and_goes_on_from_a_finished_artifact(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    heard = Heard()
    yardstick = Yardstick(window=32, tokens=64)
    first = fit(str(tiny_model_dir()), tmp_path / "out", Budget(3_000_000, 32), yardstick, heard)
    assert any(line.startswith("chose ") for line in heard.lines)
    heard.lines.clear()
    again = fit(str(tiny_model_dir()), tmp_path / "out", Budget(3_000_000, 32), yardstick, heard)
    assert again.rows == first.rows
    assert len(heard.lines) == 1
    assert "nothing to do" in heard.lines[0]


def test_what_no_probe_can_change_is_said_before_the_probe(
    tiny_model_dir: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "probe", lambda *arguments: pytest.fail("probed"))
    with pytest.raises(BudgetError):
        fit(str(tiny_model_dir()), tmp_path / "out", Budget(1000, 32), Yardstick(window=32, tokens=64), Silent())


def test_the_ledger_holds_the_error_of_every_block(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    made = quantize(str(tiny_model_dir()), tmp_path / "out", build({"method": "rtn"}), Silent())
    errors = [row.subject for row in made.rows if row.name == "relative_error"]
    assert errors == ["embedding", "model.layers.0", "model.layers.1", "head"]
    assert made.text is None
    assert made.is_promise_kept


def test_the_shortest_context_decides_the_windows_of_a_comparison(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    short = save_llama(tmp_path / "short", max_position_embeddings=64)
    compared = evaluate([str(tiny_model_dir()), str(short)], Yardstick(window=512, tokens=256), Silent())
    assert (compared.context, compared.num_tokens) == (64, 256)


def test_a_model_is_the_same_as_itself(tiny_model_dir: TinyModel) -> None:
    model = str(tiny_model_dir())
    compared = evaluate([model, model], Yardstick(window=32, tokens=256), Silent())
    first, second = ({row.name: row.value for row in rows} for rows in compared.rows)
    assert second["kl"] == pytest.approx(0, abs=1e-6)
    assert second["top1"] == 1
    assert first["perplexity"] == second["perplexity"]


def test_vocabularies_that_differ_are_refused_before_anything_is_measured(
    tiny_model_dir: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_llama(tmp_path / "other", vocab_size=260)
    monkeypatch.setattr(pipeline, "load_with", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="256 and 260 tokens"):
        evaluate([str(tiny_model_dir()), str(other)], Yardstick(window=32, tokens=64), Silent())


def test_a_model_of_an_unknown_kind_is_refused_by_every_way_in(tmp_path: Path) -> None:
    model = change_config(save_llama(tmp_path / "model"), model_type="nosuch")
    with pytest.raises(CheckpointError, match="nosuch"):
        fit(str(model), tmp_path / "out", Budget(), Yardstick(), Silent())
    with pytest.raises(CheckpointError, match="nosuch"):
        quantize(str(model), tmp_path / "out", build({"method": "rtn"}), Silent())
    with pytest.raises(CheckpointError, match="nosuch"):
        evaluate([str(model)], Yardstick(), Silent())
    assert not (tmp_path / "out").exists()
