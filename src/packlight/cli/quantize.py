"""`packlight quantize`: one method, chosen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from packlight.cli import options
from packlight.cli.output import print_json, print_rows, progress, rows_as_json
from packlight.errors import UsageError
from packlight.plan.layout import Layout

DENSE = ("cast", "rotate")
"""Methods whose result is on no grid."""
PRUNING = ("magnitude", "wanda", "sparsegpt", "blocks", "flap")
"""Methods of another verb."""
GRID_FLAGS = ("bits", "group_size", "symmetric", "embeddings", "scale_bits", "clip")


def quantize(
    typed: typer.Context,
    model: options.Model,
    out: options.Out,
    method: Annotated[str, typer.Option("--method", help="cast, rotate, rtn, hqq, awq, gptq or learned.")] = "rtn",
    bits: Annotated[int, typer.Option("--bits", help="Width of a weight's code: 2 to 8.")] = 4,
    group_size: Annotated[
        str, typer.Option("--group-size", help="Input columns that share a scale, or row.", metavar="N|row")
    ] = "32",
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")] = True,
    embeddings: Annotated[
        int | None,
        typer.Option("--embeddings", help="Bits of input embedding and LM head; default: left alone.", metavar="BITS"),
    ] = None,
    scale_bits: Annotated[
        int | None, typer.Option("--scale-bits", help="Quantize the scales too, to 4 to 8 bits.", metavar="BITS")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="minmax: the whole range of a group; mse: the best range.", metavar="minmax|mse"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Another hyper-parameter of the method, such as act_order=false.", metavar="K=V"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of scales and of what is left alone: bfloat16, float16, float32.")
    ] = "bfloat16",
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="pack-quantized, int-quantized (8 bits) or packlight; default: what holds it."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Calibration text, or self: text made up by the model.", metavar="FILE|self"),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Windows of calibration text, at most.", min=1)] = 128,
    window: Annotated[int, typer.Option("--window", help="Tokens per window of calibration text.", min=2)] = 512,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a checkpoint block by block, and prove the result.

    By default, and on any one grid of 4 or 8 bits, stock transformers loads it; the rest loads after import packlight.

    [bold]Examples[/bold]

      packlight quantize demo --method rtn --bits 4 --group-size 32 --out build/int4

      packlight quantize demo --method gptq --bits 4 --group-size 64 --asymmetric --data my.txt --out build/gptq

      packlight quantize demo --bits 8 --group-size row --embeddings 8 --out build/int8

      packlight quantize demo --method cast --dtype bfloat16 --out build/bf16
    """
    group = options.parse_group(group_size)
    if method in PRUNING:
        raise UsageError(f"{method} prunes and puts no weight on a grid: use packlight prune")
    if method in DENSE:
        options.refuse_typed(typed, method, (*GRID_FLAGS, "layout"))
    if layout not in (None, *get_args(Layout)):
        raise UsageError(f"--layout is one of {', '.join(get_args(Layout))}, not {layout!r}")
    from packlight.compress.calibration import CalibrationText, parse_data
    from packlight.compress.registry import build
    from packlight.measure.text import load_text
    from packlight.pipeline import quantize as run
    from packlight.runtime.loader import LOADERS

    if method in LOADERS:
        raise UsageError(
            f"{method} quantizes while a model is loaded and saves nothing: use eval or generate with {model}@{method}"
        )
    given = {"bits": bits, "group_size": group, "symmetric": symmetric, "embeddings": embeddings, "dtype": dtype}
    given |= {"scale_bits": scale_bits, **({} if clip is None else {"clip": clip})}
    if method in DENSE:
        given = {"dtype": dtype} if method == "cast" or options.is_typed(typed, "dtype") else {}
    step = build({"method": method, **given, **options.parse_options(option or [])})
    text = CalibrationText(parse_data(data), windows, window)
    with progress(quiet) as shown:
        if step.reading is None:
            options.refuse_typed(typed, method, ("windows", "window"))
            if data is not None:
                load_text(Path(data))
                shown.say(f"{method} reads no text: --data is not used")
        made = run(model, out, step, shown, layout, text)  # type: ignore[arg-type]  # checked above
    if json:
        print_json({"out": str(made.path), "rows": rows_as_json(made.rows)})
        return
    print_rows(made.rows, f"{model} -> {made.path}")
