"""`packlight lab STUDY`: the studies that explain the techniques, each measured on this machine and plotted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from packlight.cli import options
from packlight.cli.output import print_json, progress
from packlight.errors import TargetError, UsageError
from packlight.evidence import LEDGER_NAME
from packlight.plan.attention import BACKEND_NAMES
from packlight.spec import FLOAT_DTYPES

app = typer.Typer(name="lab", help="Studies that explain the techniques, measured on this machine.")

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Directory of rows, tables and plot; the same one goes on. [default: build/lab/STUDY]"),
]
Quick = Annotated[bool, typer.Option("--quick", help="Short lengths and few repeats, for a first look.")]

PLOT_NAME, TABLE_NAME = "plot.png", "table.md"
NOT_BARE = "flash-attn"
"""The backend that runs inside a model only."""


@app.callback()
def root() -> None:
    """Studies that explain the techniques, measured on this machine."""


@app.command("flash-attention")
def flash_attention(
    model: Annotated[str, typer.Argument(help="As for every verb; its shape and its context count.")] = "demo",
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Tokens of the bare layer: 512,1024,2048.", metavar="N,N,...")
    ] = None,
    prompt_repeats: Annotated[
        str | None,
        typer.Option("--prompt-repeats", help="How often the system prompt is repeated: 1,5,10.", metavar="N,N,..."),
    ] = None,
    backends: Annotated[
        str, typer.Option("--backends", help=f"Which to compare, of {', '.join(BACKEND_NAMES)}.", metavar="NAME,...")
    ] = "eager,flash",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the computation.", metavar="|".join(FLOAT_DTYPES))
    ] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths only: a minute.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the rows, the tables and the plot.", show_default=False)
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="File for the rows alone.", show_default=False)
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time and peak memory of attention over the length of the text, with all scores in memory and without.

    One layer alone, the model with a system prompt repeated more and more often, and the elements that are moved
    between slow and fast memory by count. Rows are written as they are measured: the same command goes on where it was
    interrupted, and passes over what is there.

    [bold]Examples[/bold]

      packlight lab flash-attention --out build/flash

      packlight lab flash-attention org/name --lengths 1024,2048,4096 --prompt-repeats 10,20 --threads 4 --json

      packlight lab flash-attention demo --quick
    """
    if out is not None and ledger is not None:
        raise UsageError("--out DIR holds a ledger of its own: leave --ledger or --out away")
    if dtype not in FLOAT_DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(FLOAT_DTYPES)}, not {dtype!r}")
    compared = _backends(backends)
    asked = None if lengths is None else _numbers("--lengths", lengths)
    repeated = None if prompt_repeats is None else _numbers("--prompt-repeats", prompt_repeats)
    from packlight.checkpoint.open import open_checkpoint
    from packlight.evidence import Ledger
    from packlight.lab import flash_attention as lab
    from packlight.lab import flash_attention_report as report
    from packlight.measure.bandwidth import hardware
    from packlight.runtime.device import choose_device

    if quick:
        asked, repeated = asked or list(lab.QUICK_LENGTHS), repeated or list(lab.QUICK_REPEATS)
    if out is not None:
        report.check_plot()
    threads = hardware(threads, is_probed=False).threads
    checkpoint = open_checkpoint(model)
    study = lab.plan_study(checkpoint, asked, repeated, compared, dtype, threads, choose_device(device))
    with progress(quiet) as shown, _target(out, ledger) as path:
        rows = Ledger(path, threads)
        lab.check_settings(study, rows)
        shown.say(f"{len(study.points)} points; the longest come last")
        tick = shown.stage("measuring", len(study.points))
        lab.run(study, checkpoint, rows, tick)
    if out is not None:
        (out / TABLE_NAME).write_text(report.markdown(rows.rows), encoding="utf-8")
        report.plot(rows.rows, out / PLOT_NAME)
    if json:
        print_json({"model": model, "dtype": dtype, "threads": threads, **report.document(rows.rows)})
        return
    print(report.markdown(rows.rows), end="")
    if out is not None:
        shown.say(f"rows, tables and plot are in {out}")


