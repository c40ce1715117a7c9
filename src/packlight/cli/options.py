"""Arguments and options that several verbs share, and turning a user's words into the nouns of `spec`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from packlight.errors import UsageError
from packlight.runtime.device import DEVICES
from packlight.spec import Budget, parse_size

MOST_TOKENS, MOST_USERS = 10**9, 10**6
"""Beyond any model and any machine; a plan's sizes stay readable up to here."""

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint directory, a hub id such as org/name, a .gguf file, a llama2.c .bin, or demo.",
        metavar="MODEL",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", help="Directory of the artifact; it must not exist yet.", show_default=False)
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="What the model may add to the process: 160MB (10^6) or 1GiB.", metavar="SIZE"),
]
Context = Annotated[int, typer.Option("--context", help="Tokens per user, prompt and answer together.", min=1)]
Window = Annotated[int, typer.Option("--context", help="Tokens per window of the text.", min=2)]
Users = Annotated[int, typer.Option("--users", help="Sequences at the same time.", min=1)]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Text to measure on: .txt or .jsonl, also .gz or .xz; default: the bundled text."),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of the text to measure on, at most.", min=2)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Loader = Annotated[
    str | None,
    typer.Option("--method", help="Quantize with bitsandbytes while loading.", metavar="bnb-int8|bnb-nf4"),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute.", metavar="|".join(DEVICES))]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads to compute with; default: the physical cores.", min=1)
]


def budget(
    memory: str | None, context: int, users: int, min_tps: float | None = None, max_loss_pct: float | None = None
) -> Budget:
    """A budget from the command line. Raises UsageError for values that no budget can have."""
    for name, value in (("--min-tps", min_tps), ("--max-loss", max_loss_pct)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} must be a positive number, not {value}")
    for name, count, most in (("--context", context, MOST_TOKENS), ("--users", users, MOST_USERS)):
        if count > most:
            raise UsageError(f"{name} is at most {most:,}, not {count}")
    return Budget(None if memory is None else parse_size(memory), context, users, min_tps, max_loss_pct)


def parse_group(text: str) -> int | None:
    """A group size: a number of columns, or None for 'row'. Raises UsageError for anything else."""
    if text == "row":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < 1:
        raise UsageError(f"--group-size is a number of columns such as 32, or row, not {text!r}")
    return int(text)


def parse_max_loss(text: str | None) -> float | None:
    """Percent from '5' or '5%'. Raises UsageError for anything else."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise UsageError(f"--max-loss is a percentage such as 5 or 5%, not {text!r}") from None


def refuse_typed(typed: typer.Context, method: str, names: tuple[str, ...]) -> None:
    """Raises UsageError for a flag that was given and that the method would pass over in silence."""
    for name in names:
        if is_typed(typed, name):
            raise UsageError(f"{method} takes no --{name.replace('_', '-')}")


def is_typed(typed: typer.Context, name: str) -> bool:
    """Whether a flag was given, and does not merely have its default."""
    source = typed.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_options(options: list[str]) -> dict[str, Any]:
    """`act_order=false` as {"act_order": False}. Raises UsageError for what is not a name and a value."""
    found = {}
    for text in options:
        name, joint, value = text.partition("=")
        if not joint or not name.isidentifier():
            raise UsageError(f"--option is a name and a value such as act_order=false, not {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
