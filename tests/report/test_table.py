from __future__ import annotations

import io

from rich.console import Console

from packlight.evidence import Measurement
from packlight.report.table import markdown_table, rich_table, side_by_side

LEDGER = [
    Measurement("disk_bytes", 269_060_552, "bytes", "original"),
    Measurement("bits_per_weight", 16.0, "bits", "original"),
    Measurement("peak_bytes", 330_000_000, "bytes", "original", predicted=300_000_000),
    Measurement("perplexity", 21.3456, "1", "original", spread=0.4321),
    Measurement("decode_tps", 40.25, "tokens/s", "original", predicted=42.0, spread=0.5),
    Measurement("weight_error", 0.01, "1", "model.layers.0.mlp.up_proj"),
    Measurement("disk_bytes", 84_000_000, "bytes", "packed"),
    Measurement("bits_per_weight", 5.0, "bits", "packed"),
    Measurement("base_bytes", 250_000_000, "bytes", "packed"),
    Measurement("perplexity", 99.0, "1", "packed"),
    Measurement("perplexity", 23.0, "1", "packed", spread=0.5),
    Measurement("kl", 0.03125, "nats", "packed"),
    Measurement("top1", 0.8765, "1", "packed"),
    Measurement("prefill_tps", 1234.5, "tokens/s", "packed", predicted=1300),
    Measurement("decode_tps", None, "tokens/s", "packed", note="the child process ended early"),
]


def test_side_by_side() -> None:
    table = side_by_side(LEDGER)
    assert table.subjects == ("original", "packed")
    assert dict(table.rows) == {
        "bytes on disk": ("269 MB", "84 MB"),
        "bits per weight": ("16", "5"),
        "peak memory (predicted, difference)": ("330 MB (300 MB, +10.0 %)", "–"),
        "interpreter and torch, apart": ("–", "250 MB"),
        "perplexity ± standard error": ("21.35 ± 0.43", "23 ± 0.5"),
        "KL to the original, nats (predicted)": ("–", "0.03125"),
        "top-1 agreement": ("–", "87.6 %"),
        "prefill, tokens/s (predicted)": ("–", "1,234 (1,300)"),
        "decode, tokens/s (predicted)": ("40.25 ± 0.5 (42)", "failed"),
    }


def test_markdown() -> None:
    lines = markdown_table(LEDGER, ["kl", "disk_bytes"]).splitlines()
    assert lines == [
        "|  | original | packed |",
        "|---|---:|---:|",
        "| bytes on disk | 269 MB | 84 MB |",
        "| KL to the original, nats (predicted) | – | 0.03125 |",
    ]


def test_markdown_keeps_a_bar_in_a_name_out_of_the_columns() -> None:
    assert "a\\|b" in markdown_table([Measurement("kl", 0, "nats", "a|b")])


def test_rich_table_says_the_same_and_takes_brackets_literally() -> None:
    stream = io.StringIO()
    rows = [*LEDGER, Measurement("kl", 0.5, "nats", "[red]x")]
    Console(file=stream, width=200).print(rich_table(rows, title="demo"))
    printed = stream.getvalue()
    assert "[red]x" in printed
    for label, cells in side_by_side(rows).rows:
        (line,) = (line for line in printed.splitlines() if label in line)
        assert all(cell in line for cell in cells)


def test_values_that_are_no_numbers_and_an_empty_ledger() -> None:
    rows = [Measurement("perplexity", float("nan"), "1", "x"), Measurement("kl", "not asked", "nats", "x")]
    assert dict(side_by_side(rows, ["perplexity", "kl"]).rows) == {
        "perplexity ± standard error": ("nan",),
        "KL to the original, nats (predicted)": ("not asked",),
    }
    assert side_by_side([]).subjects == ()
    assert side_by_side([]).rows == ()
