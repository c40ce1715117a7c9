from __future__ import annotations

import gzip
import hashlib
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.errors import TextError, UsageError
from packlight.measure.text import load_text, windows


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_bundled_text_is_the_one_that_numbers_were_measured_on() -> None:
    text = load_text()
    assert text.name == "war-and-peace"
    assert text.sha256 == "a2daa659dec56d7d4b2c8f339113a2214384d79e8ce639ce11b131c2bdc0b98b"
    assert len(text.content.encode()) == 416_817
    assert text.content.startswith("BOOK NINE: 1812\n\nCHAPTER I\n\nFrom the close of the year 1811")


@pytest.mark.parametrize(("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize(
    ("kind", "data", "content"),
    [
        (".txt", "Ein Größenfehler.\n".encode(), "Ein Größenfehler.\n"),
        (".txt", b"\xef\xbb\xbfafter a byte-order mark", "after a byte-order mark"),
        (".jsonl", b'{"text": "one"}\n\n{"id": 7, "text": "two"}\n', "one\n\ntwo"),
        (".jsonl", b'{"id": 7, "title": "first string"}\r\n', "first string"),
        (".jsonl", '{"text": "a\u2028b"}\n'.encode(), "a\u2028b"),
    ],
)
def test_load_text(tmp_path: Path, kind: str, data: bytes, content: str, ending: str, compress) -> None:
    path = write(tmp_path / f"my{kind}{ending}", compress(data))
    text = load_text(path)
    assert (text.name, text.content) == (path.name, content)
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("latin.txt", "Größe".encode("latin-1"), "not UTF-8 text (byte 2)"),
        ("half.txt.gz", gzip.compress(b"text" * 100)[:-12], "not a whole .gz file"),
        ("none.txt.gz", b"text", "not a whole .gz file"),
        ("half.txt.xz", lzma.compress(b"text" * 100)[:-12], "not a whole .xz file"),
        ("void.jsonl", b'{"text": ""}\n', "holds no text"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b'{"text": "one"}\n\n["two"]\n', "line 3 is not a JSON object"),
        ("numbers.jsonl", b'{"id": 1}\n', "line 1 has no field that holds a string"),
        ("wrong.jsonl", b'{"text": 5}\n', "line 1 has no field that holds a string"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(TextError) as caught:
        load_text(write(tmp_path / name, data))
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="there is no text file"):
        load_text(tmp_path / "absent.txt")
    with pytest.raises(TextError, match="is a directory"):
        load_text(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "warandpeace.txt.xz", "c4_demo.jsonl.gz", "wiki.valid.tokens"])
def test_real_files(data_dir: Path, name: str) -> None:
    assert len(load_text(data_dir / "text" / name).content) > 100_000


@given(st.integers(2, 300), st.integers(2, 40), st.none() | st.integers(2, 400))
def test_windows_are_whole_disjoint_and_in_order(length: int, context: int, max_tokens: int | None) -> None:
    usable = length if max_tokens is None else min(length, max_tokens)
    if usable < context:
        with pytest.raises(UsageError):
            windows(range(length), context, max_tokens)
        return
    cut = windows(range(length), context, max_tokens)
    assert len(cut) == usable // context
    assert [token for window in cut for token in window] == list(range(len(cut) * context))


def test_a_text_shorter_than_one_window_says_how_long_it_is() -> None:
    with pytest.raises(TextError, match="has 7 tokens, less than one window of 512"):
        windows(range(7), 512)


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        windows(range(7), 1)
