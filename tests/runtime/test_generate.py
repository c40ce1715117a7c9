"""Tokens over time: those of transformers, reproducible, within the context; and their exact text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.runtime import generate as module
from packlight.runtime import kv_cache
from packlight.runtime.answer import answer
from packlight.runtime.generate import Sampling, generate, prefill, prompt_ids, sample, step, stop_ids, stream_text
from packlight.runtime.load import load_model, load_tokenizer

PROMPT = list(b"The quick brown fox jumps over the lazy dog")
CONTEXT = 256  # of the tiny model


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=False)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(open_checkpoint(tiny_model_dir(tied=False)))


def by_transformers(directory: Path, ids: list[int], num_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


def test_greedy_tokens_are_those_of_transformers(tiny: PreTrainedModel, tiny_model_dir: Callable[..., Path]) -> None:
    found = list(generate(tiny, PROMPT, Sampling(max_tokens=100)))
    assert found == by_transformers(tiny_model_dir(tied=False), PROMPT, 100)
    assert len(set(found)) > 5  # not one token over and over, which many a wrong model says too


@pytest.mark.demo
def test_greedy_tokens_of_the_demo_are_those_of_transformers(demo_dir: Path) -> None:
    checkpoint = open_checkpoint(demo_dir)
    ids = prompt_ids(load_tokenizer(checkpoint), "What is the capital of France?")
    found = list(generate(load_model(checkpoint), ids, Sampling(max_tokens=32)))
    assert found == by_transformers(demo_dir, ids, 32)


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.inference_mode():
        whole = tiny(ids, use_cache=False).logits[:, -1]
    for chunk in (1, 7, len(PROMPT) - 1, len(PROMPT), 1000):
        monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
        cache = kv_cache.allocate(tiny.config, len(PROMPT) + 1)
        torch.testing.assert_close(prefill(tiny, ids, cache), whole)  # torch's own tolerances for float32
        assert cache.get_seq_length() == len(PROMPT)
        assert step(tiny, ids[:, :1], cache).shape == (2, 256)


def test_a_seed_decides_what_is_drawn(tiny: PreTrainedModel) -> None:
    def drawn(seed: int, temperature: float = 1.0) -> list[int]:
        return list(generate(tiny, PROMPT, Sampling(temperature, 20, seed)))

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    assert drawn(1, temperature=1e-4) == list(generate(tiny, PROMPT, Sampling(max_tokens=20)))


def test_frequencies_follow_the_temperature() -> None:
    """Odds of e^(1/T) to one: the share of 20,000 draws lies within five standard errors."""
    logits = torch.tensor([[1.0, 0.0]]).expand(20_000, 2)
    for temperature in (0.5, 1.0, 4.0):
        drawn = sample(logits, Sampling(temperature), torch.Generator().manual_seed(0))
        wanted = float(torch.sigmoid(torch.tensor(1 / temperature)))
        error = (wanted * (1 - wanted) / 20_000) ** 0.5
        assert abs(float((drawn == 0).float().mean()) - wanted) < 5 * error


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, Sampling(), torch.Generator()).tolist() == [[1], [0]]


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(tiny: PreTrainedModel) -> None:
    free = list(generate(tiny, PROMPT, Sampling(max_tokens=30)))
    stop = free[10]
    assert list(generate(tiny, PROMPT, Sampling(max_tokens=30), frozenset({stop, 1000}))) == free[: free.index(stop)]


def test_stop_ids_come_from_everywhere() -> None:
    def source(ids: int | list[int] | None) -> Any:
        return SimpleNamespace(eos_token_id=ids)

    model: Any = SimpleNamespace(generation_config=source([2, 3]), config=source(4))
    assert stop_ids(model, source(5)) == {2, 3, 4, 5}
    model = SimpleNamespace(generation_config=None, config=source(None))
    assert stop_ids(model, source(None)) == frozenset()


def test_an_empty_prompt(tiny: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(generate(tiny, [], Sampling()))


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prompt_longer_than_the_context(tiny: PreTrainedModel, length: int) -> None:
    with pytest.raises(UsageError, match=f"the prompt has {length} tokens and the model's context is 256"):
        next(generate(tiny, [65] * length, Sampling()))


def test_an_answer_ends_where_the_context_does(tiny: PreTrainedModel) -> None:
    assert len(list(generate(tiny, [65] * (CONTEXT - 3), Sampling(max_tokens=50)))) == 3
    assert len(list(generate(tiny, [65] * (CONTEXT - 3), Sampling(max_tokens=1)))) == 1


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": 101}, {"max_tokens": 0}, {"temperature": float("nan")}]
)
def test_a_sampling_outside_its_range(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Sampling(**bad)


# --- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["é", "größer", "a😀b", "🇫🇷🏳️‍🌈", "日本語", " leading", "\n", "", "e\u0301", "\ufffd", "a\ufffdb"]
)
def test_characters_split_over_tokens_come_out_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """One token a byte: a piece is only ever made of whole characters, except where the text itself is torn."""
    pieces = list(stream_text(tokenizer, text.encode()))
    assert "".join(pieces) == text
    assert "" not in pieces
    if "\ufffd" not in text:
        assert pieces == list(text)


def test_a_piece_comes_as_soon_as_its_last_byte(tokenizer: PreTrainedTokenizerBase) -> None:
    taken: list[int] = []

    def bytes_of(text: str) -> Any:
        for byte in text.encode():
            taken.append(byte)
            yield byte

    pieces = stream_text(tokenizer, bytes_of("a€b"))
    assert [(next(pieces), len(taken)) for _ in range(3)] == [("a", 1), ("€", 4), ("b", 5)]


@pytest.mark.parametrize("torn", ["é".encode()[:1], "ab😀".encode()[:-1], "€".encode()[:2]])
def test_what_is_incomplete_at_the_end_is_not_lost(tokenizer: PreTrainedTokenizerBase, torn: bytes) -> None:
    pieces = list(stream_text(tokenizer, torn))
    assert "".join(pieces) == torn.decode(errors="replace")
    assert pieces[-1] == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_pieces_add_up_to_the_text_whatever_the_bytes(tokenizer: PreTrainedTokenizerBase, data: bytes) -> None:
    whole = tokenizer.decode(list(data), skip_special_tokens=True)
    assert "".join(stream_text(tokenizer, data)) == whole


@pytest.mark.demo
def test_pieces_of_the_demo_tokenizer_add_up_to_the_text(demo_dir: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(demo_dir))
    text = "  Größe: 5 × 3 😀, 日本語 – done.\n\n  def f(x):\n\treturn x  \n"
    ids = tokenizer(text)["input_ids"]
    assert "".join(stream_text(tokenizer, ids)) == text


def test_an_answer_in_one_call(tiny_model_dir: Callable[..., Path], tiny: PreTrainedModel) -> None:
    directory = str(tiny_model_dir(tied=False))
    made = answer(directory, PROMPT_TEXT, Sampling(max_tokens=12), is_raw=True)
    text = "".join(made.pieces)
    assert made.prompt_ids == PROMPT
    assert made.token_ids == list(generate(tiny, PROMPT, Sampling(max_tokens=12), frozenset({0})))
    assert text == bytes(made.token_ids).decode(errors="replace")
    assert made.finish_reason == ("length" if len(made.token_ids) == 12 else "stop")


PROMPT_TEXT = bytes(PROMPT).decode()


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
