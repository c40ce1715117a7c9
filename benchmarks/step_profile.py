"""Where the time of a serving step goes: the torch engine with answers of mixed lengths, by torch's profiler.

    python benchmarks/step_profile.py [MODEL] [--answers 1 16] [--steps 8] [--ledger evidence/step-profile.jsonl]

The last line of stdout is one JSON object: seconds of a step, and of its matrix products, attention kernel and copies
of blocks. What is left over is everything that is small, Python included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from packlight import evidence
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.text import load_text
from packlight.runtime.sampling import Sampling
from packlight.runtime.serving.engine import Request
from packlight.runtime.serving.open import ServingOptions, open_engine
from packlight.runtime.serving.torch_engine import TorchEngine

PARTS = {
    "products_s": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::_weight_int4pack_mm_for_cpu"),
    "attention_s": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "gathering_s": ("aten::index_select",),
}
PROMPT, LONGER = 50, 15
"""Tokens of the first prompt, and how many more each further one has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    threads = given.threads or hardware(is_probed=False).threads
    options = ServingOptions("torch", context=1024, users=max(given.answers), threads=threads)
    engine = open_engine(given.model, options, print)
    assert isinstance(engine, TorchEngine)
    ids = engine.tokenizer(load_text(None).content, verbose=False)["input_ids"]
    rows = [row for count in given.answers for row in measure(engine, ids, count, given.steps)]
    if given.ledger:
        evidence.append(given.ledger, evidence.stamped(rows, threads))
    print(json.dumps({f"{row.name}, {row.subject}": row.value for row in rows}))


def measure(engine: TorchEngine, ids: list[int], count: int, steps: int) -> list[Measurement]:
    """Rows of a step with `count` answers, means over `steps`; the whole is timed without the profiler."""
    start = 0
    for number in range(count):
        length = PROMPT + LONGER * number
        request = Request(str(number), tuple(ids[start : start + length]), Sampling(max_tokens=4 * steps + 64))
        engine.add(request)
        start += length
    while engine.scheduler.waiting or any(one.left > 1 for one in engine.scheduler.running):
        engine.step()
    for _ in range(3):
        engine.step()
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step()
    whole = (time.perf_counter() - begin) / steps
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.no_grad():
        for _ in range(steps):
            engine.step()
    totals = {event.key: event.self_cpu_time_total / 1e6 / steps for event in found.key_averages()}
    for number in range(count):
        engine.cancel(str(number))
    subject = f"{count} answers"
    parts = {name: sum(totals.get(key, 0.0) for key in keys) for name, keys in PARTS.items()}
    return [
        Measurement("step_s", whole, "s", subject, n=steps),
        *(Measurement(name, value, "s", subject, n=steps, note="self time, profiled") for name, value in parts.items()),
        Measurement("profiled_s", sum(totals.values()), "s", subject, n=steps, note="all of it under the profiler"),
    ]


if __name__ == "__main__":
    main()
