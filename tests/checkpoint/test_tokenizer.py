"""Tokenizers from GGUF metadata and llama2.c vocabularies cut text as their makers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.gguf_bytes import gguf

from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.gguf import read_gguf
from packlight.checkpoint.tokenizer import (
    SPACE,
    merges_from_scores,
    read_llama2c_tokens,
    write_gguf_tokenizer,
    write_llama2c_tokenizer,
)
from packlight.errors import CheckpointError

BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|end|>", "<|user|>", "a", "b", "Ġ", "1", "2", "ab", "Ġa", "12", "ĠĠ", "."],
    "tokenizer.ggml.token_type": [3, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ a", "1 2", "Ġ Ġ"],
    "tokenizer.ggml.eos_token_id": 0,
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def written(tmp_path: Path, metadata: dict[str, Any]) -> Path:
    path = tmp_path / "t.gguf"
    path.write_bytes(gguf({"general.architecture": "llama", **metadata}, []))
    write_gguf_tokenizer(read_gguf(path), tmp_path)
    return tmp_path


def tokenizer(directory: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def greedy(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """run.c's `encode`: characters or their bytes, then again and again the leftmost pair of the best score."""
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = []
    for character in (SPACE + text).replace(" ", SPACE) if text else "":
        pieces += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best, place, joined = -1e10, -1, -1
        for index in range(len(pieces) - 1):
            found = ids.get(tokens[pieces[index]] + tokens[pieces[index + 1]])
            if found is not None and scores[found] > best:
                best, place, joined = scores[found], index, found
        if place < 0:
            return [1, *pieces]
        pieces[place : place + 2] = [joined]


TEXTS = [
    "",
    "a",
    " leading and  double  spaces ",
    "Once upon a time, there was a little girl named Lily.",
    "line one\nline two\n\n\ttab",
    "émigré naïve Ω 日本語 😀 a\u0301",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the then there these 1234567890 !?.,;:",
    "abracadabrabracadabra hehehehehe nanananana",
]


@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "name", "size"), [("stories260K", "tok512.bin", 512), ("stories15M", "tokenizer.bin", 32000)]
)
def test_llama2c_ids_are_those_of_its_own_algorithm(
    data_dir: Path, tmp_path: Path, model: str, name: str, size: int
) -> None:
    file = data_dir / model / name
    tokens, scores = read_llama2c_tokens(file, size)
    write_llama2c_tokenizer(file, size, tmp_path)
    ours = tokenizer(tmp_path)
    stories = (data_dir / "text" / "tinyshakespeare.txt").read_text()[:20000].split("\n\n")
    for text in [*TEXTS, *stories]:
        assert ours.encode(text).ids == greedy(text, tokens, scores), text
        if text:
            assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.data
def test_llama2c_ids_agree_on_any_text(data_dir: Path, tmp_path: Path) -> None:
    file = data_dir / "stories260K" / "tok512.bin"
    tokens, scores = read_llama2c_tokens(file, 512)
    write_llama2c_tokenizer(file, 512, tmp_path)
    ours = tokenizer(tmp_path)

    # U+2581 is the space itself to SentencePiece, but a character like others to run.c; "<" may spell "<s>".
    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(exclude_characters=SPACE + "<", exclude_categories=["Cs"]), max_size=60))
    def agrees(text: str) -> None:
        assert ours.encode(text).ids == greedy(text, tokens, scores)

    @settings(max_examples=300, deadline=None)
    @given(st.text("thean dS.", max_size=60))
    def agrees_on_what_merges(text: str) -> None:
        assert ours.encode(text).ids == greedy(text, tokens, scores)

    agrees()
    agrees_on_what_merges()


def test_merges_follow_the_scores() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    assert merges_from_scores(tokens, [0, 0, 0, -2, -1, -3]) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 12", ["ab", "Ġ", "12"]),
        ("smollm", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("smollm", "a  1", ["a", "ĠĠ", "1"]),
        ("llama-bpe", "ab 12", ["ab", "Ġ", "12"]),
        ("qwen2", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("qwen2", "a<|user|>a", ["a", "<|user|>", "a"]),
        ("gpt-2", "a<|end|> a", ["a", "<|end|>", "Ġa"]),
    ],
)
def test_byte_level_text_is_cut_as_pre_says(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    ours = tokenizer(written(tmp_path, BYTE_LEVEL | {"tokenizer.ggml.pre": pre}))
    assert ours.encode(text).tokens == pieces
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_bos_and_stops_are_kept(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 1}
    directory = written(tmp_path, BYTE_LEVEL | extra | {"tokenizer.chat_template": "{{ messages }}"})
    assert tokenizer(directory).encode("ab").ids == [1, 7]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|user|>" and config["chat_template"] == "{{ messages }}"
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [0, 1]


def test_sentencepiece_without_a_space_prefix(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, SPACE, "a", SPACE + "a"],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = tokenizer(written(tmp_path, metadata))
    assert ours.encode("a a\n").tokens == ["<s>", "a", SPACE + "a", "<0x0A>"]
    assert ours.decode(ours.encode("a a\n").ids) == "a a\n"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer.ggml.pre": "novel"}, "'novel'; packlight knows smollm"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.merges": ["a z"]}, "the merge 'a z'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "the merge 'ab'"),
        ({"tokenizer.ggml.token_type": [1]}, "types for 1"),
        ({"tokenizer.ggml.tokens": ["a"] * 12}, "same token twice"),
        ({"tokenizer.ggml.eos_token_id": 12}, "12 of 12 tokens"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores for 1"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        written(tmp_path, BYTE_LEVEL | changes)


def test_a_missing_pre_is_refused(tmp_path: Path) -> None:
    metadata = {key: value for key, value in BYTE_LEVEL.items() if key != "tokenizer.ggml.pre"}
    with pytest.raises(CheckpointError, match="absent"):
        written(tmp_path, metadata)


@pytest.mark.parametrize("cut", [0, 3, 11, 20])
def test_a_cut_llama2c_vocabulary_is_refused(tmp_path: Path, cut: int) -> None:
    import struct

    path = tmp_path / "tokenizer.bin"
    whole = struct.pack("<i", 4) + struct.pack("<fi", 0.0, 4) + b"abcd" + struct.pack("<fi", 0.0, -1)
    path.write_bytes(whole[: len(whole) - cut])
    with pytest.raises(CheckpointError):
        read_llama2c_tokens(path, 2)


DEMO_TEXTS = [
    "Hello world, it's I'LL they've",
    "  two  spaces\n\n\nnew\r\n\ttabs",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "year2024 and pi=3.14159 +1",
    "日本語 한국어 ñ é a\u0301 😀👩‍👩‍👧 العربية \u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|>",
    "",
    "<0x0A> <unk> ▁a Ġa",
]


@pytest.mark.demo
@pytest.mark.filterwarnings("default")
def test_the_demos_tokenizer_is_transformers_own(demo_dir: Path) -> None:
    from transformers import AutoTokenizer

    file = demo_file()
    ours = AutoTokenizer.from_pretrained(demo_dir)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in DEMO_TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    chat = [{"role": "user", "content": "Hi 42"}, {"role": "assistant", "content": "Yo"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.demo
def test_digits_of_the_demo_stand_alone_whatever_is_before_them(demo_dir: Path) -> None:
    """SmolLM2 cuts digits off before the byte-level pattern; transformers' GGUF reader does not know `smollm`."""
    assert tokenizer(demo_dir).encode("b\n\n2  3").tokens == ["b", "ĊĊ", "2", "ĠĠ", "3"]
