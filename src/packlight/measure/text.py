"""The text that quality is measured on, and its windows.

Every format of a model sees the same tokens in the same windows, so that a difference between two numbers is a
difference between two models. No torch.

NOTICE: the bundled text, `texts/war_and_peace.txt.xz`, is Leo Tolstoy, War and Peace, Book Nine and chapters I to
XVIII of Book Ten (416,817 bytes of UTF-8), in the English translation of Louise and Aylmer Maude. It is in the
public domain. Line breaks inside paragraphs are removed, and paragraphs are set apart by one empty line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packlight.errors import TextError, UsageError

BUNDLED_NAME = "war-and-peace"
_BUNDLED = Path(__file__).with_name("texts") / "war_and_peace.txt.xz"
_DECOMPRESS: Mapping[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}


@dataclass(frozen=True)
class Text:
    """A text under its name; `sha256` is of its content in UTF-8, whatever file it came from."""

    name: str
    content: str
    sha256: str


def load_text(path: Path | None = None) -> Text:
    """The text of a `.txt` or `.jsonl` file, also compressed as `.gz` or `.xz`; the bundled one for None.

    A line of a `.jsonl` file is an object whose field `text`, or else its first field that holds a string, is one
    document; documents are joined by an empty line. Any other ending is read as plain text.

    Raises:
        TextError: the file is missing, unreadable, damaged, not UTF-8 or empty, or a line of it is malformed.
    """
    source = _BUNDLED if path is None else path
    content = _decode(source, _read_bytes(source))
    if ".jsonl" in source.suffixes[-2:]:
        content = _join_documents(source, content)
    if not content.strip():
        raise TextError(f"{source} holds no text: give a .txt or .jsonl file with at least one window of it")
    name = BUNDLED_NAME if path is None else path.name
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


def calibration_text() -> Text:
    """The part of the bundled text that quality is not measured on by default: all but its first quarter."""
    whole = load_text()
    start = whole.content.index("\n\n", len(whole.content) // 4)
    content = whole.content[start:].strip()
    return Text(f"{BUNDLED_NAME}-calibration", content, hashlib.sha256(content.encode()).hexdigest())


def windows(token_ids: Sequence[int], context: int, max_tokens: int | None = None) -> list[list[int]]:
    """Cut tokens into windows of `context` tokens that do not overlap; what remains at the end is dropped.

    Args:
        token_ids: the whole text, tokenized at once.
        context: tokens per window, at least 2: a window of one token predicts nothing.
        max_tokens: upper limit on the tokens of all windows together.

    Raises:
        UsageError: `context` is below 2, or `max_tokens` below one window.
        TextError: the text is shorter than one window.
    """
    if context < 2:
        raise UsageError(f"a window needs a context of at least 2 tokens, not {context}")
    if max_tokens is not None and max_tokens < context:
        raise UsageError(
            f"{max_tokens} tokens are less than one window of {context}: ask for more tokens or a shorter context"
        )
    if len(token_ids) < context:
        raise TextError(
            f"the text has {len(token_ids)} tokens, less than one window of {context}: "
            "give a longer text or a shorter context"
        )
    usable = len(token_ids) if max_tokens is None else min(len(token_ids), max_tokens)
    return [list(token_ids[start : start + context]) for start in range(0, usable - context + 1, context)]


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise TextError(f"{path} is a directory: give a .txt or .jsonl file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"there is no text file {path}: give a .txt or .jsonl file") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix not in _DECOMPRESS:
        return data
    try:
        return _DECOMPRESS[path.suffix](data)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise TextError(f"{path} is not a whole {path.suffix} file: {error}") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text (byte {error.start}): give a .txt or .jsonl file, or one of these as .gz or .xz"
        ) from error


def _join_documents(path: Path, content: str) -> str:
    # split("\n"), because splitlines() also cuts at U+2028, which JSON allows inside a string
    lines = enumerate(content.split("\n"), start=1)
    return "\n\n".join(_document(path, number, line) for number, line in lines if line.strip())


def _document(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TextError(f"{path}, line {number} is not a JSON object with a field 'text'")
    text = record.get("text") or next((value for value in record.values() if isinstance(value, str)), None)
    if not isinstance(text, str):
        raise TextError(f"{path}, line {number} has no field that holds a string, such as 'text'")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise TextError(f"{path}, line {number} holds half of a surrogate pair, which is no character")
    return text
