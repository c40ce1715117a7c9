"""Seconds from the start of a process to its first token, and tokens per second after that, three ways:

    package    a compiled package (`export --to compiled`)
    compiled   torch.compile, with nothing in its cache
    eager      transformers' model as it is

Everything that a user waits for is in it: the interpreter, imports, tokenizer, weights, compilation, the prompt.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packlight.evidence import Measurement
from packlight.measure import child

if TYPE_CHECKING:
    import torch

    Run = Callable[[torch.Tensor], torch.Tensor]

Way = Literal["package", "compiled", "eager"]


def first_token(
    way: Way,
    model: str | Path,
    prompt: str,
    num_tokens: int = 32,
    context: int = 1024,
    dtype: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run one way in a fresh process.

    Args:
        way: which of the three.
        model: a package, or anything `open_checkpoint` takes.
        prompt: text that is continued as it is, greedily.
        num_tokens: of the answer, at least 2.
        context: tokens that the compiled and the eager model are given room for.
        dtype: of the compiled and the eager model; None: as stored.
        threads: for every thread pool; None leaves them to their defaults.

    Returns:
        `first_token_s`, `second_token_s` (torch.compile makes its second graph in between), `decode_tps`
        (from the median of the steps), `num_prompt_tokens`, `tokens`, and `imported` (transformers was imported).

    Raises:
        MeasurementError: the process failed.
    """
    with tempfile.TemporaryDirectory() as empty:
        asked = {
            "way": way,
            "model": str(model),
            "prompt": prompt,
            "num_tokens": num_tokens,
            "context": context,
            "dtype": dtype,
            "inductor_cache": empty,
            "started": time.time(),
        }
        return child.ask(["-m", "packlight.measure.first_token"], asked, threads)


def first_token_rows(subject: str, answers: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Repeated runs of one way as rows of evidence: medians, and half the range of the repeats."""
    steps = len(answers[0]["tokens"]) - 1
    notes = {
        "first_token_s": ("s", f"fresh process, {answers[0]['num_prompt_tokens']} prompt tokens"),
        "second_token_s": ("s", "the same, and one step; torch.compile makes a second graph for it"),
        "decode_tps": ("tokens/s", f"from the median of {steps} steps"),
    }
    rows = []
    for name, (unit, note) in notes.items():
        values = [answer[name] for answer in answers]
        spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
        rows.append(
            Measurement(name, statistics.median(values), unit, subject, spread=spread, n=len(values), note=note)
        )
    return rows


def _answer(
    way: Way,
    model: str,
    prompt: str,
    num_tokens: int,
    context: int,
    dtype: str | None,
    inductor_cache: str,
    started: float,
) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache  # read when the compiler is imported, which is below
    prefill, step, ids = (
        _open_package(model, prompt) if way == "package" else _open_model(way, model, prompt, context, dtype)
    )
    import torch

    token = prefill(torch.tensor([ids])).argmax(dim=-1, keepdim=True)
    tokens, since_start = [int(token)], [time.time() - started]
    seconds: list[float] = []
    while len(tokens) < num_tokens:
        start = time.perf_counter()
        token = step(token).argmax(dim=-1, keepdim=True)
        tokens.append(int(token))
        seconds.append(time.perf_counter() - start)
        since_start.append(time.time() - started)
    return {
        "first_token_s": since_start[0],
        "second_token_s": since_start[1],
        "decode_tps": 1 / statistics.median(seconds),
        "num_prompt_tokens": len(ids),
        "tokens": tokens,
        "imported": "transformers" in sys.modules,
    }


def _open_package(path: str, prompt: str) -> tuple[Run, Run, list[int]]:
    from tokenizers import Tokenizer

    from packlight.runtime.package_decoder import load_package

    decoder = load_package(path)
    tokenizer = Tokenizer.from_file(str(decoder.tokenizer_dir / "tokenizer.json"))
    return decoder.prefill, decoder.step, tokenizer.encode(prompt).ids


def _open_model(way: Way, model: str, prompt: str, context: int, dtype: str | None) -> tuple[Run, Run, list[int]]:
    from packlight.checkpoint.open import open_checkpoint
    from packlight.runtime import kv_cache
    from packlight.runtime.load import load_model
    from packlight.runtime.model_decoder import prefill, step
    from packlight.runtime.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(model)
    ids = list(load_tokenizer(checkpoint)(prompt, verbose=False)["input_ids"])
    loaded = load_model(checkpoint, dtype)
    if way == "compiled":
        from packlight.runtime.compiled import CompiledDecoder
        from packlight.runtime.fixed_shapes import Shapes

        decoder = CompiledDecoder(loaded, Shapes(context=context))
        return decoder.prefill, decoder.step, ids
    cache = kv_cache.allocate(loaded.config, context)
    return partial(prefill, loaded, cache=cache), partial(step, loaded, cache=cache), ids


if __name__ == "__main__":
    child.answer(_answer(**child.request()))
