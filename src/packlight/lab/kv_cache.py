"""What a KV cache is, costs and saves: a study on one model.

Four questions, each answered by measuring:

    growth      what a step reads and what it adds: the query is one vector, the cache gains one column
    times       seconds per token against length, with the cache and without it
    break even  the shortest answer for which the cache is faster, against the length of the prompt, beside the plan's
    kinds       bytes, seconds and divergence of every kind of cache at one length, beside the plan's bytes

Without a cache, token n computes n tokens again; with it, it computes one and reads n columns. Times are medians of
interleaved repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.evidence import Measurement
from packlight.measure import child
from packlight.measure.memory import current_bytes, flush, peak_bytes, wait
from packlight.plan.kv_advice import PAYS, advise
from packlight.plan.kv_cache import KVCacheKind, kind_bytes
from packlight.plan.memory import OVERHEAD_ACTIVATIONS, OVERHEAD_BYTES, runtime_bytes
from packlight.runtime import kv_cache
from packlight.runtime.decoder import Decoder
from packlight.runtime.load import load_model
from packlight.runtime.model_decoder import CachedDecoder, UncachedDecoder, prefill, step
from packlight.spec import Budget, Hardware, Precision

LENGTHS = (32, 128, 256, 512, 1024)
PROMPTS = (1, 4, 16, 64, 256)
REPEATS = 5
CUDA_REPEATS = 25
"""Steps there take milliseconds, and a clock on the processor sees what else it does."""
MOST_NEW = 24
"""New tokens up to which a break-even point is looked for."""
STEPS = 8
"""Tokens decoded behind a prompt, per kind of cache."""


@dataclass(frozen=True)
class Growth:
    """One step: the shapes of its query and of the keys that it meets in a layer, and the bytes of the whole cache."""

    tokens: int
    query: tuple[int, ...]
    keys: tuple[int, ...]
    cache_bytes: int


def growth(model: PreTrainedModel, prompt_tokens: int, steps: int) -> list[Growth]:
    """The prompt and `steps` steps behind it, with a cache that holds exactly what is filled.

    Shapes are (batch, heads, tokens, head_dim), as the attention of the first layer has them.
    """
    cache = kv_cache.allocate(model.config, prompt_tokens + steps, "growing")
    seen: list[tuple[int, ...]] = []
    text = model.config.get_text_config(decoder=True)
    ids = _ids(model, prompt_tokens + steps)
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))

    def note(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        seen.append((hidden.shape[0], text.num_attention_heads, hidden.shape[1], width))

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        found = []
        for part in ids.split([prompt_tokens] + [1] * steps, dim=1):
            prefill(model, part, cache)
            layer: Any = cache.layers[0]
            held = kv_cache.held_bytes(cache)
            found.append(Growth(int(cache.get_seq_length()), seen[-1], tuple(layer.keys.shape), held))
        return found
    finally:
        handle.remove()


def times(model: PreTrainedModel, length: int, repeats: int = REPEATS) -> list[Measurement]:
    """Seconds for the token behind `length` others, with the cache and without."""
    cache = kv_cache.allocate(model.config, length + repeats + 2)
    ids = _ids(model, length + 1)
    prefill(model, ids[:, :length], cache)
    device = model.device.type
    without = UncachedDecoder(model)
    without.prefill(ids)  # warm
    step(model, ids[:, -1:], cache)
    pairs = [
        (
            _seconds(lambda: step(model, ids[:, -1:], cache), device),
            _seconds(lambda: without.prefill(ids), device),
        )
        for _ in range(repeats)
    ]
    cached, uncached = zip(*pairs, strict=True)
    subject = length_subject(length)
    return [_median("cached_token_s", cached, subject), _median("uncached_token_s", uncached, subject)]


def break_even(
    model: PreTrainedModel, checkpoint: Checkpoint, hardware: Hardware, prompt: int, repeats: int = REPEATS
) -> list[Measurement]:
    """The shortest answer to a prompt that a cache makes `PAYS` times as fast, by measuring and by the plan.

    The value is None where no answer of up to `MOST_NEW` tokens is.
    """
    capacity = prompt + MOST_NEW
    runs = [
        [_answer_s(each, model, prompt) for each in (CachedDecoder(model, capacity), UncachedDecoder(model))]
        for _ in range(repeats)
    ]
    cached, uncached = (_sums([run[which] for run in runs]) for which in (0, 1))
    found = next((new for new in range(2, MOST_NEW + 1) if uncached[new - 1] >= PAYS * cached[new - 1]), None)
    precision = checkpoint.spec.stored or Precision(str(model.dtype).removeprefix("torch."))
    planned = advise(checkpoint.spec, precision, Budget(None, capacity, 1), hardware, prompt, 2).break_even
    note = f"new tokens from which on a cache is {PAYS} times as fast; medians of {repeats}"
    if found is None:
        note += f"; not within {MOST_NEW} tokens"
    return [
        Measurement(
            "break_even_tokens", found, "tokens", prompt_subject(prompt), predicted=planned, n=repeats, note=note
        )
    ]


def kind(
    checkpoint: Checkpoint,
    dtype: str,
    name: KVCacheKind,
    context: int,
    window: int,
    threads: int | None,
    device: str = "cpu",
) -> list[Measurement]:
    """One kind of cache; on a CPU in a process of its own.

    Args:
        window: of the sliding cache in a model that has none of its own.
    """
    spec = checkpoint.spec
    own = window if name == "sliding" and spec.sliding_window is None else None
    request: dict[str, Any] = {
        "path": str(checkpoint.path),
        "dtype": dtype,
        "context": context,
        "kind": name,
        "window": own,
        "device": device,
    }
    made = _measure(**request) if device != "cpu" else child.ask(["-m", "packlight.lab.kv_cache"], request, threads)
    subject = kind_subject(name, context)
    planned = kind_bytes(spec, name, context, 1, dtype, own)
    memory = runtime_bytes(spec, spec.stored or Precision(dtype), Budget(None, context, 1))
    beside = memory.activations
    if device == "cpu":
        beside += OVERHEAD_ACTIVATIONS * memory.activations + OVERHEAD_BYTES
    window_note = f"window of {own} tokens" if own else None
    return [
        Measurement("kv_cache_bytes", made["held"], "bytes", subject, predicted=planned.held, note=window_note),
        Measurement(
            "peak_bytes",
            made["peak"],
            "bytes",
            subject,
            predicted=planned.total + beside,
            note="above the loaded and warm model: cache, activations and what the allocator wastes",
        ),
        _median("cached_token_s", made["seconds"], subject),
        Measurement(
            "kl", made["kl"], "nats", subject, n=made["positions"], note="of the next token, to the static cache"
        ),
    ]


def length_subject(length: int) -> str:
    """How `times` names what it measured."""
    return f"{length} tokens"


def prompt_subject(prompt: int) -> str:
    """How `break_even` does."""
    return f"prompt of {prompt} tokens"


def kind_subject(name: KVCacheKind, context: int) -> str:
    """How `kind` does."""
    return f"{name} cache, {context} tokens"


def _measure(
    path: str, dtype: str, context: int, kind: KVCacheKind, window: int | None, device: str = "cpu"
) -> dict[str, Any]:
    """Prefill all but `STEPS` tokens and decode those; then the same text with the static cache, for the divergence."""
    model = load_model(open_checkpoint(path), dtype, device)
    ids = _ids(model, context)
    _decode(model, ids[:, : STEPS * 2], "static", None)  # warm
    flush(device)
    base = current_bytes(device)
    seconds, logits, held = _decode(model, ids, kind, window)
    peak = peak_bytes(device) - base
    _, exact, _ = _decode(model, ids, "static", None)
    p, q = torch.log_softmax(exact.float(), -1), torch.log_softmax(logits.float(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return {"held": held, "peak": peak, "seconds": seconds, "kl": kl, "positions": len(exact)}


def _decode(
    model: PreTrainedModel, ids: torch.Tensor, kind: KVCacheKind, window: int | None
) -> tuple[list[float], torch.Tensor, int]:
    """Seconds of each step, logits of each (steps, vocab), and the bytes of the cache at the end."""
    decoder = CachedDecoder(model, ids.shape[1], kind, window)
    decoder.prefill(ids[:, :-STEPS])
    seconds: list[float] = []
    logits: list[torch.Tensor] = []
    for place in range(ids.shape[1] - STEPS, ids.shape[1]):
        one = ids[:, place : place + 1]
        seconds.append(_seconds(lambda: logits.append(decoder.step(one)[0]), model.device.type))  # noqa: B023 - at once
    assert decoder.cache is not None
    return seconds, torch.stack(logits), kv_cache.held_bytes(decoder.cache)


def _answer_s(decoder: Decoder, model: PreTrainedModel, prompt: int) -> list[float]:
    """Seconds until each of `MOST_NEW` new tokens, the prompt's own pass first."""
    ids = _ids(model, prompt + MOST_NEW)
    seconds = [_seconds(lambda: decoder.prefill(ids[:, :prompt]))]
    seconds += [_seconds(lambda: decoder.step(one)) for one in ids[:, prompt:-1].split(1, dim=1)]  # noqa: B023 - at once
    return seconds


def _sums(runs: Sequence[Sequence[float]]) -> list[float]:
    """Medians over runs, added up from the first token to each."""
    total, sums = 0.0, []
    for seconds in zip(*runs, strict=True):
        total += statistics.median(seconds)
        sums.append(total)
    return sums


def _median(name: str, seconds: Sequence[float], subject: str) -> Measurement:
    note = f"median of {len(seconds)}; half the range"
    spread = (max(seconds) - min(seconds)) / 2
    return Measurement(name, statistics.median(seconds), "s", subject, spread=spread, n=len(seconds), note=note)


def _seconds(run: Callable[[], object], device: str = "cpu") -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def _ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    torch.manual_seed(0)
    child.answer(_measure(**child.request()))
