"""The fresh process that a compiled package is proved and timed in. Imports no model code, and says so."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from packlight.measure import child


def ask_package(path: str, ids: Sequence[int], top_ids: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Any]:
    """What a package says: its prompt graph about the first part of a prompt, its token graph about the rest.

    Args:
        path: the package.
        ids: the prompt.
        top_ids: tokens whose log-probabilities are wanted, for each of the last positions of the prompt.
        max_tokens: tokens to go on with after the prompt, greedily.

    Returns:
        `log_probs` (positions, tokens), `tokens`, `load_s` (torch imported and the package loaded), `first_token_s`
        (from the start of loading to the first token of the prompt), and `imported` (transformers is loaded).
    """
    start = time.perf_counter()
    import torch

    from packlight.runtime.package_decoder import load_package

    decoder = load_package(path)
    load_s = time.perf_counter() - start
    prompt = torch.tensor([list(ids)])  # (1, tokens)
    opening = len(ids) - len(top_ids) + 1
    logits = decoder.prefill(prompt[:, :opening])
    first_token_s = time.perf_counter() - start
    log_probs = []
    for place, wanted in enumerate(top_ids):
        if place > 0:
            logits = decoder.step(prompt[:, opening + place - 1 : opening + place])
        log_probs.append(torch.log_softmax(logits[0].float(), dim=-1)[list(wanted)].tolist())
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = logits.argmax(dim=-1, keepdim=True)
        tokens.append(int(token))
        if len(tokens) < max_tokens:
            logits = decoder.step(token)
    return {
        "log_probs": log_probs,
        "tokens": tokens,
        "load_s": load_s,
        "first_token_s": first_token_s,
        "imported": "transformers" in sys.modules,
    }


if __name__ == "__main__":
    child.answer(ask_package(**child.request()))
