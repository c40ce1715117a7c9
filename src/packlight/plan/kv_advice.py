"""Whether a KV cache pays, and which: from the model, the lengths of prompt and answer, and the memory.

With a cache, a prompt of P tokens and an answer of M compute P + M - 1 tokens; without one, each new token computes
everything before it again, P + (P + 1) + ... + (P + M - 1). A pass over n tokens takes as long as its arithmetic or as
reading the weights, whichever is longer, so that a few tokens cost no more than one: there a cache saves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packlight.plan.kv_cache import KINDS, KVCacheBytes, KVCacheKind, kind_bytes
from packlight.plan.memory import runtime_bytes
from packlight.plan.speed import pass_seconds
from packlight.spec import Budget, Hardware, ModelSpec, Precision, format_size

MOST_BREAK_EVEN = 4096
"""New tokens up to which a break-even point is looked for."""
PAYS = 1.1
"""Times faster, for a cache to be called worth its bytes."""
ORDER: tuple[KVCacheKind, ...] = ("static", "int8", "int4", "offloaded")
"""Which kind is advised, the first that fits; a window changes the answers and is the user's to choose."""


@dataclass(frozen=True)
class KindRow:
    """One kind of cache at this length. `fits` is None where no memory was given."""

    kind: KVCacheKind
    bytes: KVCacheBytes
    fits: bool | None


@dataclass(frozen=True)
class KVAdvice:
    """What is advised, None for no cache, and why. Seconds are None where the machine's rates are not known."""

    prompt_tokens: int
    new_tokens: int
    computed_with: int
    computed_without: int
    seconds_with: float | None
    seconds_without: float | None
    break_even: int | None
    kinds: tuple[KindRow, ...]
    use: KVCacheKind | None
    reason: str


def advise(
    spec: ModelSpec, precision: Precision, budget: Budget, hardware: Hardware, prompt_tokens: int, new_tokens: int
) -> KVAdvice:
    """Advice for answers of `new_tokens` to prompts of `prompt_tokens`, for the budget's users and memory.

    Returns:
        the advice; `break_even` is the shortest answer to such a prompt for which a cache is `PAYS` times as fast.
    """
    context = prompt_tokens + new_tokens
    kinds = tuple(_kind_rows(spec, precision, budget, context))
    seconds = _seconds(spec, precision, hardware, prompt_tokens, new_tokens)
    use, reason = _choose(kinds, seconds, new_tokens, budget)
    return KVAdvice(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        computed_with=prompt_tokens + new_tokens - 1,
        computed_without=new_tokens * prompt_tokens + new_tokens * (new_tokens - 1) // 2,
        seconds_with=None if seconds is None else seconds[0],
        seconds_without=None if seconds is None else seconds[1],
        break_even=_break_even(spec, precision, hardware, prompt_tokens),
        kinds=kinds,
        use=use,
        reason=reason,
    )


def _kind_rows(spec: ModelSpec, precision: Precision, budget: Budget, context: int) -> Iterator[KindRow]:
    room = None
    if budget.memory_bytes is not None:
        memory = runtime_bytes(spec, precision, budget)
        room = budget.memory_bytes - (memory.total - memory.kv_cache)
    for kind in KINDS:
        if kind == "sliding" and spec.sliding_window is None:
            continue  # it takes what the user's window says
        taken = kind_bytes(spec, kind, context, budget.users, precision.dtype)
        yield KindRow(kind, taken, None if room is None else taken.total <= room)


def _choose(
    kinds: tuple[KindRow, ...], seconds: tuple[float, float] | None, new_tokens: int, budget: Budget
) -> tuple[KVCacheKind | None, str]:
    if new_tokens == 1:
        return None, "an answer of one token never looks at the cache; nor does training, which sees each token once"
    if seconds is not None and seconds[1] < PAYS * seconds[0]:
        return None, (
            f"computing everything again takes {seconds[1]:.3g} s and a cache {seconds[0]:.3g} s: "
            "passes this short are as long as reading the weights"
        )
    for wanted in ORDER:
        row = next(row for row in kinds if row.kind == wanted)
        if row.fits is not False:
            faster = "" if seconds is None else f"about {seconds[1] / seconds[0]:.1f} times as fast, for "
            return wanted, f"{faster}{format_size(row.bytes.total)}"
    assert budget.memory_bytes is not None
    return None, f"no kind of cache fits into {format_size(budget.memory_bytes)} beside the model"


def _seconds(
    spec: ModelSpec, precision: Precision, hardware: Hardware, prompt_tokens: int, new_tokens: int
) -> tuple[float, float] | None:
    """With and without a cache."""
    first = pass_seconds(spec, precision, hardware, prompt_tokens)
    if first is None:
        return None
    one = pass_seconds(spec, precision, hardware, 1, prompt_tokens + new_tokens // 2)
    assert one is not None
    # Passes grow evenly with their length: the mean of the first and the last stands for all.
    last = pass_seconds(spec, precision, hardware, prompt_tokens + new_tokens - 1)
    assert last is not None
    return first + (new_tokens - 1) * one, new_tokens * (first + last) / 2


def _break_even(spec: ModelSpec, precision: Precision, hardware: Hardware, prompt_tokens: int) -> int | None:
    low, high = 2, MOST_BREAK_EVEN
    if not _pays(_seconds(spec, precision, hardware, prompt_tokens, high)):
        return None
    while low < high:  # the longer the answer, the more a cache saves
        middle = (low + high) // 2
        if _pays(_seconds(spec, precision, hardware, prompt_tokens, middle)):
            high = middle
        else:
            low = middle + 1
    return low


def _pays(seconds: tuple[float, float] | None) -> bool:
    return seconds is not None and seconds[1] >= PAYS * seconds[0]
