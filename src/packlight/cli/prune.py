"""`packlight prune`: set weights to zero or take structures out, and say what that saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json, print_rows, progress, rows_as_json
from packlight.errors import UsageError
from packlight.spec import FLOAT_DTYPES

ZEROS = ("magnitude", "wanda", "sparsegpt")
"""Methods that set single weights to zero."""
STRUCTURED = ("blocks", "flap")
"""Methods whose result is a smaller model."""
METHODS = (*ZEROS, *STRUCTURED)


def prune(
    typed: typer.Context,
    model: options.Model,
    out: options.Out,
    method: Annotated[str, typer.Option("--method", help="magnitude, wanda, sparsegpt, blocks or flap.")] = "sparsegpt",
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            help="Share of zeros in the matrices inside the blocks, of blocks, or of the channels of every MLP; "
            "default: 0.5 or what N:M implies, 0.25 of the blocks, 0.2 of the channels.",
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            help="What the share is counted in: each matrix, each row, all matrices together (magnitude), or N kept of "
            "every M columns; default: as the method was published.",
            metavar="layer|row|global|N:M",
        ),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            help="dense: zeros are stored like other numbers; bitmask: they are left out of the file.",
            metavar="dense|bitmask",
        ),
    ] = "dense",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Another hyper-parameter of the method, such as damping=0.1.", metavar="K=V"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the result: bfloat16, float16 or float32; default: the original's."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Calibration text, or self: text made up by the model.", metavar="FILE|self"),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Windows of calibration text, at most.", min=1)] = 128,
    window: Annotated[int, typer.Option("--window", help="Tokens per window of calibration text.", min=2)] = 512,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Set weights to zero or take whole structures out, prove the result, and measure bytes, memory and speed.

    Zeros in single places save nothing by themselves: dense storage and dense kernels treat them like other numbers.
    With --storage bitmask the file leaves them out. blocks and flap take whole blocks and channels out, and what is
    left is a smaller dense model. How good the result still is, packlight eval says.

    [bold]Examples[/bold]

      packlight prune demo --method sparsegpt --sparsity 0.5 --data my.txt --out build/half

      packlight prune demo --method wanda --scope 2:4 --storage bitmask --out build/2of4

      packlight prune demo --method magnitude --scope global --sparsity 0.3 --out build/small-ones-gone

      packlight prune demo --method blocks --sparsity 0.1 --out build/27-of-30-blocks
    """
    if method not in METHODS:
        raise UsageError(f"there is no pruning method {method!r}: choose one of {', '.join(METHODS)}")
    from packlight.checkpoint.open import read_spec
    from packlight.compress.calibration import CalibrationText, parse_data
    from packlight.compress.registry import build
    from packlight.measure.text import load_text
    from packlight.pipeline import prune as run
    from packlight.report.sparsity import sentences

    # The original's dtype unless another is asked for, so that what zeros save is told apart from what a cast saves.
    stored = read_spec(model).dtype
    dtype = dtype or (stored if stored in FLOAT_DTYPES else "float32")
    given = {"sparsity": sparsity, "dtype": dtype}
    if method in ZEROS:
        given |= {"scope": scope, "storage": storage}
    else:
        options.refuse_typed(typed, method, ("scope", "storage"))
    given = {name: value for name, value in given.items() if value is not None}
    step = build({"method": method, **given, **options.parse_options(option or [])})
    text = CalibrationText(parse_data(data), windows, window)
    with progress(quiet) as shown:
        if step.reading is None:
            options.refuse_typed(typed, method, ("windows", "window"))
            if data is not None:
                load_text(Path(data))
                shown.say(f"{method} reads no text: --data is not used")
        made = run(model, out, step, shown, text, threads)
    said = sentences(made.rows)
    if json:
        print_json({"out": str(made.path), "rows": rows_as_json(made.rows), **said})
        return
    print_rows(made.rows, f"{model} -> {made.path}")
    for sentence in said.values():
        print(sentence)
