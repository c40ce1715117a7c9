"""The ledger: rows arrive whole, come back as they were, and a torn line costs itself only."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from packlight import evidence
from packlight.evidence import Ledger, Measurement

ROWS = [
    Measurement("peak_bytes", 123, "bytes", "packed", predicted=120),
    Measurement("perplexity", 12.5, "1", "packed", spread=0.25, n=511, note="größer"),
    Measurement("proof_transformers_kl", None, "nats", "packed", note="cannot load"),
    Measurement("fits", False, "1", "packed"),
    Measurement("zero", 0, "bytes", "packed", predicted=0, spread=0.0, n=0),
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    ledger = tmp_path / "evidence.jsonl"
    assert evidence.read(ledger) == []
    evidence.append(ledger, ROWS[:2])
    evidence.append(ledger, ROWS[2:])
    assert evidence.read(ledger) == ROWS
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == len(ROWS)


def test_a_line_holds_only_what_is_known(tmp_path: Path) -> None:
    ledger = tmp_path / "evidence.jsonl"
    evidence.append(ledger, [ROWS[0], ROWS[2]])
    first, second = map(json.loads, ledger.read_text().splitlines())
    assert first == {"name": "peak_bytes", "value": 123, "unit": "bytes", "subject": "packed", "predicted": 120}
    assert second["value"] is None  # a failure is a row too


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_come_back(tmp_path: Path, value: float) -> None:
    ledger = tmp_path / "evidence.jsonl"
    evidence.append(ledger, [Measurement("perplexity", value, "1", "packed")])
    (found,) = evidence.read(ledger)
    assert isinstance(found.value, float) and (found.value == value or math.isnan(found.value))


@pytest.mark.parametrize("line", ["\n", "\u2028", "\x85"])
def test_a_note_may_hold_any_line_end(tmp_path: Path, line: str) -> None:
    """Some readers break lines at more characters than a newline."""
    ledger = tmp_path / "evidence.jsonl"
    rows = [Measurement("name", 1, "1", "packed", note=f"before{line}after"), ROWS[0]]
    evidence.append(ledger, rows)
    assert evidence.read(ledger) == rows


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, cut: int) -> None:
    ledger = tmp_path / "evidence.jsonl"
    evidence.append(ledger, ROWS)
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-cut])
    assert evidence.read(ledger) == ROWS[:-1]
    evidence.repair(ledger)
    assert whole.startswith(ledger.read_bytes()) and ledger.read_bytes().endswith(b"\n")
    evidence.append(ledger, ROWS[-1:])
    assert ledger.read_bytes() == whole


def test_a_line_torn_inside_a_character(tmp_path: Path) -> None:
    ledger = tmp_path / "evidence.jsonl"
    evidence.append(ledger, ROWS[:2])
    data = ledger.read_bytes()
    ledger.write_bytes(data[: data.index("ö".encode()) + 1])
    assert Ledger(ledger).rows == ROWS[:1]


def test_repair_leaves_whole_and_absent_files_alone(tmp_path: Path) -> None:
    ledger = tmp_path / "evidence.jsonl"
    evidence.repair(ledger)
    assert not ledger.exists()
    evidence.append(ledger, ROWS)
    before = ledger.read_bytes()
    evidence.repair(ledger)
    assert ledger.read_bytes() == before
    ledger.write_bytes(b'{"na')
    evidence.repair(ledger)
    assert ledger.read_bytes() == b""


def test_a_ledger_knows_its_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "evidence.jsonl"
    first = Ledger(path, threads=2)
    first.add(ROWS[:1])
    assert first.has("peak_bytes", "packed")
    assert not first.has("peak_bytes", "original") and not first.has("perplexity", "packed")
    with path.open("a") as stream:
        stream.write('{"name": "perpl')
    second = Ledger(path, threads=2)
    assert second.rows == first.rows
    second.add(ROWS[1:2])
    assert evidence.read(path) == second.rows and len(second.rows) == 2


def test_every_row_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/packlight", "quantize", "demo"])
    (row,) = evidence.stamped(ROWS[:1], threads=3)
    assert row.command == "packlight quantize demo"
    assert row.commit
    assert row.environment["threads"] == 3 and row.environment["cores"] == os.cpu_count()
    assert row.environment["torch"] and row.environment["cpu"]
    assert (row.name, row.value, row.predicted) == ("peak_bytes", 123, 120)
    assert "/" not in str(row.command)


def test_a_command_does_not_say_where_somebody_keeps_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/home/me/bin/packlight", "fit", "/home/me/model", "--out", "build/x", "--users", "2"]
    )
    assert evidence.command_line() == "packlight fit model --out build/x --users 2"
