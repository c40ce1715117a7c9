"""The order of the study of KV caches: growth, times, break-even points, kinds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.lab import kv_cache as lab
from packlight.lab.study import Study
from packlight.measure.bandwidth import hardware, matmul_flops
from packlight.measure.hardware import KERNELS, calibrate
from packlight.plan.kv_cache import KINDS
from packlight.runtime.load import load_model

if TYPE_CHECKING:
    from packlight.pipeline import Watcher

SHORTEST = 32


def run(
    study: Study,
    model: str,
    context: int,
    dtype: str | None,
    is_quick: bool,
    threads: int | None,
    watcher: Watcher,
    device: str = "cpu",
) -> list[lab.Growth]:
    """Measure what the study lacks; returns the growth over a few steps, which is the same every time.

    Raises:
        UsageError: the context is longer than the model's.
    """
    checkpoint = open_checkpoint(model)
    if context > checkpoint.spec.max_context:
        raise UsageError(f"{checkpoint.spec.name} takes {checkpoint.spec.max_context} tokens, not {context}")
    machine = hardware(threads)
    torch.set_num_threads(machine.threads)
    loaded = load_model(checkpoint, dtype, device)
    name = str(loaded.dtype).removeprefix("torch.")
    lengths = [length for length in lab.LENGTHS if length < context] + [context]
    prompts = [prompt for prompt in lab.PROMPTS if prompt + lab.MOST_NEW <= context]
    if is_quick:
        lengths, prompts = lengths[:2], prompts[:2]
        context = lengths[-1]
    repeats = 2 if is_quick else lab.REPEATS if device == "cpu" else lab.CUDA_REPEATS
    tick = watcher.stage("a KV cache, measured", 1 + len(lengths) + len(prompts) + len(KINDS))
    if device != "cpu":
        prompts = []  # the plan's break-even points are made of what a CPU does per second
    kernels = [kernel for kernel in KERNELS if kernel in (name, *_stored_kernels(checkpoint.spec.stored))]
    if prompts:
        machine = replace(calibrate(machine, kernels), flops_per_s=matmul_flops(machine.threads))
    steps = lab.growth(loaded, 4, 4)
    tick()
    for length in lengths:
        study.measure("cached_token_s", lab.length_subject(length), partial(lab.times, loaded, length, repeats))
        tick()
    for prompt in prompts:
        measured = partial(lab.break_even, loaded, checkpoint, machine, prompt, repeats)
        study.measure("break_even_tokens", lab.prompt_subject(prompt), measured)
        tick()
    for kind in KINDS:
        measured = partial(lab.kind, checkpoint, name, kind, context, max(2, context // 4), machine.threads, device)
        study.measure("kv_cache_bytes", lab.kind_subject(kind, context), measured)
        tick()
    return steps


def _stored_kernels(stored: object) -> tuple[str, ...]:
    return () if stored is None else KERNELS
