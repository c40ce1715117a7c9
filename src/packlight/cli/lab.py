"""`packlight lab`: the studies that explain the techniques, each with its rows, its tables and its plot."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from packlight.cli import options
from packlight.cli.output import print_json, progress
from packlight.errors import UsageError

app = typer.Typer(name="lab", help="Studies that explain the techniques, measured here.", no_args_is_help=True)

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Directory of rows, tables and plot; the same one goes on. [default: build/lab/STUDY]"),
]
Quick = Annotated[bool, typer.Option("--quick", help="Short lengths and few repeats, for a first look.")]


@app.command("kv-cache")
def kv_cache(
    model: options.Model = "demo",
    context: Annotated[int, typer.Option("--context", help="The longest text, in tokens.", min=64)] = 1024,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Compute dtype; default: as stored.")] = None,
    out: Out = None,
    quick: Quick = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What a KV cache holds, costs and saves, and when it pays.

    [bold]Examples[/bold]

      packlight lab kv-cache

      packlight lab kv-cache build/demo --context 2048 --out build/lab/long
    """
    from packlight.lab.kv_cache_figures import draw, growth_table, tables
    from packlight.lab.kv_cache_study import run
    from packlight.lab.study import Study
    from packlight.spec import FLOAT_DTYPES

    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(FLOAT_DTYPES)}, not {dtype!r}")
    study = Study(out or Path("build/lab/kv-cache"), threads)
    with progress(quiet) as shown:
        steps = run(study, model, context, dtype, quick, threads, shown)
    shown_tables = [growth_table(steps), *tables(study.rows)]
    study.finish(shown_tables, lambda figure: draw(figure, study.rows))
    if json:
        print_json({"out": str(study.out), "growth": [asdict(step) for step in steps], "rows": _rows(study.rows)})
        return
    for table in shown_tables:
        print(table.text())
    print(f"rows, tables and plot: {study.out}")


def _rows(rows: Any) -> list[dict[str, Any]]:
    return [asdict(replace(row, environment={})) for row in rows]
