"""`packlight fit`: from a budget in the user's units to a proved artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import complain, print_json, print_rows, print_spending, progress, rows_as_json


def fit(
    model: options.Model,
    out: options.Out,
    memory: Annotated[
        str, typer.Option("--memory", help="What the model may add to the process: 160MB (10^6) or 1GiB.")
    ],
    context: options.Context = 1024,
    users: options.Users = 1,
    min_tps: Annotated[
        float | None, typer.Option("--min-tps", help="Decode tokens per second that one user must see.")
    ] = None,
    max_loss: Annotated[
        str | None, typer.Option("--max-loss", help="Allowed rise of perplexity over the original, in percent.")
    ] = None,
    data: options.Data = None,
    window: Annotated[int, typer.Option("--window", help="Tokens per window of the text.", min=2)] = 512,
    tokens: options.Tokens = 8192,
    method: Annotated[
        str, typer.Option("--method", help="What rounds the weights: rtn, hqq, awq, gptq or learned.")
    ] = "gptq",
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="One grid for all blocks, which stock transformers loads without packlight."),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="Text to calibrate on, or self: made up by the model; default: another part of the bundled text.",
            metavar="FILE|self",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", help="Windows of 512 tokens of calibration text, at most.", min=1)
    ] = 16,
    explain: Annotated[bool, typer.Option("--explain", help="Print what was bought with which bytes.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the best recipe for a budget, apply it, measure the result beside the prediction, and prove it.

    Exits 3 where no recipe fits, or where the finished artifact misses what was asked. The same command again goes on
    where it was cut short, and shows the result where it is finished.

    [bold]Examples[/bold]

      packlight fit demo --memory 160MB --context 1024 --out build/demo

      packlight fit demo --memory 130MB --explain --out build/small

      packlight fit org/name --memory 6GiB --context 8192 --users 4 --min-tps 10 --max-loss 5 --out fitted
    """
    asked = options.budget(memory, context, users, min_tps, options.parse_max_loss(max_loss))
    from packlight.compress.calibration import CalibrationText, parse_data
    from packlight.pipeline import Strategy, Yardstick
    from packlight.pipeline import fit as run

    strategy = Strategy(method, uniform, CalibrationText(parse_data(calibration), windows))
    with progress(quiet) as shown:
        made = run(model, out, asked, Yardstick(data, window, tokens), shown, threads, strategy)
    if json:
        print_json(
            {
                "out": str(made.path),
                "promise_kept": made.is_promise_kept,
                "missed": list(made.missed),
                "text": made.text,
                "rows": rows_as_json(made.rows),
            }
        )
    else:
        print_rows(made.rows, f"{model} -> {made.path}")
        print(f"text: {made.text}")
        if explain:
            print_spending(made.rows)
        print("the promise is kept" if made.is_promise_kept else "the promise is missed")
    if not made.is_promise_kept:
        complain(f"{made.path} is finished and proved, but {'; '.join(made.missed)}")
        raise typer.Exit(3)
