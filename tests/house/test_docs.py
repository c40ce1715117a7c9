"""README and docs say what is in the repository: tables come from committed evidence, links and verbs exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from packlight.evidence import Measurement, read
from packlight.lab import flash_attention_report, kv_cache_figures, sparsity_figures
from packlight.plan.attention import BACKENDS
from packlight.report.plain import PlainTable
from packlight.report.table import markdown_by_subject, markdown_rows, markdown_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


def in_markdown(*tables: PlainTable) -> str:
    """One below the other."""
    return "\n".join(table.markdown() for table in tables)


TABLE = re.compile(
    r"<!-- (table|subjects|rows|kv-cache|flash-attention|sparsity-\w+): (\S+) -->\n(.*?)<!-- end -->", re.DOTALL
)
WRITERS: dict[str, Callable[[list[Measurement]], str]] = {
    "table": markdown_table,
    "subjects": markdown_by_subject,
    "rows": markdown_rows,
    "kv-cache": lambda rows: in_markdown(*kv_cache_figures.tables(rows)),
    "flash-attention": flash_attention_report.markdown,
    "sparsity-properties": lambda rows: in_markdown(
        sparsity_figures.properties_table(rows), sparsity_figures.contradictions_table(rows)
    ),
    "sparsity-matrices": lambda rows: in_markdown(*sparsity_figures.matrix_tables(rows)),
}


def test_every_table_is_what_its_evidence_says() -> None:
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    tables = [(page, *found) for page, text in pages.items() for found in TABLE.findall(text)]
    assert {kind for _, kind, *_ in tables} == set(WRITERS)
    for page, kind, ledger, table in tables:
        assert table == WRITERS[kind](read(ROOT / ledger)), f"{page}: make the table of {ledger} again"


def test_the_attention_backends_are_those_of_the_code() -> None:
    text = (ROOT / "docs/attention.md").read_text(encoding="utf-8")
    assert f"<!-- backends -->\n{backends_table()}<!-- end -->" in text


def backends_table() -> str:
    """The table of the page."""
    lines = ["| name | what it is | what it refuses |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.summary} | {each.refuses} |" for each in BACKENDS]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([\w./-]+)\)|`((?:src|tests|docs|benchmarks|evidence)/[\w./-]+)`", text)
    for link, path in named:
        found = (ROOT / page).parent / link if link else ROOT / path
        assert found.exists(), f"{page} names {link or path}"


def test_every_verb_is_in_the_readme() -> None:
    from packlight.cli.main import app

    groups = [group.typer_instance.info.name for group in app.registered_groups if group.typer_instance]
    for name in [*(command.name for command in app.registered_commands), *groups]:
        assert re.search(rf"packlight {name}\b|make {name}\b", README), name
