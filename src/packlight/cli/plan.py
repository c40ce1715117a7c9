"""`packlight plan`: what a model would take, from its config and headers alone. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json
from packlight.errors import UsageError


def plan(
    model: Annotated[str | None, typer.Argument(help="As for every verb; a config.json alone is enough.")] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="Rule of thumb from a number of parameters: 70e9, 7B.", metavar="N")
    ] = None,
    context: options.Context = 1024,
    users: options.Users = 1,
    memory: options.Memory = None,
    threads: options.Threads = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Advise on the KV cache for prompts of N tokens.", min=1)
    ] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", help="and answers of N tokens.", min=1)] = None,
    json: options.Json = False,
) -> None:
    """Predict bytes, memory and speed of a model at every precision, without reading its weights.

    [bold]Examples[/bold]

      packlight plan demo --context 1024 --memory 160MB

      packlight plan org/name --users 4 --json

      packlight plan demo --prompt-tokens 256 --new-tokens 64

      packlight plan --params 70e9
    """
    lengths = _lengths(prompt_tokens, new_tokens, context)
    if (model is None) == (params is None):
        raise UsageError("give either a MODEL or --params N")
    if params is not None:
        _thumb(params, json)
        return
    from packlight.checkpoint.open import read_spec
    from packlight.measure.bandwidth import hardware, matmul_flops
    from packlight.plan.plan import make_plan

    assert model is not None
    budget = options.budget(memory, context, users)
    machine = hardware(threads)
    if lengths is not None:
        machine = replace(machine, flops_per_s=matmul_flops(machine.threads))
    made = make_plan(read_spec(model), budget, machine, lengths=lengths)
    if json:
        print_json(made.to_json())
        return
    from packlight.report.plan_table import print_plan

    print_plan(made.to_json())


def _lengths(prompt_tokens: int | None, new_tokens: int | None, context: int) -> tuple[int, int] | None:
    if (prompt_tokens is None) != (new_tokens is None):
        raise UsageError("give --prompt-tokens and --new-tokens together")
    if prompt_tokens is None or new_tokens is None:
        return None
    if prompt_tokens + new_tokens > context:
        raise UsageError(
            f"a prompt of {prompt_tokens} and an answer of {new_tokens} tokens are longer than --context {context}"
        )
    return prompt_tokens, new_tokens


def _thumb(params: str, json: bool) -> None:
    from packlight.plan.thumb import parse_params, thumb_bytes
    from packlight.spec import format_size

    count = parse_params(params)
    sizes = thumb_bytes(count)
    if json:
        print_json({"num_params": count, "bytes": sizes})
        return
    print(f"{count / 1e9:g} billion parameters, weights alone:")
    for dtype, size in sizes.items():
        print(f"  {dtype:<9} {format_size(size):>9}")
    print("scales, KV cache and activations come on top: packlight plan MODEL counts them from a config")
