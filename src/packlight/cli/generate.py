"""`packlight generate`: ask a model something."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packlight.cli import options
from packlight.cli.output import complain, print_json
from packlight.errors import UsageError
from packlight.plan.attention import AUTO, BACKEND_NAMES
from packlight.plan.kv_cache import KINDS, KVCacheKind

if TYPE_CHECKING:
    from packlight.runtime.answer import Answer, Conversation

MAX_SEED = 2**32
"""Seeds below this one are all that anybody needs, and torch takes them."""


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to ask, put into the model's chat template; again for a batch.")
    ],
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before each prompt; computed once.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of each answer, at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that add up to p.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Draw from those with this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Makes tokens that occurred less likely; 1: does not.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="An answer ends before this text; may be given again.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Log-probabilities of each token and N others; needs --json.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    kv_cache: Annotated[
        str, typer.Option("--kv-cache", help="What is kept of earlier tokens.", metavar="|".join(KINDS))
    ] = "static",
    window: Annotated[int | None, typer.Option("--window", help="Tokens that a sliding KV cache keeps.", min=1)] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute all tokens again at every step.")] = False,
    attention: Annotated[
        str, typer.Option("--attention", help="How attention is computed.", metavar="|".join(BACKEND_NAMES))
    ] = AUTO,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model first, which takes a minute or more.")
    ] = False,
    method: options.Loader = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Stream an answer to stdout; several prompts are answered side by side and printed one after the other.

    [bold]Examples[/bold]

      packlight generate build/demo --prompt "What is the capital of France?"

      packlight generate demo --prompt "Once upon a time" --raw --temperature 0.8 --top-p 0.9 --seed 7 --json

      packlight generate demo --system "Answer in one word." --prompt "Capital of France?" --prompt "Capital of Italy?"

      packlight generate demo --prompt "Once upon a time" --raw --kv-cache int4 --stop "."

      packlight generate demo@bnb-nf4 --prompt "Once upon a time" --raw

      packlight generate build/demo-compiled --prompt "What is the capital of France?"
    """
    _check(prompt, system, seed, logprobs, json)
    from packlight.runtime.answer import Engine, converse
    from packlight.runtime.loader import with_loader
    from packlight.runtime.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    engine = Engine(_kind(kv_cache, no_cache), window, _backend(attention), compile, device)
    model = with_loader(model, method)
    start = time.monotonic()
    made, ids = converse(model, prompt, sampling, raw, system, engine, threads)
    if compile:
        _warm_up(made)
    pieces = made.ask(ids)
    if json:
        for _ in pieces:
            pass
        print_json(_document(model, prompt, made, round(time.monotonic() - start, 3)))
    elif len(prompt) == 1:
        _stream(pieces)
    else:
        for _ in pieces:
            pass
        for asked, answer in zip(prompt, made.answers, strict=True):
            print(f"> {asked}\n{answer.text}\n")


def _check(prompts: list[str], system: str | None, seed: int, logprobs: int | None, json: bool) -> None:
    for name, text in (*(("--prompt", prompt) for prompt in prompts), ("--system", system)):
        if text == "":
            raise UsageError(f"{name} is empty: give some text")
        if any("\ud800" <= character <= "\udfff" for character in text or ""):  # how Python passes what is not UTF-8
            raise UsageError(f"{name} is not UTF-8 text: give it in that encoding")
    if not 0 <= seed < MAX_SEED:
        raise UsageError(f"--seed is 0 to {MAX_SEED - 1}, not {seed}")
    if logprobs is not None and not json:
        raise UsageError("--logprobs prints numbers with --json only: add that")


def _kind(name: str, no_cache: bool) -> KVCacheKind | None:
    for kind in KINDS:
        if name == kind:
            if no_cache and kind != "static":
                raise UsageError(f"give either --no-cache or --kv-cache {kind}")
            return None if no_cache else kind
    raise UsageError(f"--kv-cache is one of {', '.join(KINDS)}, not {name!r}")


def _backend(name: str) -> str:
    if name not in BACKEND_NAMES:
        raise UsageError(f"--attention is one of {', '.join(BACKEND_NAMES)}, not {name!r}")
    return name


def _warm_up(made: Conversation) -> None:
    from packlight.runtime.compiled import CompiledDecoder

    assert isinstance(made.decoder, CompiledDecoder)
    complain("compiling the model for this process, which takes a minute or more ...")
    complain(f"compiled in {made.decoder.warm_up():.1f} s; packlight export --to compiled keeps what this makes")


def _stream(pieces: Iterator[tuple[int, str]]) -> None:
    for _, piece in pieces:
        print(piece, end="", flush=True)
    print()


def _document(model: str, prompts: list[str], made: Conversation, seconds: float) -> dict[str, Any]:
    answers = [_answer(prompt, answer) for prompt, answer in zip(prompts, made.answers, strict=True)]
    shared = {"seconds": seconds, "reused_tokens": made.decoder.reused, "kv_cache_bytes": made.decoder.cache_bytes()}
    if len(answers) == 1:
        return {"model": model, **answers[0], **shared}
    return {"model": model, "answers": answers, **shared}


def _answer(prompt: str, answer: Answer) -> dict[str, Any]:
    document = {
        "prompt": prompt,
        "text": answer.text,
        "prompt_tokens": len(answer.prompt_ids),
        "tokens": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.tokens and answer.tokens[0].logprob is not None:
        document["logprobs"] = [
            {"token": token.id, "logprob": token.logprob, "top": [{"token": i, "logprob": p} for i, p in token.top]}
            for token in answer.tokens
        ]
    return document
