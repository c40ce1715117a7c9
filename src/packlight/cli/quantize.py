"""`packlight quantize`: one method, chosen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json, print_rows, progress, rows_as_json
from packlight.errors import UsageError


def quantize(
    typed: typer.Context,
    model: options.Model,
    out: options.Out,
    method: Annotated[str, typer.Option("--method", help="cast or rtn.")] = "rtn",
    bits: Annotated[int, typer.Option("--bits", help="Width of a weight's code: 8 or 4.")] = 4,
    group_size: Annotated[
        str, typer.Option("--group-size", help="Input columns that share a scale, or row.", metavar="N|row")
    ] = "32",
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")] = True,
    embeddings: Annotated[
        int | None,
        typer.Option("--embeddings", help="Bits of input embedding and LM head; default: left alone.", metavar="BITS"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of scales and of what is left alone: bfloat16, float16, float32.")
    ] = "bfloat16",
    layout: Annotated[
        str, typer.Option("--layout", help="pack-quantized, or int-quantized for 8 bits.")
    ] = "pack-quantized",
    data: Annotated[Path | None, typer.Option("--data", help="Calibration text, for methods that read one.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a checkpoint block by block into a directory that stock transformers loads, and prove it.

    [bold]Examples[/bold]

      packlight quantize demo --method rtn --bits 4 --group-size 32 --out build/int4

      packlight quantize demo --bits 8 --group-size row --embeddings 8 --out build/int8

      packlight quantize demo --method cast --dtype bfloat16 --out build/bf16
    """
    group = options.parse_group(group_size)
    if method == "cast":
        _refuse_typed(typed, "cast", ("bits", "group_size", "symmetric", "embeddings", "layout"))
    if layout not in ("pack-quantized", "int-quantized"):
        raise UsageError(f"--layout is pack-quantized or int-quantized, not {layout!r}")
    from packlight.compress.registry import build
    from packlight.measure.text import load_text
    from packlight.pipeline import quantize as run

    given = {"bits": bits, "group_size": group, "symmetric": symmetric, "embeddings": embeddings, "dtype": dtype}
    step = build({"method": method, **({"dtype": dtype} if method == "cast" else given)})
    with progress(quiet) as shown:
        if data is not None and not step.needs_inputs:
            load_text(data)
            shown.say(f"{method} reads no text: --data is not used")
        made = run(model, out, step, shown, "int-quantized" if layout == "int-quantized" else "pack-quantized")
    if json:
        print_json({"out": str(made.path), "rows": rows_as_json(made.rows)})
        return
    print_rows(made.rows, f"{model} -> {made.path}")


def _refuse_typed(typed: typer.Context, method: str, names: tuple[str, ...]) -> None:
    """Raises UsageError for a flag that was given and that the method would pass over in silence."""
    for name in names:
        source = typed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{method} takes no --{name.replace('_', '-')}")
