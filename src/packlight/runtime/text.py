"""Tokens -> text as soon as it is certain, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer while its tokens come.

    A character whose bytes are still incomplete waits for the next token, and so does text that may be the beginning of
    a stop string. A piece is the difference of two decodings that start at the same earlier token, since a tokenizer
    may treat the first token of what it decodes differently (a dropped space).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.is_stopped = False
        self._ids: list[int] = []
        self._start = self._done = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain, often empty. Once a stop string was met, nothing more comes."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        piece = self._pending()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return self._release(piece, is_last=False)

    def finish(self) -> str:
        """What is left after the last token, torn characters among it."""
        return "" if self.is_stopped else self._release(self._pending(), is_last=True)

    def _pending(self) -> str:
        before = self.tokenizer.decode(self._ids[self._start : self._done], skip_special_tokens=True)
        return str(self.tokenizer.decode(self._ids[self._start :], skip_special_tokens=True))[len(before) :]

    def _release(self, piece: str, is_last: bool) -> str:
        text = self._held + piece
        self._held = ""
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        if not is_last:
            kept = _begun(text, self.stop)
            self._held = text[len(text) - kept :]
            text = text[: len(text) - kept]
        return text


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The pieces of a text, none of them empty."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest


def _begun(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
