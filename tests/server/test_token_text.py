"""Tokens as text and bytes: pieces of characters, spaces at the beginning, both kinds of vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packlight.runtime.sampling import Token
from packlight.server.answering import Answer
from packlight.server.chat import ChatShape
from packlight.server.completions import TextShape
from packlight.server.token_text import LEAST, TokenTexts


def test_bytes_of_a_byte_level_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = TokenTexts(tokenizer)
    for byte in range(128):
        if byte:
            assert texts.of(byte) == (chr(byte), [byte])
    for byte in range(128, 256):
        assert texts.of(byte) == (f"bytes:\\x{byte:02x}", [byte])


def test_pieces_of_a_sentencepiece_tokenizer() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "▁": 2, "a": 3, "▁the": 4, "ß": 5}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert texts.of(4) == (" the", list(b" the"))  # a decoder of this kind drops the space of a first token
    assert texts.of(5) == ("ß", [0xC3, 0x9F])
    assert texts.of(1) == ("bytes:\\xe2", [0xE2])


def test_a_log_probability_that_nobody_knows(tokenizer: PreTrainedTokenizerBase) -> None:
    """llama.cpp tells none inside a torn character: it is no certainty, and takes none of the others away."""
    tokens = (Token(0xC3), Token(0xA9, -0.25, ((0xA9, -0.25),)))
    answer = Answer("é", list(tokens), "stop")
    chat = ChatShape(TokenTexts(tokenizer)).choice(0, answer)
    assert chat.logprobs is not None
    assert [token.logprob for token in chat.logprobs.content] == [LEAST, -0.25]
    text = TextShape(tokenizer, TokenTexts(tokenizer)).choice(0, answer)
    assert text.logprobs is not None
    assert text.logprobs.token_logprobs == [None, -0.25]
    assert ChatShape(TokenTexts(tokenizer)).choice(0, Answer("é", [Token(1), Token(2)], "stop")).logprobs is None
