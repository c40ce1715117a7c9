"""What the runtime's choices buy, as ratios measured in one run.

    python benchmarks/runtime.py [MODEL] [--part cache|attention|transformers|memory|compiled ...] [--dtype float32]
                                 [--package DIR] [--ledger evidence/runtime.jsonl]

cache         a token with the KV cache and without, behind 32, 256 and 1024 others
attention     one layer, eager and flash, 512 to 8192 tokens: time, peak extra memory, and how they grow
transformers  prefill and decode beside `transformers.generate` on the same weights, by turns
memory        peak memory at the context's end beside the plan
compiled      decode beside a compiled package and the eager model; first token of each (torch.compile takes minutes)

MODEL is `demo` where it is not given; every part runs where none is named. Repeats are by turns and medians are
reported. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from first_token import PROMPT_CHARACTERS, SUBJECTS, TOKENS, make_package

from packlight import evidence
from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.evidence import Measurement
from packlight.lab import kv_cache as lab
from packlight.lab.exponent import fit_exponent
from packlight.measure.attention_cost import LayerShape, layer_cost
from packlight.measure.bandwidth import hardware
from packlight.measure.first_token import first_token, first_token_rows
from packlight.measure.footprint import footprint
from packlight.measure.text import load_text
from packlight.plan.memory import runtime_bytes
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.sampling import Sampling
from packlight.spec import Budget, Precision

LENGTHS = (32, 256, 1024)
TOKENS_OF_ATTENTION = (512, 1024, 2048, 4096, 8192)
PROMPT, NEW, REPEATS = 256, 32, 5
Rows = Iterator[Measurement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--package", type=Path)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    threads = hardware(is_probed=False).threads
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(given.model)
    found: dict[str, Measurement] = {}
    for part in given.part:
        for row in PARTS[part](given, checkpoint, threads):
            found[f"{row.name}, {row.subject}"] = row
            print(f"{row.subject}: {row.name} {row.value} {row.unit}", flush=True)
            if given.ledger:
                evidence.append(given.ledger, evidence.stamped([row], threads))
    print(json.dumps({"model": given.model, "dtype": given.dtype, **{name: row.value for name, row in found.items()}}))


def cache(given: argparse.Namespace, checkpoint: Checkpoint, threads: int) -> Rows:
    """With the KV cache and without."""
    model = load_model(checkpoint, given.dtype)
    for length in LENGTHS:
        rows = lab.times(model, length)
        yield from rows
        yield ratio("times_faster_with_cache", rows[1], rows[0])


def attention(given: argparse.Namespace, checkpoint: Checkpoint, threads: int) -> Rows:
    """Eager and flash over one layer of the model's shape, each point in a process of its own, by turns."""
    spec = checkpoint.spec
    shape = LayerShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    costs = {
        (backend, tokens): layer_cost(backend, tokens, shape, given.dtype, threads)
        for tokens in TOKENS_OF_ATTENTION
        for backend in ("eager", "flash")
    }
    for (backend, tokens), cost in costs.items():
        subject = f"{backend} attention, {tokens} tokens"
        n = cost.repeats
        yield Measurement("attention_s", cost.seconds, "s", subject, spread=cost.seconds_spread, n=n)
        yield Measurement("extra_bytes", cost.extra_bytes, "bytes", subject, spread=cost.extra_bytes_spread, n=n)
    for backend in ("eager", "flash"):
        for name, of in (("seconds", "time"), ("extra_bytes", "memory")):
            fitted = fit_exponent(TOKENS_OF_ATTENTION, [getattr(costs[backend, t], name) for t in TOKENS_OF_ATTENTION])
            note, subject = "slope of the logarithms, 512 to 8192 tokens; its standard error", f"{backend} attention"
            yield Measurement(f"{of}_exponent", fitted.value, "1", subject, spread=fitted.stderr, note=note)


def transformers(given: argparse.Namespace, checkpoint: Checkpoint, threads: int) -> Rows:
    """packlight's loop and `transformers.generate`, by turns, on one model in one process."""
    model = load_model(checkpoint, given.dtype)
    ids = torch.randint(0, checkpoint.spec.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def ours(tokens: int) -> list[int]:
        return list(complete(model, ids[0].tolist(), Sampling(max_tokens=tokens)))

    def theirs(tokens: int) -> list[int]:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(made[0, PROMPT:].tolist())

    same = ours(NEW) == theirs(NEW)
    yield Measurement("same_tokens", same, "1", "packlight and transformers", n=NEW, note="greedy")
    times: dict[tuple[str, int], list[float]] = {
        (who, n): [] for who in ("packlight", "transformers") for n in (1, NEW)
    }
    for _ in range(REPEATS):
        for (who, tokens), seconds in times.items():
            seconds.append(taken(lambda: (ours if who == "packlight" else theirs)(tokens)))  # noqa: B023 - at once
    for who in ("packlight", "transformers"):
        first, whole = (statistics.median(times[who, tokens]) for tokens in (1, NEW))
        yield Measurement("prefill_tps", PROMPT / first, "tokens/s", who, n=REPEATS, note=f"prompt of {PROMPT}")
        note = f"{NEW} tokens behind {PROMPT}, the first one apart"
        yield Measurement("decode_tps", (NEW - 1) / (whole - first), "tokens/s", who, n=REPEATS, note=note)


def memory(given: argparse.Namespace, checkpoint: Checkpoint, threads: int) -> Rows:
    """Peak memory of the whole context's conversation beside the plan."""
    context = min(LENGTHS[-1], checkpoint.spec.max_context)
    precision = checkpoint.spec.stored or Precision(given.dtype)
    planned = runtime_bytes(checkpoint.spec, precision, Budget(None, context, 1)).total
    found = footprint(checkpoint.path, context, dtype=given.dtype, threads=threads)
    yield Measurement(
        "peak_bytes",
        found.peak_bytes,
        "bytes",
        f"{given.dtype}, context {context}",
        predicted=planned,
        note="above base",
    )


def compiled(given: argparse.Namespace, checkpoint: Checkpoint, threads: int) -> Rows:
    """First token and decode speed: package, torch.compile cold, eager; fresh processes."""
    package = given.package or make_package(given.model, LENGTHS[-1], given.dtype, threads)
    prompt = load_text().content[:PROMPT_CHARACTERS]
    found: dict[str, list[Measurement]] = {}
    for way, subject in SUBJECTS.items():
        source = package if way == "package" else given.model
        runs = [
            first_token(way, source, prompt, TOKENS, LENGTHS[-1], given.dtype, threads)
            for _ in range(1 if way == "compiled" else REPEATS)
        ]
        found[way] = first_token_rows(subject, runs)
        yield from found[way]
    yield ratio("times_sooner_than_torch_compile", found["compiled"][0], found["package"][0])


def ratio(name: str, above: Measurement, below: Measurement) -> Measurement:
    """How many times as large the first is."""
    assert isinstance(above.value, float | int) and isinstance(below.value, float | int)
    return Measurement(name, above.value / below.value, "1", below.subject)


def taken(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


PARTS = {
    "cache": cache,
    "attention": attention,
    "transformers": transformers,
    "memory": memory,
    "compiled": compiled,
}

if __name__ == "__main__":
    main()
