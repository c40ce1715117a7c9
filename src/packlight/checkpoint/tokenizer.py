"""Fast tokenizers from GGUF metadata and llama2.c vocabularies, written as `AutoTokenizer` reads them. No torch.

Two kinds exist there: byte-level BPE with stored merges ("gpt2"), and SentencePiece BPE ("llama"), whose merges are
not stored: the pair whose joined piece has the best score is merged first, so the ranks follow from the scores.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight.checkpoint.gguf import GgufHeader
from packlight.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""SentencePiece writes a space in a piece as this character."""

_FIRST_PIECE = 3 + 256
# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How text is cut before merging, by tokenizer.ggml.pre. Llama 3's and Qwen2's patterns are the published ones of
# these models; both differ in how many digits stay together.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
_DIGITS = ("smollm", "starcoder", "refact")
_PLAIN = ("gpt-2", "gpt2")


@dataclass(frozen=True)
class _Special:
    """Ids of the special tokens and which are added around a text."""

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool


def write_gguf_tokenizer(header: GgufHeader, directory: Path) -> None:
    """Write the tokenizer of a GGUF file; nothing where the file has none.

    Raises:
        CheckpointError: a kind of tokenizer or of pre-tokenizer that is not known, or inconsistent metadata.
    """
    kind = header.get("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return
    tokens: list[str] = header.get("tokenizer.ggml.tokens", list)
    types = [int(item) for item in header.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))]
    _check_tokens(header.path, tokens, types)
    special = _gguf_special(header, len(tokens), kind)
    if kind == "gpt2":
        tokenizer = _byte_level(header, tokens)
    elif kind == "llama":
        scores = [float(item) for item in header.get("tokenizer.ggml.scores", list)]
        prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
        tokenizer = _sentencepiece(header.path, tokens, scores, tokens[special.unk or 0], prefix)
    else:
        raise CheckpointError(
            f"{header.path} has a tokenizer of kind {kind!r}; packlight converts gpt2 and llama: "
            f"give the original checkpoint directory"
        )
    _add_tokens(tokenizer, tokens, types)
    extra = {"chat_template": header.metadata.get("tokenizer.chat_template")}
    stops = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    _write(directory, tokenizer, tokens, special, extra, [stop for stop in stops if type(stop) is int])


def read_llama2c_tokens(path: Path, vocab_size: int) -> tuple[list[str], list[float]]:
    """Pieces, as SentencePiece spells them, and scores of a llama2.c `tokenizer.bin`.

    Format: int32 longest piece; then for each token float32 score, int32 length, UTF-8 bytes
    (https://github.com/karpathy/llama2.c, tokenizer.py).

    Raises:
        CheckpointError: the file does not hold exactly `vocab_size` tokens.
    """
    data = path.read_bytes()
    at, tokens, scores = 4, [], []
    for token in range(vocab_size):
        if at + 8 > len(data):
            raise CheckpointError(f"{path} ends after {token} tokens; the model has {vocab_size}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if length < 0 or at + length > len(data):
            raise CheckpointError(f"{path} gives token {token} the length {length}, which leaves the file")
        tokens.append(_llama2c_piece(path, token, data[at : at + length]))
        scores.append(score)
        at += length
    if at != len(data):
        raise CheckpointError(
            f"{path} has {len(data) - at} bytes after its {vocab_size} tokens; is it another model's?"
        )
    return tokens, scores


def write_llama2c_tokenizer(path: Path, vocab_size: int, directory: Path) -> None:
    """Write the tokenizer of a llama2.c model: SentencePiece BPE, byte fallback, BOS 1 before every text.

    Raises:
        CheckpointError: not a tokenizer of `vocab_size` tokens.
    """
    tokens, scores = read_llama2c_tokens(path, vocab_size)
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_NORMAL] * (vocab_size - 3)
    _check_tokens(path, tokens, types)
    tokenizer = _sentencepiece(path, tokens, scores, tokens[0], add_prefix=True)
    _add_tokens(tokenizer, tokens, types)
    special = _Special(bos=1, eos=2, unk=0, pad=None, add_bos=True, add_eos=False)
    _write(directory, tokenizer, tokens, special, {}, [])


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, best first.

    Every way to join two pieces into a third is a merge with the third one's score. Equal scores keep the order
    of the vocabulary.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for index, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], index, ids[left], ids[right]))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _check_tokens(path: Path, tokens: list[str], types: list[int]) -> None:
    if len(types) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens, but types for {len(types)}; convert it again")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path} holds the same token twice, so its tokenizer cannot be rebuilt exactly")
    if not tokens:
        raise CheckpointError(f"{path} holds a tokenizer without tokens; convert the model to GGUF again")


