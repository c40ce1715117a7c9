"""`packlight report`: what an artifact's ledger says, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json, print_rows, rows_as_json
from packlight.errors import CheckpointError


def report(
    directory: Annotated[Path, typer.Argument(help="An artifact that packlight saved.", metavar="DIR")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    json: options.Json = False,
) -> None:
    """Show what was measured when an artifact was made, beside what had been predicted.

    [bold]Examples[/bold]

      packlight report build/demo

      packlight report build/demo --markdown
    """
    from packlight.evidence import LEDGER_NAME, read
    from packlight.report.sparsity import sentences

    try:
        rows = read(directory / LEDGER_NAME)
    except (ValueError, TypeError, NotADirectoryError) as error:
        raise CheckpointError(f"{directory / LEDGER_NAME} is damaged ({error}): make the artifact again") from error
    if not rows:
        raise CheckpointError(f"{directory} holds no {LEDGER_NAME}: give an artifact that packlight saved")
    said = sentences(rows)
    if json:
        first = rows[0]
        machine = {"command": first.command, "commit": first.commit, "environment": dict(first.environment)}
        print_json({"artifact": str(directory), **machine, "rows": rows_as_json(rows), **said})
        return
    if markdown:
        from packlight.report.table import markdown_table

        print(markdown_table(rows), end="")
        for sentence in said.values():
            print(f"\n{sentence}")
        return
    print_rows(rows, str(directory))
    for sentence in said.values():
        print(sentence)
    text = next((row.note for row in rows if row.name == "perplexity"), None)
    if text:
        print(f"text: {text}")
    print(f"made by: {rows[-1].command} (packlight {rows[-1].commit})")
