"""One token as text and as bytes, which log-probabilities are reported with."""

from __future__ import annotations

import re
from functools import cache

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


LEAST = -9999.0
"""OpenAI's word for a log-probability that is not known or has no number in JSON."""


class TokenTexts:
    """Texts of tokens, each found once.

    A tokenizer may drop a space before the first token that it decodes; each token is therefore decoded behind another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before: list[int] = list(ids)
        self._before_text = self._decode(self._before)
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def of(self, token: int) -> tuple[str, list[int] | None]:
        """Text and UTF-8 bytes. A token that is a part of a character has a text such as `bytes:\\xe2\\x80`; its bytes
        are None where the tokenizer does not tell them."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, list[int] | None]:
        text = self._decode([*self._before, token])[len(self._before_text) :]
        if "\ufffd" not in text:
            return text, list(text.encode())
        found = self._torn(token)
        return text if found is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found

    def _torn(self, token: int) -> list[int] | None:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if whole := _BYTE.fullmatch(piece):
            return [int(whole[1], 16)]
        alphabet = _byte_alphabet()
        return [alphabet[character] for character in piece] if set(piece) <= alphabet.keys() else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@cache
def _byte_alphabet() -> dict[str, int]:
    """The bytes behind the printable characters that byte-level tokenizers write: those of Latin-1 that print stand
    for themselves, the others follow from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
