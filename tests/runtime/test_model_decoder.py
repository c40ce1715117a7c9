"""Decoders: the same tokens with every cache and without one, padding, chunks, and prompts that share a beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.architectures import ALL
from transformers import AutoModelForCausalLM, PreTrainedModel

from packlight.checkpoint.open import open_checkpoint
from packlight.plan.kv_cache import KINDS
from packlight.runtime import kv_cache
from packlight.runtime import model_decoder as module
from packlight.runtime.decoder import Decoder
from packlight.runtime.generate import generate
from packlight.runtime.load import load_model
from packlight.runtime.model_decoder import CachedDecoder, UncachedDecoder, prefill, step
from packlight.runtime.prompts import common_length, pad, unpad
from packlight.runtime.sampling import Sampling

PROMPT = list(b"The quick brown fox jumps over the lazy dog")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=False)))


def answers(decoder: Decoder, prompts: list[list[int]], tokens: int = 24) -> list[list[int]]:
    """Greedy answers, one list for each prompt."""
    steps = list(generate(decoder, prompts, Sampling(max_tokens=tokens)))
    return [[row[place].id for row in steps if row[place]] for place in range(len(prompts))]


@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_is_answered_as_by_transformers(architecture_dir: Callable[[str], Path], name: str) -> None:
    """Unequal prompts, side by side, with a cache and without."""
    model = load_model(open_checkpoint(architecture_dir(name)))
    theirs = AutoModelForCausalLM.from_pretrained(architecture_dir(name)).eval()
    prompts = [PROMPT, PROMPT[5:12], PROMPT[::-1][:30]]
    ids, mask = pad(prompts)
    wanted = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for decoder in (CachedDecoder(model, 100), UncachedDecoder(model)):
        assert answers(decoder, prompts) == wanted[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("int")])
def test_every_cache_that_is_exact_gives_the_tokens_of_no_cache(tiny: PreTrainedModel, kind: Any) -> None:
    """A window as long as the text loses nothing."""
    prompts = [PROMPT, PROMPT[:9]]
    wanted = answers(UncachedDecoder(tiny), prompts, 60)
    assert answers(CachedDecoder(tiny, 120, kind, 120 if kind == "sliding" else None), prompts, 60) == wanted


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


@pytest.mark.parametrize("chunk", [1, 3, 10])
@pytest.mark.parametrize("kind", ["static", "sliding", "int4"])
def test_padding_longer_than_a_chunk(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, chunk: int, kind: Any
) -> None:
    """The first chunks of a short prompt are nothing but padding."""
    monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    prompts, window = [PROMPT, PROMPT[:2]], 30 if kind == "sliding" else None
    alone = [answers(CachedDecoder(tiny, 100, kind, window), [prompt])[0] for prompt in prompts]
    assert answers(CachedDecoder(tiny, 100, kind, window), prompts) == alone


# --- what prompts have in common --------------------------------------------------------------------------------


class Counted:
    """Counts the tokens that a model computes, over all sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.count += arguments[0].numel()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *raised: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_a_shared_beginning_is_computed_once(tiny: PreTrainedModel, kind: Any) -> None:
    prompts = [PROMPT + list(b" one"), PROMPT + list(b" three"), PROMPT + list(b" and two")]
    wanted = [answers(CachedDecoder(tiny, 100), [prompt], 5)[0] for prompt in prompts]
    decoder = CachedDecoder(tiny, 100, kind)
    with Counted(tiny) as counted:
        assert answers(decoder, prompts, 5) == wanted
    shared = len(PROMPT) + 1  # and a space
    assert decoder.reused == shared
    assert counted.count == shared + 3 * (len(prompts[2]) - shared) + 3 * 4


def test_a_second_prompt_goes_on_where_it_parts_from_the_first(tiny: PreTrainedModel) -> None:
    decoder = CachedDecoder(tiny, 100)
    first = answers(decoder, [PROMPT], 5)[0]
    assert decoder.reused == 0
    longer = PROMPT + first + list(b" more")
    for prompt, reused in ((longer, len(PROMPT) + 4), (PROMPT, len(PROMPT) - 1), ([*PROMPT[:7], 9], 7), ([1, 2], 0)):
        wanted = answers(CachedDecoder(tiny, 100), [prompt], 5)
        with Counted(tiny) as counted:
            assert answers(decoder, [prompt], 5) == wanted
        assert decoder.reused == reused
        assert counted.count == len(prompt) - reused + 4


def test_batches_of_other_sizes_share_too(tiny: PreTrainedModel) -> None:
    decoder = CachedDecoder(tiny, 100)
    tails = [b" a", b" bcd", b" efghi", b" j"]
    for count in (2, 4, 1, 3):
        prompts = [PROMPT + list(tail) for tail in tails[:count]]
        wanted = [answers(CachedDecoder(tiny, 100), [prompt], 5)[0] for prompt in prompts]
        assert answers(decoder, prompts, 5) == wanted
        assert decoder.reused >= len(PROMPT)


@pytest.mark.parametrize("kind", ["growing", "sliding", "int8", "int4"])
def test_caches_that_cannot_be_cut_begin_anew(tiny: PreTrainedModel, kind: Any) -> None:
    window = 20 if kind == "sliding" else None
    decoder = CachedDecoder(tiny, 100, kind, window)
    for prompt in (PROMPT, PROMPT[:30]):
        assert answers(decoder, [prompt], 5) == answers(CachedDecoder(tiny, 100, kind, window), [prompt], 5)
        assert decoder.reused == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=4))
def test_padding_comes_off_again(rows: list[list[int]]) -> None:
    ids, mask = pad(rows)
    assert unpad(ids, mask) == rows
    length = common_length(rows)
    assert all(row[:length] == rows[0][:length] and len(row) > length for row in rows)
    assert any(len(row) == length + 1 or row[length] != rows[0][length] for row in rows)
