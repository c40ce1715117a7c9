"""`packlight demo`: the way on a real model, and a question to the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packlight.cli import options
from packlight.cli.output import progress

QUESTION = "What is the capital of France?"
MEMORY = "160MB"
CONTEXT = 1024


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory of the artifact.")] = Path("build/demo"),
    quiet: options.Quiet = False,
) -> None:
    """Fit the demo model (SmolLM2-135M-Instruct) into 160 MB, show what it cost, and ask it something.

    [bold]Example[/bold]

      packlight demo
    """
    from packlight.checkpoint.open import resolve
    from packlight.cli.fit import fit
    from packlight.runtime.answer import converse
    from packlight.runtime.sampling import Sampling

    with progress(quiet) as shown:
        tick = shown.stage("fetching and converting the demo model (once)", 1)
        resolve("demo")
        tick()
    fit("demo", out, MEMORY, CONTEXT, quiet=quiet)
    print(f"\n> {QUESTION}")
    made, ids = converse(str(out), [QUESTION], Sampling(max_tokens=64))
    for _, piece in made.ask(ids):
        print(piece, end="", flush=True)
    print()
