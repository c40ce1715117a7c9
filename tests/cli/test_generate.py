"""`packlight generate`: batches, stop strings, log-probabilities and every kind of cache, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.driver import call

from packlight.plan.kv_cache import KINDS


def ask(tiny: Path, *flags: object) -> dict[str, Any]:
    """The JSON document of an answer without chat template."""
    ended = call("generate", tiny, "--raw", "--max-tokens", 12, *flags, "--json")
    assert ended.code == 0, ended.err
    document: dict[str, Any] = json.loads(ended.out)
    return document


def test_a_batch_is_answered_as_each_prompt_alone(tiny: Path) -> None:
    prompts = ["The quick brown", "fox", "The quick brown dog"]
    alone = [ask(tiny, "--prompt", prompt) for prompt in prompts]
    batch = ask(tiny, *(word for prompt in prompts for word in ("--prompt", prompt)))
    for one, several in zip(alone, batch["answers"], strict=True):
        assert several == {name: one[name] for name in several}
    plain = call("generate", tiny, "--raw", "--max-tokens", 12, "--prompt", prompts[0], "--prompt", prompts[1]).out
    assert plain == "".join(f"> {each['prompt']}\n{each['text']}\n\n" for each in alone[:2])


@pytest.mark.parametrize("flags", [["--kv-cache", kind] for kind in KINDS if kind != "sliding"], ids=str)
def test_every_cache_and_none_give_one_answer(tiny: Path, flags: list[str]) -> None:
    wanted = ask(tiny, "--prompt", "The quick brown", "--no-cache")
    found = ask(tiny, "--prompt", "The quick brown", *flags)
    assert wanted["kv_cache_bytes"] == 0 and found["kv_cache_bytes"] > 0
    assert found["tokens"] == wanted["tokens"]


def test_a_window(tiny: Path) -> None:
    found = ask(tiny, "--prompt", "The quick brown fox", "--kv-cache", "sliding", "--window", 8)
    assert found["kv_cache_bytes"] == 2 * 2 * 2 * 7 * 16 * 4  # layers, keys and values, heads, tokens, width, float32


def test_a_system_prompt_is_computed_once(tiny: Path) -> None:
    found = ask(tiny, "--system", "Answer in one word, please.", "--prompt", "one", "--prompt", "two")
    assert found["reused_tokens"] == len("Answer in one word, please.\n\n")
    assert ask(tiny, "--prompt", "one", "--prompt", "two")["reused_tokens"] == 0


def test_a_stop_string_ends_the_answer_before_it(tiny: Path) -> None:
    free = ask(tiny, "--prompt", "The quick brown", "--temperature", 1, "--seed", 3)
    place, stop = next((place, each) for place, each in enumerate(free["text"]) if each.isascii() and place > 2)
    found = ask(tiny, "--prompt", "The quick brown", "--temperature", 1, "--seed", 3, "--stop", stop)
    assert found["text"] == free["text"][: free["text"].index(stop)]
    assert found["finish_reason"] == "stop"
    assert place >= len(found["text"])


def test_log_probabilities(tiny: Path) -> None:
    found = ask(tiny, "--prompt", "The quick brown", "--logprobs", 2)
    assert [each["token"] for each in found["logprobs"]] == found["tokens"]
    for each in found["logprobs"]:
        assert each["top"][0] == {"token": each["token"], "logprob": each["logprob"]}  # greedy
        assert each["top"][1]["logprob"] <= each["logprob"] <= 0


def test_sampling_flags_reach_the_sampler(tiny: Path) -> None:
    def drawn(*flags: object) -> Any:
        return ask(tiny, "--prompt", "The", "--temperature", 5, *flags)["tokens"]

    greedy = ask(tiny, "--prompt", "The")["tokens"]
    assert drawn() != greedy
    for flags in (["--top-k", 1], ["--top-p", 1e-9], ["--min-p", 1]):
        assert drawn(*flags) == greedy
    assert ask(tiny, "--prompt", "The", "--repetition-penalty", 100)["tokens"] != greedy
