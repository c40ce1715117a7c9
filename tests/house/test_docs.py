"""README and docs say what is in the repository: tables come from committed evidence, links and verbs exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from packlight.evidence import read
from packlight.report.table import markdown_by_subject, markdown_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_TABLES = ("README.md", "docs/quantization.md", "docs/compiled.md")
TABLE = re.compile(r"<!-- (table|subjects): (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_every_table_is_what_its_evidence_says() -> None:
    pages = {
        page: (ROOT / page).read_text(encoding="utf-8")
        for page in ("README.md", "docs/quantization.md", "docs/compiled.md")
    }
    tables = [(page, *found) for page, text in pages.items() for found in TABLE.findall(text)]
    assert {page for page, *_ in tables} == set(pages)
    for page, kind, ledger, table in tables:
        write = markdown_table if kind == "table" else markdown_by_subject
        assert table == write(read(ROOT / ledger)), f"{page}: make the table of {ledger} again"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/quantization.md", "docs/compiled.md"]
)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([\w./-]+)\)|`((?:src|tests|docs|benchmarks|evidence)/[\w./-]+)`", text)
    for link, path in named:
        found = (ROOT / page).parent / link if link else ROOT / path
        assert found.exists(), f"{page} names {link or path}"


def test_every_verb_is_in_the_readme() -> None:
    from packlight.cli.main import app

    for command in app.registered_commands:
        assert re.search(rf"packlight {command.name}\b|make {command.name}\b", README), command.name
