"""`packlight generate`: ask a model something."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import print_json
from packlight.errors import UsageError

MAX_SEED = 2**32
"""Seeds below this one are all that anybody needs, and torch takes them."""


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask, put into the model's chat template.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of the answer, at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    method: options.Loader = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Stream an answer to stdout.

    [bold]Examples[/bold]

      packlight generate build/demo --prompt "What is the capital of France?"

      packlight generate demo --prompt "Once upon a time" --raw --temperature 0.8 --seed 7 --json

      packlight generate demo@bnb-nf4 --prompt "Once upon a time" --raw
    """
    if not prompt:
        raise UsageError("--prompt is empty: give some text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes bytes that are not UTF-8
        raise UsageError("--prompt is not UTF-8 text: give it in that encoding")
    if not 0 <= seed < MAX_SEED:
        raise UsageError(f"--seed is 0 to {MAX_SEED - 1}, not {seed}")
    from packlight.runtime.answer import answer
    from packlight.runtime.bitsandbytes import with_loader
    from packlight.runtime.generate import Sampling

    model = with_loader(model, method)
    sampling = Sampling(temperature, max_tokens, seed)
    start = time.monotonic()
    pieces, made = [], answer(model, prompt, sampling, is_raw=raw, threads=threads)
    for piece in made.pieces:
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    if json:
        text = "".join(pieces)
        seconds = round(time.monotonic() - start, 3)
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": text,
                "prompt_tokens": len(made.prompt_ids),
                "tokens": made.token_ids,
                "finish_reason": made.finish_reason,
                "seconds": seconds,
            }
        )
        return
    print()
