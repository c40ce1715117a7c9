"""`packlight export`: write a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json, progress, rows_as_json
from packlight.export.registry import FORMATS, build_format

_NAMES = ", ".join(sorted(FORMATS))


def export(
    model: options.Model,
    to: Annotated[str, typer.Option("--to", help=f"The format: {_NAMES}.", metavar="FORMAT", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Where to write; it must not exist yet.", show_default=False)],
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens per sequence, prompt and answer together.", min=1)
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences at the same time.", min=1)] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of what is not packed, and of the computation.", show_default=False)
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint in another format, and prove in a fresh process that it answers the same.

    compiled: prefill and decode, compiled ahead of time, which a new process loads in a second. It fits this version
    of torch and CPUs with this one's instructions.

    [bold]Examples[/bold]

      packlight export demo --to compiled --out build/demo-compiled

      packlight export build/demo --to compiled --out build/small --context 512 --json
    """
    chosen = build_format(to, {"context": context, "batch": batch, "dtype": dtype})
    from packlight.checkpoint.save import refuse_existing

    refuse_existing(out)
    import torch

    from packlight.checkpoint.open import open_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    with progress(quiet) as shown:
        rows = chosen.write(open_checkpoint(model), out, shown.stage)
    if json:
        print_json({"out": str(out), "to": to, "rows": rows_as_json(rows)})
        return
    for row in rows:
        value = f"{row.value:.3g}" if isinstance(row.value, float) else row.value
        print(f"{row.name:<18} {value} {row.unit}{'' if row.note is None else f'  ({row.note})'}")
    print(f"{model} -> {out}")
