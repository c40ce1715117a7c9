"""`packlight prune` from the command line: what it prints, and that it says what zeros save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.driver import call

from packlight.checkpoint.open import open_checkpoint
from packlight.evidence import LEDGER_NAME, read
from packlight.measure.size import disk_size

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_dense_zeros_save_nothing_and_it_says_so(tiny: Path, out: Path) -> None:
    ended = call("prune", tiny, "--method", "magnitude", "--sparsity", "0.5", "--out", out, "-q")
    assert ended.code == 0, ended.err
    assert "50 % of the weights in the pruned matrices are zero, and the zeros save nothing" in ended.out
    assert "no memory and no time are saved" in ended.out
    assert "the zeros save nothing" in (out / "README.md").read_text()
    for words in ((), ("--markdown",), ("--json",)):
        assert "the zeros save nothing" in call("report", out, *words).out
    # The original is float32, and so is the result where no other dtype is asked for.
    assert disk_size(open_checkpoint(out)) == disk_size(open_checkpoint(tiny))


def test_a_bitmask_saves_what_the_rows_say(tiny: Path, out: Path) -> None:
    words = ("prune", tiny, "--method", "wanda", "--storage", "bitmask", "--windows", 2, "--window", 32)
    ended = call(*words, "--out", out, "--json", "-q")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    rows = {row["name"]: row for row in said["rows"] if row["subject"] == "packed"}
    assert rows["disk_bytes"]["value"] == rows["disk_bytes"]["predicted"] < rows["dense_bytes"]["value"]
    assert rows["sparsity"]["value"] == rows["sparsity"]["predicted"] == 0.5
    assert {"peak_bytes", "prefill_tps", "decode_tps", "proof_tensors"} - rows.keys() <= {"proof_tensors"}
    assert "% less" in said["zeros"] and said["zeros"] in (out / "README.md").read_text()
    assert "import packlight" in (out / "README.md").read_text()


def test_a_bitmask_over_few_zeros_is_larger_and_it_says_so(tiny: Path, out: Path) -> None:
    words = ("prune", tiny, "--method", "magnitude", "--sparsity", "0.01", "--storage", "bitmask")
    ended = call(*words, "--out", out, "-q")
    assert ended.code == 0, ended.err
    assert "% more" in ended.out


def test_the_same_request_again_does_nothing(tiny: Path, out: Path) -> None:
    words = ("prune", tiny, "--method", "magnitude", "--scope", "global", "--out", out)
    assert call(*words).code == 0
    before = (out / LEDGER_NAME).read_bytes()
    again = call(*words)
    assert again.code == 0 and "nothing to do" in again.err
    assert (out / LEDGER_NAME).read_bytes() == before
    assert {row.subject for row in read(out / LEDGER_NAME) if row.name == "decode_tps"} == {"original", "packed"}


@pytest.mark.parametrize(
    ("method", "words"),
    [("blocks", "1 of 2 blocks"), ("flap", "24 of the 128 channels of every MLP")],
)
def test_what_was_removed_is_said_with_what_it_saved(method: str, words: str, tiny: Path, out: Path) -> None:
    ended = call("prune", tiny, "--method", method, "--windows", 2, "--window", 32, "--out", out, "--json", "-q")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    rows = {row["name"]: row for row in said["rows"] if row["subject"] == "packed"}
    assert rows["disk_bytes"]["value"] == rows["disk_bytes"]["predicted"] < rows["whole_bytes"]["value"]
    assert 0 < rows["removed"]["value"] == rows["removed"]["predicted"]
    assert f"of all parameters are gone ({words}): the weight files have" in said["removed"]
    assert "Measured on this machine beside the original as it is stored: peak memory" in said["removed"]
    assert "tokens/s instead of" in said["removed"]
    card = (out / "README.md").read_text()
    assert words in card and "Measured on this machine" not in card and "import packlight" not in card
    assert said["removed"] in call("report", out, "--json").out


@pytest.mark.slow
def test_the_whole_way_with_its_proof(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in: fresh processes load the artifact, without its zeros, as the model that was computed."""
    monkeypatch.undo()
    out = tmp_path / "whole"
    words = ("prune", tiny, "--method", "sparsegpt", "--storage", "bitmask", "--windows", 2, "--window", 32)
    ended = call(*words, "--out", out, "-q")
    assert ended.code == 0, ended.err
    rows = {row.name: row for row in read(out / LEDGER_NAME) if row.subject == "packed"}
    assert {"proof_runtime_kl", "proof_tensors", "proof_transformers_kl"} <= rows.keys()
    assert "with packlight imported" in str(rows["proof_transformers_kl"].note)
    assert call("prove", out, "--json").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blocks", "flap"])
def test_a_smaller_model_is_proved_in_stock_transformers(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    out = tmp_path / "whole"
    ended = call("prune", tiny, "--method", method, "--windows", 2, "--window", 32, "--out", out, "-q")
    assert ended.code == 0, ended.err
    rows = {row.name: row for row in read(out / LEDGER_NAME) if row.subject == "packed"}
    assert {"proof_runtime_kl", "proof_tensors", "proof_transformers_kl"} <= rows.keys()
    assert "with packlight imported" not in str(rows["proof_transformers_kl"].note)
    assert call("prove", out, "--json").code == 0
