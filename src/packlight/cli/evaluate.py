"""`packlight eval`: any number of checkpoints on the same tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from packlight.cli import options
from packlight.cli.output import print_json, print_rows, progress
from packlight.errors import UsageError
from packlight.evidence import Measurement

COLUMNS = {
    "disk_bytes": "bytes",
    "bits_per_weight": "bits_per_weight",
    "peak_bytes": "peak_bytes",
    "perplexity": "perplexity",
    "kl": "kl",
    "top1": "top1",
    "prefill_tps": "prefill_tps",
    "decode_tps": "decode_tps",
}
"""Names of a ledger's rows, and of the fields of `--json`."""


def evaluate(
    models: Annotated[list[str], typer.Argument(help="The first is the reference.", metavar="MODEL...")],
    data: options.Data = None,
    context: options.Window = 512,
    tokens: options.Tokens = 8192,
    method: options.Loader = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile each model first; pays for long texts only.")
    ] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare checkpoints: size, peak memory, perplexity, KL and top-1 agreement with the first, speed.

    Text, number of tokens and windows are printed; every checkpoint sees the same ones. MODEL@bnb-int8 and
    MODEL@bnb-nf4 are quantized by bitsandbytes while they are loaded; --method says it for all but the first. Nothing
    is saved, and their bytes are those in memory.

    [bold]Examples[/bold]

      packlight eval demo build/demo

      packlight eval original/ packed/ --data mine.jsonl.gz --context 1024 --tokens 65536 --json

      packlight eval demo demo@bnb-int8 demo@bnb-nf4 build/demo
    """
    from packlight.pipeline import Yardstick
    from packlight.pipeline import evaluate as run
    from packlight.runtime.loader import with_loader

    if method is not None and len(models) == 1:
        raise UsageError(f"--method is for every MODEL but the first: write {models[0]} twice, or MODEL@{method}")
    models = [*models[:1], *(with_loader(model, method) for model in models[1:])]
    with progress(quiet) as shown:
        compared = run(models, Yardstick(data, context, tokens), shown, threads, compile)
    if json:
        rows = [_fields(model, compared.rows[place]) for place, model in enumerate(models)]
        print_json({"text": compared.text, "tokens": compared.num_tokens, "context": compared.context, "rows": rows})
        return
    print_rows([row for rows in compared.rows for row in rows], "the first is the reference")
    print(f"text: {compared.text}")
    for row in (row for rows in compared.rows for row in rows if row.name == "disk_bytes" and row.note):
        print(f"{row.subject}: {row.note}")


def _fields(model: str, rows: list[Measurement]) -> dict[str, Any]:
    found = {row.name: row for row in rows}
    fields: dict[str, Any] = {"model": model}
    for name, field in COLUMNS.items():
        fields[field] = found[name].value
        if name == "perplexity":
            fields["perplexity_stderr"] = found[name].spread
    return fields