def _gguf_special(header: GgufHeader, count: int, kind: str) -> _Special:
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise CheckpointError(f"{header.path} gives tokenizer.ggml.{name}_token_id {value!r} of {count} tokens")
        ids[name] = value
    # A SentencePiece vocabulary that does not say otherwise wants its BOS.
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool, kind == "llama") and ids["bos"] is not None
    add_eos = header.get("tokenizer.ggml.add_eos_token", bool, False) and ids["eos"] is not None
    return _Special(ids["bos"], ids["eos"], ids["unknown"], ids["padding"], add_bos, add_eos)


def _byte_level(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pre = header.get("tokenizer.ggml.pre", str, "(absent)")
    cut = _pre_tokenizer(header.path, pre)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _stored_merges(header, vocab)
    # Llama 3 takes a whole word that is a token as it is, even where its merges would not build it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_SPLITS.get(pre) == _LLAMA3))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _pre_tokenizer(path: Path, pre: str) -> list[Any]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if pre in _DIGITS:
        return [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre in _PLAIN:
        return [ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre in _SPLITS:
        split = Split(Regex(_SPLITS[pre]), behavior="isolated")
        return [split, ByteLevel(add_prefix_space=False, use_regex=False)]
    known = ", ".join((*_DIGITS, *_PLAIN, *_SPLITS))
    raise CheckpointError(
        f"{path} cuts text by tokenizer.ggml.pre {pre!r}; packlight knows {known}: give the original "
        f"checkpoint directory"
    )


def _stored_merges(header: GgufHeader, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in header.get("tokenizer.ggml.merges", list):
        left, space, right = str(merge).partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(f"{header.path} holds the merge {merge!r}, whose pieces are not in its vocabulary")
        merges.append((left, right))
    return merges


def _sentencepiece(path: Path, tokens: list[str], scores: list[float], unk: str, add_prefix: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if len(scores) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens, but scores for {len(scores)}; convert it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    bytes_known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    model = models.BPE(
        vocab=vocab, merges=merges_from_scores(tokens, scores), unk_token=unk, fuse_unk=True, byte_fallback=bytes_known
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if add_prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if add_prefix else [])])
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    def pick(wanted: tuple[int, ...], special: bool) -> list[AddedToken]:
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in wanted]
        return [AddedToken(token, normalized=False, special=special) for token in chosen]

    tokenizer.add_special_tokens(pick((_UNKNOWN, _CONTROL), special=True))
    tokenizer.add_tokens(pick((_USER,), special=False))


def _write(
    directory: Path,
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    special: _Special,
    extra: Mapping[str, Any],
    more_stops: list[int],
) -> None:
    if special.add_bos or special.add_eos:
        tokenizer.post_processor = _template(tokens, special)
    # Not via Tokenizer.save, whose bytes differ between releases in order and escapes.
    _write_json(directory / "tokenizer.json", json.loads(tokenizer.to_str()))
    ids = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": special.unk, "pad_token": special.pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": special.add_bos,
        "add_eos_token": special.add_eos,
        # transformers would by default tidy spaces before punctuation in what a model wrote.
        "clean_up_tokenization_spaces": False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
        **extra,
    }
    _write_json(directory / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
    stops = [special.eos] if special.eos is not None else []
    stops += [stop for stop in more_stops if stop not in stops]
    generation = {
        "bos_token_id": special.bos,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": special.pad,
    }
    _write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _template(tokens: Sequence[str], special: _Special) -> Any:
    from tokenizers.processors import TemplateProcessing

    single, pair, named = "$A:0", "$B:1", []
    if special.add_bos and special.bos is not None:
        bos = tokens[special.bos]
        single, pair = f"{bos}:0 {single}", f"{bos}:1 {pair}"
        named.append((bos, special.bos))
    if special.add_eos and special.eos is not None:
        eos = tokens[special.eos]
        single, pair = f"{single} {eos}:0", f"{pair} {eos}:1"
        named.append((eos, special.eos))
    return TemplateProcessing(single=single, pair=f"{single} {pair}", special_tokens=named)


def _llama2c_piece(path: Path, token: int, raw: bytes) -> str:
    """llama2.c decodes a vocabulary before it stores it: BOS and EOS between newlines, spaces as spaces.

    Tokens 3 to 258 are the 256 bytes, whatever their text: older files spell them as characters, which then occur
    twice.
    """
    if token < _FIRST_PIECE:
        return ("<unk>", "<s>", "</s>")[token] if token < 3 else f"<0x{token - 3:02X}>"
    try:
        return raw.decode("utf-8").replace(" ", SPACE)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} gives token {token} the bytes {raw[:20]!r}, which are not UTF-8") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
