"""Text from tokens: whole characters as soon as they are certain, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from packlight.checkpoint.open import open_checkpoint
from packlight.runtime.text import TextStream, stream_text
from packlight.runtime.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(open_checkpoint(tiny_model_dir(tied=False)))


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


def pushed(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """The pieces, one a byte and the rest, and whether a stop string was met."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(byte) for byte in text.encode()]
    return [*pieces, stream.finish()], stream.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one. two.", (".",), "one"),
        ("a STOP b", ("STOP",), "a "),
        ("a STO b", ("STOP",), "a STO b"),
        ("a SSTOP", ("STOP",), "a S"),
        ("ends in ST", ("STOP",), "ends in ST"),
        ("first\nsecond", ("second", "\n"), "first"),
        ("größer", ("ß",), "grö"),
        ("aab", ("ab",), "a"),
        ("abcd", ("bcd", "abc"), ""),
    ],
)
def test_a_text_ends_before_a_stop_string(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], wanted: str
) -> None:
    pieces, is_stopped = pushed(tokenizer, text, stop)
    assert "".join(pieces) == wanted
    assert is_stopped is (wanted != text)


def test_what_cannot_begin_a_stop_string_is_not_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, _ = pushed(tokenizer, "ab!c", ("!!",))
    assert pieces == ["a", "b", "", "!c", ""]


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_end_where_the_first_stop_string_begins(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]
) -> None:
    """Beside a search in each prefix of the whole text, which is what arrives byte by byte."""
    pieces, is_stopped = pushed(tokenizer, text, tuple(stop))
    wanted = text
    for end in range(1, len(text) + 1):
        places = [place for place in (text[:end].find(each) for each in stop) if place >= 0]
        if places:
            wanted = text[: min(places)]
            break
    assert "".join(pieces) == wanted
    assert is_stopped is any(each in text for each in stop)
