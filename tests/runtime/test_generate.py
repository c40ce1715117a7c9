"""Tokens over time: those of transformers, reproducible, within the context, alone or in a batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.runtime.complete import complete
from packlight.runtime.generate import generate
from packlight.runtime.load import load_model
from packlight.runtime.model_decoder import CachedDecoder
from packlight.runtime.sampling import Sampling, Token
from packlight.runtime.tokenizer import load_tokenizer, prompt_ids, raw_ids, stop_ids

PROMPT = list(b"The quick brown fox jumps over the lazy dog")
CONTEXT = 256  # of the tiny model


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=False)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(open_checkpoint(tiny_model_dir(tied=False)))


def by_transformers(directory: Path, ids: list[int], num_tokens: int, **options: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


def test_greedy_tokens_are_those_of_transformers(tiny: PreTrainedModel, tiny_model_dir: Callable[..., Path]) -> None:
    found = list(complete(tiny, PROMPT, Sampling(max_tokens=100)))
    assert found == by_transformers(tiny_model_dir(tied=False), PROMPT, 100)
    assert len(set(found)) > 5  # not one token over and over, which many a wrong model says too


@pytest.mark.demo
def test_greedy_tokens_of_the_demo_are_those_of_transformers(demo_dir: Path) -> None:
    checkpoint = open_checkpoint(demo_dir)
    ids = prompt_ids(load_tokenizer(checkpoint), "What is the capital of France?")
    found = list(complete(load_model(checkpoint), ids, Sampling(max_tokens=32)))
    assert found == by_transformers(demo_dir, ids, 32)


def test_a_seed_decides_what_is_drawn(tiny: PreTrainedModel) -> None:
    def drawn(seed: int, temperature: float = 1.0) -> list[int]:
        return list(complete(tiny, PROMPT, Sampling(temperature, 20, seed)))

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    assert drawn(1, temperature=1e-4) == list(complete(tiny, PROMPT, Sampling(max_tokens=20)))


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(tiny: PreTrainedModel) -> None:
    free = list(complete(tiny, PROMPT, Sampling(max_tokens=30)))
    stop = free[10]
    assert list(complete(tiny, PROMPT, Sampling(max_tokens=30), frozenset({stop, 1000}))) == free[: free.index(stop)]


def test_stop_ids_come_from_everywhere() -> None:
    def source(ids: int | list[int] | None) -> Any:
        return SimpleNamespace(eos_token_id=ids)

    model: Any = SimpleNamespace(generation_config=source([2, 3]), config=source(4))
    assert stop_ids(model, source(5)) == {2, 3, 4, 5}
    model = SimpleNamespace(generation_config=None, config=source(None))
    assert stop_ids(model, source(None)) == frozenset()


def test_prompts_of_a_batch_are_answered_as_alone(tiny: PreTrainedModel) -> None:
    """Greedy and drawn; with stop tokens, so that some answers end before others."""
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1]]
    stops = frozenset(range(0, 256, 11))
    for sampling in (Sampling(max_tokens=40), Sampling(1.0, 40, seed=5, top_p=0.9), Sampling(0.9, 40, top_k=7)):
        decoder = CachedDecoder(tiny, 200)
        rows = list(zip(*generate(decoder, prompts, sampling, stops), strict=True))
        found = [[token.id for token in row if token is not None] for row in rows]
        assert found == [list(complete(tiny, prompt, sampling, stops)) for prompt in prompts]
        assert len({len(each) for each in found}) > 1


def test_until_ends_one_row_and_keeps_its_token(tiny: PreTrainedModel) -> None:
    free = list(complete(tiny, PROMPT, Sampling(max_tokens=20)))
    made = generate(
        CachedDecoder(tiny, 200), [PROMPT, PROMPT], Sampling(max_tokens=20), until=lambda row, token: row == 0
    )
    rows = list(made)
    assert [token.id for token in rows[0] if token] == free[:1] * 2
    assert [row[0] for row in rows[1:]] == [None] * 19
    assert [row[1].id for row in rows[1:] if row[1]] == free[1:]


def test_the_repetition_penalty_counts_prompt_and_answer(
    tiny: PreTrainedModel, tiny_model_dir: Callable[..., Path]
) -> None:
    sampling = Sampling(max_tokens=60, repetition_penalty=1.5)
    found = list(complete(tiny, PROMPT, sampling))
    assert found == by_transformers(tiny_model_dir(tied=False), PROMPT, 60, repetition_penalty=1.5)
    assert found != list(complete(tiny, PROMPT, Sampling(max_tokens=60)))


def test_log_probabilities_come_with_the_tokens(tiny: PreTrainedModel) -> None:
    made = list(generate(CachedDecoder(tiny, 200), [PROMPT], Sampling(max_tokens=5, logprobs=2)))
    ids = [*PROMPT]
    for (token,) in made:
        assert isinstance(token, Token)
        with torch.inference_mode():
            wanted = torch.log_softmax(tiny(torch.tensor([ids]), use_cache=False).logits[0, -1], 0)
        assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-5)
        assert token.top[0] == (token.id, token.logprob)  # greedy
        ids.append(token.id)


def test_a_closed_generation_gives_its_memory_back(tiny: PreTrainedModel) -> None:
    decoder = CachedDecoder(tiny, 200)
    made = generate(decoder, [PROMPT], Sampling(max_tokens=20))
    next(made)
    assert decoder.cache is not None
    buffers = [weakref.ref(layer.keys) for layer in decoder.cache.layers]
    made.close()
    assert decoder.cache is None
    assert [buffer() for buffer in buffers] == [None, None]


def test_no_room_in_the_decoder(tiny: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="the prompt has 43 tokens and there is room for 43, answer included"):
        next(generate(CachedDecoder(tiny, 43), [[5], PROMPT], Sampling()))
    assert len(list(generate(CachedDecoder(tiny, 44), [[5], PROMPT], Sampling()))) == 1


def test_an_empty_prompt(tiny: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(complete(tiny, [], Sampling()))
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(generate(CachedDecoder(tiny, 9), [[1], []], Sampling()))
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(generate(CachedDecoder(tiny, 9), [], Sampling()))


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prompt_longer_than_the_context(tiny: PreTrainedModel, length: int) -> None:
    with pytest.raises(UsageError, match=f"the prompt has {length} tokens and the model's context is 256"):
        next(complete(tiny, [65] * length, Sampling()))


def test_an_answer_ends_where_the_context_does(tiny: PreTrainedModel) -> None:
    assert len(list(complete(tiny, [65] * (CONTEXT - 3), Sampling(max_tokens=50)))) == 3
    assert len(list(complete(tiny, [65] * (CONTEXT - 3), Sampling(max_tokens=1)))) == 1


def test_a_message_goes_through_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt_ids(tokenizer, "hé") == list("hé".encode())
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer.chat_template = template
    try:
        assert bytes(prompt_ids(tokenizer, "hé")).decode() == "<user>hé>"
    finally:
        tokenizer.chat_template = None


def test_a_system_message_comes_before_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert bytes(prompt_ids(tokenizer, "b", "a")).decode() == "a\n\nb"
    assert raw_ids(tokenizer, "b", "a") == list(b"a\n\nb")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        assert bytes(prompt_ids(tokenizer, "b", "a")).decode() == "<system>a<user>b"
        assert raw_ids(tokenizer, "b", "a") == list(b"a\n\nb")
    finally:
        tokenizer.chat_template = None
