"""One request at llama.cpp: what it says, turned into tokens and text."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from packlight.runtime.sampling import Token
from packlight.runtime.serving.engine import Delta, Finish, Request
from packlight.runtime.text import TextStream

MARGIN = 8
"""Tokens that llama.cpp may make beyond the limit: it tells nothing of a character that the limit tears until it is
whole, or beyond repair."""

Chunk = dict[str, Any]
"""A piece of a streamed answer, as llama.cpp's server writes it."""


class Vocabulary:
    """Tokens as bytes, and back: what llama.cpp leaves out of a character that took several tokens is found again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.tokenizer)

    def before(self, text: bytes, last: int, count: int) -> list[int]:
        """The `count` tokens that stand before the token `last` and make `text` with it; empty where there are none.

        A text may be cut into as many tokens in several ways: the way with the longest tokens first is taken.
        """
        end = self._raws.get(last, b"")
        if not end or not text.endswith(end):
            return []
        return self._cut(text[: -len(end)], count) or []

    def _cut(self, text: bytes, count: int) -> list[int] | None:
        if count == 0:
            return None if text else []
        for length in range(len(text) - count + 1, 0, -1):
            token = self._ids.get(text[:length])
            rest = None if token is None else self._cut(text[length:], count - 1)
            if token is not None and rest is not None:
                return [token, *rest]
        return None

    @cached_property
    def _raws(self) -> dict[int, bytes]:
        pieces = self.tokenizer.get_vocab().items()
        return {token: raw for piece, token in pieces if (raw := _raw(piece)) is not None}

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {raw: token for token, raw in self._raws.items()}


class Flight:
    """A request between `add` and the last of its answer. Compared by identity.

    `is_over` is written by the engine's thread and read by the one that waits for llama.cpp; `has_all` is called by
    that one alone, and everything else by the engine's.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary, limit: int) -> None:
        self.request, self.vocabulary, self.limit = request, vocabulary, limit
        self.is_over = False
        self.is_new = True
        self.num_tokens = self.reused_tokens = 0
        self._stream = TextStream(vocabulary.tokenizer, request.sampling.stop)
        self._text = ""
        self._tokens: list[Token] = []
        self._finish: Finish | None = None
        self._told_reuse = False

    def has_all(self, chunk: Chunk) -> bool:
        """Whether llama.cpp can stop after this piece.

        Where the last token has no text it may end the turn; the piece behind it tells.
        """
        made, text = _made(chunk), _choice(chunk).get("text", "")
        return made > self.limit or (made == self.limit and text != "")

    def push(self, chunk: Chunk) -> None:
        """Take what llama.cpp said."""
        self.is_new = False
        self.reused_tokens = chunk.get("timings", {}).get("cache_n", 0)
        for token in self._new_tokens(chunk):
            if self.num_tokens == self.limit:
                break
            self.num_tokens += 1
            self._tokens.append(token)
            self._text += self._stream.push(token.id)
            if self._stream.is_stopped:
                return self.end("stop")
        if _choice(chunk).get("finish_reason") == "stop":
            self.end("stop")
        elif _made(chunk) > self.limit or self.has_all(chunk):
            self.end("length")
        return None

    def end(self, finish: Finish) -> None:
        """The answer ends as it is."""
        self.is_over = True
        self._text += self._stream.finish()
        self._finish = finish

    @property
    def has_news(self) -> bool:
        return bool(self._text or self._tokens or self._finish)

    def delta(self) -> Delta:
        """What came since the last one."""
        reused = 0 if self._told_reuse else self.reused_tokens
        delta = Delta(self.request.id, self._text, tuple(self._tokens), self._finish, reused)
        self._text, self._tokens, self._told_reuse = "", [], True
        return delta

    def _new_tokens(self, chunk: Chunk) -> list[Token]:
        entries = (_choice(chunk).get("logprobs") or {}).get("content") or []
        tokens = [self._token(entry) for entry in entries]
        lost = _made(chunk) - self.num_tokens - len(tokens)
        if lost > 0 and entries:
            first = entries[0]
            return [Token(token) for token in self.vocabulary.before(bytes(first["bytes"]), first["id"], lost)] + tokens
        return tokens

    def _token(self, entry: Chunk) -> Token:
        count = self.request.sampling.logprobs
        if count is None:
            return Token(entry["id"])
        top = tuple((other["id"], other["logprob"]) for other in entry["top_logprobs"][:count])
        return Token(entry["id"], entry["logprob"], top)


def _choice(chunk: Chunk) -> Chunk:
    return next(iter(chunk.get("choices", ())), {})


def _made(chunk: Chunk) -> int:
    """Tokens of the answer so far, those of torn characters among them."""
    return int(chunk.get("timings", {}).get("predicted_n", 0))


def _raw(piece: str) -> bytes | None:
    """The bytes of a token of a byte-level or a SentencePiece vocabulary; None for a text that is neither."""
    if _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    try:
        return bytes(_BYTES[character] for character in piece)
    except KeyError:
        return None


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character of each byte: itself where it is printable, else one from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
