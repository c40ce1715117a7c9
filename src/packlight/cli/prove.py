"""`packlight prove`: load an artifact back and compare it with what was recorded when it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json, progress, rows_as_json
from packlight.errors import CheckpointError


def prove(
    directory: Annotated[Path, typer.Argument(help="An artifact that packlight saved.", metavar="DIR")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Load an artifact in fresh processes, with packlight and with stock transformers, and compare the answers.

    Exits 1 where it is not the model that was computed.

    [bold]Example[/bold]

      packlight prove build/demo
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory: give an artifact that packlight saved")
    from packlight.measure.proof import PROOF_NAME
    from packlight.pipeline import prove as run

    if not (directory / PROOF_NAME).is_file():
        raise CheckpointError(f"{directory} holds no {PROOF_NAME}: give an artifact that packlight saved")
    with progress(quiet) as shown:
        tick = shown.stage(f"proving {directory} in fresh processes", 1)
        rows = run(directory)
        tick()
    if json:
        print_json({"artifact": str(directory), "proved": True, "rows": rows_as_json(rows)})
        return
    for row in rows:
        value = f"{row.value:.3g}" if isinstance(row.value, float) else row.value
        print(
            f"{row.name:<22} {'not checked' if value is None else value} {row.unit if value is not None else ''}"
            f"{'' if row.note is None else f'  ({row.note})'}"
        )
    print(f"{directory} is the model that was computed")