@app.command("kv-cache")
def kv_cache(
    model: options.Model = "demo",
    context: Annotated[int, typer.Option("--context", help="The longest text, in tokens.", min=64)] = 1024,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Compute dtype; default: as stored.")] = None,
    out: Out = None,
    quick: Quick = False,
    device: options.Device = "cpu",
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
    from packlight.runtime.device import choose_device

    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(FLOAT_DTYPES)}, not {dtype!r}")
    study = Study(out or Path("build/lab/kv-cache"), threads)
    with progress(quiet) as shown:
        steps = run(study, model, context, dtype, quick, threads, shown, choose_device(device))
    shown_tables = [growth_table(steps), *tables(study.rows)]
    study.finish(shown_tables, lambda figure: draw(figure, study.rows))
    if json:
        print_json({"out": str(study.out), "growth": [asdict(step) for step in steps], "rows": _rows(study.rows)})
        return
    for table in shown_tables:
        print(table.text())
    print(f"rows, tables and plot: {study.out}")


@app.command("sparsity")
def sparsity(
    model: options.Model = "demo",
    blocks: Annotated[
        int | None,
        typer.Option("--blocks", help="How many of the model's blocks, evenly spread; default: all.", min=1),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Of text for the divergence, 128 or more; 0 leaves it out.", min=0)
    ] = 512,
    out: Out = None,
    quick: Quick = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measures of sparsity: what each promises, and what each says about compressing a model's matrices.

    Prints which of six properties every measure has, and draws sparsity against compressibility matrix by matrix, and
    how many weights must stay, by the PQ Index's bound and by counting. Another model with the same --out joins in.

    [bold]Examples[/bold]

      packlight lab sparsity

      packlight lab sparsity org/name --blocks 8 --tokens 0 --out build/lab/wide
    """
    from packlight.lab.sparsity_figures import contradictions_table, draw, tables
    from packlight.lab.sparsity_study import run
    from packlight.lab.study import Study

    study = Study(out or Path("build/lab/sparsity"), threads)
    with progress(quiet) as shown:
        run(study, model, blocks, tokens, quick, threads, shown)
    shown_tables = tables(study.rows)
    study.finish([*shown_tables, contradictions_table(study.rows)], lambda figure: draw(figure, study.rows))
    if json:
        print_json({"out": str(study.out), "rows": _rows(study.rows)})
        return
    for table in shown_tables:
        print(table.text())
    print(f"rows, tables with every contradiction, and plot: {study.out}")


def _rows(rows: Any) -> list[dict[str, Any]]:
    return [asdict(replace(row, environment={})) for row in rows]


def _numbers(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < len(word) < 10 for word in words):
        raise UsageError(f"{option} takes numbers with commas between them such as 512,1024, not {text!r}")
    return [int(word) for word in words]


def _backends(text: str) -> list[str]:
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    known = [name for name in BACKEND_NAMES if name != NOT_BARE]
    if wrong := [name for name in names if name not in known]:
        raise UsageError(f"--backends has no {wrong[0]!r}: give some of {', '.join(known)}")
    return names


@contextmanager
def _target(out: Path | None, ledger: Path | None) -> Iterator[Path]:
    """The ledger to write to; without a place for it one that is gone afterwards."""
    if out is None and ledger is None:
        with TemporaryDirectory() as scratch:
            yield Path(scratch) / LEDGER_NAME
        return
    if out is not None:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / LEDGER_NAME).is_file())):
            raise TargetError(f"{out} exists and holds no {LEDGER_NAME}: choose another --out")
        ledger = out / LEDGER_NAME
    assert ledger is not None
    if ledger.is_dir():
        raise TargetError(f"{ledger} is a directory: --ledger takes a file")
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a"):
            pass
    except OSError as error:
        raise TargetError(f"{ledger} cannot be written: {error.strerror}") from error
    yield ledger
