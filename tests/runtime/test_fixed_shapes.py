"""Fixed shapes, run eagerly: the tokens of transformers for every architecture, length and padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.architectures import ALL
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.runtime.fixed_forward import check_architecture, eager_decoder
from packlight.runtime.fixed_shapes import FixedShapeDecoder, Shapes
from packlight.runtime.grouped_attention import grouped_sdpa
from packlight.runtime.load import load_model

SHAPES = Shapes(batch=3, context=60, chunk=16)
NEW_TOKENS = 12


def by_transformers(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, new) and their logits (batch, new, vocab)."""
    made: Any = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, dim=1)


def forced(decoder: FixedShapeDecoder, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (batch, new, vocab) while the decoder is fed `tokens`, so that a near tie does no harm."""
    logits = [decoder.prefill(ids, mask)]
    logits += [decoder.step(tokens[:, place : place + 1]) for place in range(tokens.shape[1] - 1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", ["llama", *ALL])
def test_logits_are_those_of_transformers(
    name: str, architecture_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    directory = tiny_model_dir(tied=True) if name == "llama" else architecture_dir(name)
    decoder = eager_decoder(load_model(open_checkpoint(directory)), SHAPES)
    original = load_model(open_checkpoint(directory))
    for length in (1, 15, 16, 17, 40):  # around a chunk, and more than two
        ids = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, : min(3, length - 1)] = 0
        tokens, expected = by_transformers(original, ids, mask, NEW_TOKENS)
        torch.testing.assert_close(forced(decoder, ids, mask, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=False)))


@pytest.fixture
def decoder(tiny_model_dir: Callable[..., Path]) -> FixedShapeDecoder:
    return eager_decoder(load_model(open_checkpoint(tiny_model_dir(tied=False))), SHAPES)


def test_the_context_can_be_filled_to_its_last_token(decoder: FixedShapeDecoder) -> None:
    assert decoder.capacity == SHAPES.context < SHAPES.buffer  # the last chunk is written whole, beyond the context
    decoder.prefill(torch.ones(1, SHAPES.context - 1, dtype=torch.int64))
    decoder.step(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="holds 60 tokens and 61 were asked for"):
        decoder.step(torch.ones(1, 1, dtype=torch.int64))


def test_a_new_prompt_forgets_the_last(decoder: FixedShapeDecoder) -> None:
    ids = torch.arange(1, 6)[None]
    first = decoder.prefill(ids)
    decoder.prefill(torch.full((3, 50), 7))
    assert torch.equal(decoder.prefill(ids), first)
    assert decoder.length == 5


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (torch.ones(1, 0, dtype=torch.int64), None, "empty"),
        (torch.ones(1, 61, dtype=torch.int64), None, "61 were asked for"),
        (torch.ones(4, 2, dtype=torch.int64), None, "4 sequences"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]), "padded on its left"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[0, 0, 0]]), "padded on its left"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 1]]), "padded on its left"),
    ],
)
def test_prompts_that_do_not_fit(
    decoder: FixedShapeDecoder, ids: torch.Tensor, mask: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        decoder.prefill(ids, mask)


def test_strides_and_dtypes_of_tokens_do_not_matter() -> None:
    seen: list[torch.Tensor] = []

    def forward(ids: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(ids)
        return torch.zeros(2, 5)

    decoder = FixedShapeDecoder(Shapes(batch=2, context=8, chunk=4), forward, forward, [], [])
    decoder.prefill(torch.ones(2, 3, dtype=torch.int32))
    decoder.step(torch.arange(6, dtype=torch.int32).reshape(2, 3)[:, 1:2])
    assert [ids.dtype for ids in seen] == [torch.int64, torch.int64]
    assert all(ids.is_contiguous() for ids in seen)
    assert seen[1].tolist() == [[1], [4]]


def test_a_step_is_one_token_for_each_sequence(decoder: FixedShapeDecoder) -> None:
    decoder.prefill(torch.ones(2, 4, dtype=torch.int64))
    for ids in (torch.ones(1, 1), torch.ones(2, 2)):
        with pytest.raises(UsageError, match="takes 2 tokens, one per sequence"):
            decoder.step(ids.to(torch.int64))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"context": 0}, {"chunk": -1}])
def test_sizes_are_positive(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(sizes))} must be at least 1"):
        Shapes(**sizes)


def test_grouped_attention_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 5, 9) > 0.3
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    assert found.shape == (2, 5, 6, 8)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layer_types", ["full_attention", "linear_attention"], "layers of the kind linear_attention"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "of the kind dynamic"),
        ("rope_parameters", {"full_attention": {"rope_type": "longrope"}}, "of the kind longrope"),
    ],
)
def test_architectures_that_are_refused(
    tiny_model_dir: Callable[..., Path], field: str, value: object, says: str
) -> None:
    model = load_model(open_checkpoint(tiny_model_dir(tied=False)))
    check_architecture(model)
    object.__setattr__(model.config, field, value)
    with pytest.raises(UsageError, match=says):
        check_architecture(model)


def test_a_class_that_is_no_single_graph_is_refused(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(open_checkpoint(tiny_model_dir(tied=False)))
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(UsageError, match="does not write LlamaForCausalLM as one graph"):
        check_architecture(model)


def test_whole_chunks_that_prompts_have_in_common_are_computed_once(tiny: PreTrainedModel) -> None:
    """The third prompt parts from the second inside a chunk, the fourth begins anew."""
    decoder = eager_decoder(tiny, Shapes(1, 100, 8))
    first = list(range(1, 31))
    for prompt, reused in ((first, 0), ([*first, 5, 6], 24), ([*first[:20], 9], 16), ([7, 8, 9], 0)):
        found = decoder.prefill(torch.tensor([prompt]))
        assert decoder.reused == reused
        torch.testing.assert_close(found, eager_decoder(tiny, Shapes(1, 100, 8)).prefill(torch.tensor([prompt])))
        decoder.step(torch.tensor([[3]]))


def test_a_freed_decoder_holds_nothing_and_begins_anew(tiny: PreTrainedModel) -> None:
    decoder = eager_decoder(tiny, Shapes(1, 100, 8))
    wanted = decoder.prefill(torch.tensor([[1, 2, 3]]))
    assert decoder.cache_bytes() > 0
    for _ in range(2):
        decoder.free()
        assert decoder.cache_bytes() == 0
    torch.testing.assert_close(decoder.prefill(torch.tensor([[1, 2, 3]])), wanted)
    assert decoder.cache_bytes() > 0 and decoder.reused == 0
