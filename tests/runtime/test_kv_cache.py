"""The preallocated cache answers as transformers' own does, and says when it is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.runtime.architectures import CONFIGS
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.runtime import kv_cache
from packlight.runtime.kv_cache import PreallocatedLayer
from packlight.runtime.load import load_model


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=True)))


def keys_and_values(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 8, generator=generator), torch.randn(2, 3, tokens, 8, generator=generator)


@pytest.mark.parametrize("name", ["tiny", "mistral", "gemma2"])
@pytest.mark.parametrize("users", [1, 3])
def test_logits_are_those_with_the_cache_of_transformers(
    tiny: PreTrainedModel, architecture_dir: Callable[[str], Path], name: str, users: int
) -> None:
    """The same prompt in the same chunks, then token by token: equal bit for bit."""
    model = tiny if name == "tiny" else load_model(open_checkpoint(architecture_dir(name)))
    ids = torch.randint(1, 256, (users, 30), generator=torch.Generator().manual_seed(1))
    ours = kv_cache.allocate(model.config, 30)
    # Without the config: a cache that keeps all tokens of every layer, as ours does; the masks do the windows.
    theirs = DynamicCache()
    with torch.inference_mode():
        for chunk in (ids[:, :11], ids[:, 11:12], ids[:, 12:25], *ids[:, 25:].split(1, dim=1)):
            found = model(chunk, past_key_values=ours, use_cache=True).logits
            wanted = model(chunk, past_key_values=theirs, use_cache=True).logits
            assert torch.equal(found, wanted)
    assert ours.get_seq_length() == theirs.get_seq_length() == 30


def test_windows_are_kept_by_the_masks(architecture_dir: Callable[[str], Path]) -> None:
    """Beside transformers' own sliding cache, and beside no cache at all."""
    model = load_model(open_checkpoint(architecture_dir("mistral")))
    ids = torch.randint(1, 256, (1, 30), generator=torch.Generator().manual_seed(1))
    ours, theirs = kv_cache.allocate(model.config, 30), DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        for place in range(30):
            one = ids[:, place : place + 1]
            found = model(one, past_key_values=ours, use_cache=True).logits
            torch.testing.assert_close(found, model(one, past_key_values=theirs, use_cache=True).logits)
            torch.testing.assert_close(found, whole[:, place : place + 1])


def test_the_filled_part_is_handed_out_as_a_view() -> None:
    layer = PreallocatedLayer(10)
    keys, values = keys_and_values(4)
    found = layer.update(keys, values)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert layer.keys is not None and layer.values is not None
    assert layer.keys.shape == (2, 3, 10, 8)
    for view, buffer in zip(found, (layer.keys, layer.values), strict=True):
        assert view.data_ptr() == buffer.data_ptr()
    more = keys_and_values(3, seed=1)
    found = layer.update(*more)
    assert torch.equal(found[0], torch.cat((keys, more[0]), dim=2))
    assert torch.equal(found[1], torch.cat((values, more[1]), dim=2))
    assert found[0].data_ptr() == layer.keys.data_ptr()
    assert layer.get_seq_length() == 7 and layer.get_max_length() == 10


def test_it_fills_up_to_the_last_token_and_no_further() -> None:
    layer = PreallocatedLayer(5)
    layer.update(*keys_and_values(5))
    with pytest.raises(UsageError, match="holds 5 tokens and 6 were asked for"):
        layer.update(*keys_and_values(1))
    assert layer.get_seq_length() == 5
    layer.reset()
    found = layer.update(*keys_and_values(2, seed=3))
    assert torch.equal(found[0], keys_and_values(2, seed=3)[0])


def test_a_prompt_larger_than_the_cache() -> None:
    with pytest.raises(UsageError, match="holds 5 tokens and 6 were asked for"):
        PreallocatedLayer(5).update(*keys_and_values(6))


def test_the_overflow_reaches_whoever_runs_the_model(tiny: PreTrainedModel) -> None:
    cache = kv_cache.allocate(tiny.config, 4)
    with pytest.raises(UsageError, match="shorten the prompt"), torch.inference_mode():
        tiny(torch.ones(1, 5, dtype=torch.int64), past_key_values=cache, use_cache=True)


def test_the_bytes_are_those_that_were_asked_for(tiny: PreTrainedModel) -> None:
    cache = kv_cache.allocate(tiny.config, 50)
    with torch.inference_mode():
        tiny(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    # 2 layers of keys and values: 2 users, 2 heads, 50 tokens, 16 wide, 4 bytes
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 2 * 2 * (2 * 2 * 50 * 16 * 4)


def test_layers_without_keys_and_values_get_the_cache_of_transformers() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    assert isinstance(kv_cache.allocate(config, 8), DynamicCache)
    kinds = {type(layer) for layer in kv_cache.allocate(CONFIGS["gemma3"](), 8).layers}
    assert kinds == {PreallocatedLayer}
