"""Each cache answers as transformers' own does, holds the bytes that were planned, and says when it is full."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.architectures import CONFIGS, forward
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import TargetError, UsageError
from packlight.plan.kv_cache import GROUP, KINDS, RECENT, kind_bytes
from packlight.runtime import kv_cache
from packlight.runtime.kv_offloaded import OffloadedLayer
from packlight.runtime.kv_quantized import QuantizedLayer
from packlight.runtime.kv_sliding import SlidingLayer
from packlight.runtime.kv_static import StaticLayer
from packlight.runtime.load import load_model
from packlight.runtime.model_decoder import CachedDecoder
from packlight.spec import ModelSpec


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir(tied=True)))


@pytest.fixture(scope="module")
def tiny_spec(tiny_model_dir: Callable[..., Path]) -> ModelSpec:
    return open_checkpoint(tiny_model_dir(tied=True)).spec


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
            found = forward(model, chunk, ours)
            wanted = forward(model, chunk, theirs)
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
            found = forward(model, one, ours)
            torch.testing.assert_close(found, forward(model, one, theirs))
            torch.testing.assert_close(found, whole[:, place : place + 1])


def test_the_filled_part_is_handed_out_as_a_view() -> None:
    layer = StaticLayer(10)
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
    layer = StaticLayer(5)
    layer.update(*keys_and_values(5))
    with pytest.raises(UsageError, match="holds 5 tokens and 6 were asked for"):
        layer.update(*keys_and_values(1))
    assert layer.get_seq_length() == 5
    layer.reset()
    found = layer.update(*keys_and_values(2, seed=3))
    assert torch.equal(found[0], keys_and_values(2, seed=3)[0])


def test_a_prompt_larger_than_the_cache() -> None:
    with pytest.raises(UsageError, match="holds 5 tokens and 6 were asked for"):
        StaticLayer(5).update(*keys_and_values(6))


def test_the_overflow_reaches_whoever_runs_the_model(tiny: PreTrainedModel) -> None:
    cache = kv_cache.allocate(tiny.config, 4)
    with pytest.raises(UsageError, match="shorten the prompt"), torch.inference_mode():
        forward(tiny, torch.ones(1, 5, dtype=torch.int64), cache)


def test_the_bytes_are_those_that_were_asked_for(tiny: PreTrainedModel) -> None:
    cache = kv_cache.allocate(tiny.config, 50)
    with torch.inference_mode():
        forward(tiny, torch.ones(2, 1, dtype=torch.int64), cache)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    # 2 layers of keys and values: 2 users, 2 heads, 50 tokens, 16 wide, 4 bytes
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 2 * 2 * (2 * 2 * 50 * 16 * 4)


def test_layers_without_keys_and_values_get_the_cache_of_transformers() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    assert isinstance(kv_cache.allocate(config, 8), DynamicCache)
    kinds = {type(layer) for layer in kv_cache.allocate(CONFIGS["gemma3"](), 8).layers}
    assert kinds == {StaticLayer}


# --- all kinds --------------------------------------------------------------------------------------------------


def run(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of all positions, (batch, tokens, vocab), computed in chunks of these lengths."""
    with torch.inference_mode():
        parts = [forward(model, chunk, cache) for chunk in ids.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("users", [1, 2])
def test_the_bytes_are_those_that_were_planned(
    tiny: PreTrainedModel, tiny_spec: ModelSpec, kind: Any, users: int
) -> None:
    tokens, window = 150, 40 if kind == "sliding" else None
    cache = kv_cache.allocate(tiny.config, tokens, kind, window)
    assert kv_cache.held_bytes(cache) == 0
    run(tiny, cache, torch.ones(users, tokens, dtype=torch.int64), [100] + [1] * 50)
    assert kv_cache.held_bytes(cache) == kind_bytes(tiny_spec, kind, tokens, users, "float32", window).held


@pytest.mark.parametrize("kind", KINDS)
def test_full_to_the_last_token(tiny: PreTrainedModel, kind: Any) -> None:
    """Room for one token, and for all of the context; one more is refused where the room is fixed."""
    for capacity in (1, 256):
        cache = kv_cache.allocate(tiny.config, capacity, kind, 300 if kind == "sliding" else None)
        run(tiny, cache, torch.ones(1, capacity, dtype=torch.int64), [capacity])
        assert cache.get_seq_length() == capacity
        if kind != "growing":
            with pytest.raises(UsageError, match=f"holds {capacity} tokens and {capacity + 1} were asked for"):
                run(tiny, cache, torch.ones(1, 1, dtype=torch.int64), [1])
        cache.reset()
        assert cache.get_seq_length() == 0


def test_offloaded_logits_are_those_of_a_static_cache(tiny: PreTrainedModel) -> None:
    ids = torch.randint(1, 256, (2, 30), generator=torch.Generator().manual_seed(1))
    caches = [kv_cache.allocate(tiny.config, 30, kind) for kind in ("offloaded", "static")]
    found, wanted = (run(tiny, cache, ids, [20] + [1] * 10) for cache in caches)
    assert torch.equal(found, wanted)


def test_an_offloaded_layer_is_out_of_memory_once_another_is_in(tiny: PreTrainedModel) -> None:
    """What the system says: pages of the mapping that are resident, from /proc."""
    first, second = OffloadedLayer.chain(2, 4096)
    for layer in (first, second):
        layer.update(torch.ones(1, 2, 4096, 16), torch.ones(1, 2, 4096, 16))
    size = 2 * 4096 * 16 * 4
    assert resident(first) == 0
    assert resident(second) == 2 * size
    keys, _ = first.update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    assert (keys == 1).all()  # what was handed back is still in the file
    assert resident(second) == 0


def resident(layer: OffloadedLayer) -> int:
    """Resident bytes of a layer's buffers."""
    starts = {buffer.data_ptr() for buffer in (layer.keys, layer.values) if buffer is not None}
    found, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_inside = any(int(mapping[1], 16) <= start < int(mapping[2], 16) for start in starts)
        elif is_inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_an_offloaded_cache_needs_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(TargetError, match=r"no room for a KV cache of .*: No space left on device; free space or set"):
        OffloadedLayer.chain(1, 8)[0].update(*keys_and_values(4))


# --- sliding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_windows_of_the_model_lose_nothing(architecture_dir: Callable[[str], Path], name: str) -> None:
    model = load_model(open_checkpoint(architecture_dir(name)))
    ids = torch.randint(1, 256, (2, 60), generator=torch.Generator().manual_seed(1))
    sliding, static = (kv_cache.allocate(model.config, 60, kind) for kind in ("sliding", "static"))
    chunks = [20, 1, 3, 15, *[1] * 21]
    torch.testing.assert_close(run(model, sliding, ids, chunks), run(model, static, ids, chunks))
    assert kv_cache.held_bytes(sliding) < kv_cache.held_bytes(static)


def test_a_window_never_holds_more_than_its_window() -> None:
    layer = SlidingLayer(10)
    for tokens in (4, 30, 1, 9, 10, 1):
        keys, values = keys_and_values(tokens, seed=tokens)
        before = 0 if layer.keys is None else layer.held
        found = layer.update(keys, values)
        assert found[0].shape[2] == before + tokens
        assert torch.equal(found[0][:, :, before:], keys) and torch.equal(found[1][:, :, before:], values)
        assert layer.held < 10
        assert layer.keys is not None and layer.keys.untyped_storage().nbytes() == 2 * 3 * 9 * 8 * 4
    assert layer.get_seq_length() == 55


@pytest.mark.parametrize("window", [1, 2, 7, 39, 40, 1000])
def test_a_window_of_the_users_is_what_each_query_sees(tiny: PreTrainedModel, window: int) -> None:
    """Beside one pass over everything under a mask of that width."""
    ids = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        places = torch.arange(40)
        seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - window)
        mask = torch.zeros(2, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
        wanted = tiny(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    decoder = CachedDecoder(tiny, 40, "sliding", window)
    decoder.prefill(ids[:, :30])
    for place in range(30, 40):
        found = decoder.step(ids[:, place : place + 1])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("kind", "window", "said"),
    [
        ("sliding", None, "attends to all tokens: say how many"),
        ("sliding", 0, "holds at least 1 token, not 0"),
        ("static", 5, "a window belongs to the sliding KV cache, not to the static one"),
    ],
)
def test_windows_that_make_no_sense(tiny: PreTrainedModel, kind: Any, window: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kv_cache.allocate(tiny.config, 10, kind, window)


def test_a_window_beside_the_model_s_own() -> None:
    with pytest.raises(UsageError, match="has windows of its own, of 8 tokens"):
        kv_cache.allocate(CONFIGS["mistral"](), 10, "sliding", 5)


# --- quantized --------------------------------------------------------------------------------------------------


def test_new_tokens_are_seen_as_they_are_and_old_ones_as_codes() -> None:
    layer = QuantizedLayer(200, 4)
    keys, values = (torch.randn(2, 3, 200, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for start, end in ((0, 100), (100, 101), (101, 150), (150, 200)):
        found = layer.update(keys[:, :, start:end], values[:, :, start:end])
        exact = slice(max(0, start - RECENT), end)
        assert torch.equal(found[0][:, :, exact], keys[:, :, exact])
        assert torch.equal(found[1][:, :, exact], values[:, :, exact])
        assert found[0].shape[2] == end
        assert RECENT <= layer.recent < RECENT + GROUP and layer.coded + layer.recent == end
    old = slice(0, layer.coded)
    assert not torch.equal(layer._old_keys(), keys[:, :, old])
    assert (layer._old_keys() - keys[:, :, old]).abs().max() < 0.3  # half a step of 4 bits over a range of six


@pytest.mark.parametrize(("kind", "most"), [("int8", 1e-4), ("int4", 0.02)])
def test_quantized_caches_stay_within_their_kl(tiny: PreTrainedModel, kind: Any, most: float) -> None:
    ids = torch.randint(1, 256, (2, 256), generator=torch.Generator().manual_seed(1))
    static, quantized = (kv_cache.allocate(tiny.config, 256, each) for each in ("static", kind))
    chunks = [128] + [16] * 8
    p, q = (torch.log_softmax(run(tiny, cache, ids, chunks), -1) for cache in (static, quantized))
    found = float((p.exp() * (p - q)).sum(-1)[:, 128:].mean())
    assert 0 < found < most


def test_heads_that_do_not_divide_into_groups() -> None:
    with pytest.raises(UsageError, match="heads of 12 channels do not divide into groups of 8 to 32"):
        QuantizedLayer(50, 4).update(torch.ones(1, 1, 4, 12), torch.ones(1, 1, 4, 12))


@pytest.mark.parametrize("kind", ["sliding", "int8", "int4", "offloaded"])
def test_other_kinds_need_keys_and_values(kind: Any) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UsageError, match=f"layers without keys and values, which the {kind} KV cache cannot hold"):
        kv_cache.allocate(config, 8, kind)
