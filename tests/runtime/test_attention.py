"""Every attention backend computes what the model's own formula computes, or refuses; and it is the one that ran."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyModel
from tests.runtime.architectures import ALL, forward
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import MissingExtraError, UsageError
from packlight.plan.attention import BACKEND_NAMES
from packlight.runtime import attention_forward, model_decoder
from packlight.runtime.attention import attend, backends, set_backend, use
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.sampling import Sampling

ArchitectureDir = Callable[[str], Path]
MakeModel = Callable[[str], PreTrainedModel]

FAST = ("math", "flash", "tiled")
CAPPED = "gemma2"
"""Its scores are soft-capped, which SDPA does not compute."""
TOLERANCE = 2e-5
PADDING = 9

compiles = pytest.mark.filterwarnings(
    "ignore:_compile flag on create_block_mask:DeprecationWarning",  # how transformers calls it
    "ignore::DeprecationWarning:torch",  # what compiling meets in torch's own modules
    "ignore::UserWarning:torch",
)


@pytest.fixture(scope="session")
def make_model(architecture_dir: ArchitectureDir, tiny_model_dir: TinyModel) -> MakeModel:
    """A tiny model by architecture; `llama` has four heads over two key-value heads."""

    @cache
    def make(name: str) -> PreTrainedModel:
        return load_model(open_checkpoint(tiny_model_dir() if name == "llama" else architecture_dir(name)))

    return make


@pytest.fixture
def llama(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama")


def cases() -> list[Any]:
    """Architectures and backends that compute them."""
    pairs = [(name, backend) for name in ("llama", *ALL) for backend in FAST]
    return [pair for pair in pairs if pair[0] != CAPPED or pair[1] == "tiled"]


def random_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 256, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def padded_run(model: PreTrainedModel, steps: int = 3) -> torch.Tensor:
    """Logits of a left-padded batch, prompt in two chunks and some steps: (batch, tokens both have, vocab)."""
    ids = random_ids(2, 30)
    mask = torch.ones(2, 30 + steps, dtype=torch.int64)
    mask[1, :PADDING] = 0
    ids[1, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    memory, logits = DynamicCache(config=model.config), []
    bounds = [0, 17, 30, *range(31, 31 + steps)]
    for start, stop in pairwise(bounds):
        chunk = ids[:, start:stop] if stop <= 30 else ids[:, :1]
        options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        if model.config.model_type == "gpt2":
            options.pop("position_ids")
        logits.append(forward(model, chunk, memory, **options))
    return torch.cat(logits, dim=1)[:, PADDING:]


@pytest.mark.parametrize(("name", "backend"), cases())
def test_logits_are_those_of_eager(make_model: MakeModel, name: str, backend: str) -> None:
    model, ids = make_model(name), random_ids(2, 40)
    found = []
    for one in ("eager", backend):
        with use(model, one), torch.inference_mode():
            found.append(model(ids, use_cache=False).logits)
    assert (found[0] - found[1]).abs().max() < TOLERANCE
    assert backend == "math" or not torch.equal(found[0], found[1])  # another kernel ran; math has eager's operations


@pytest.mark.parametrize(("name", "backend"), cases())
def test_left_padded_batches_and_chunks_are_those_of_eager(make_model: MakeModel, name: str, backend: str) -> None:
    model = make_model(name)
    with use(model, "eager"):
        wanted = padded_run(model)
    with use(model, backend):
        made = padded_run(model)
    assert torch.isfinite(made).all()
    assert (wanted - made).abs().max() < TOLERANCE


@pytest.mark.parametrize(("name", "backend"), cases())
def test_greedy_tokens_are_those_of_eager(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    """Prefill in chunks into the cache that `generate` allocates, then one token at a time."""
    monkeypatch.setattr(model_decoder, "PREFILL_CHUNK", 16)
    model, prompt = make_model(name), random_ids(1, 37)[0].tolist()
    answers = []
    for one in ("eager", backend):
        with use(model, one):
            answers.append(list(complete(model, prompt, Sampling(max_tokens=20))))
    assert answers[0] == answers[1] and len(answers[0]) == 20


@pytest.mark.parametrize("backend", FAST)
def test_the_empty_rest_of_a_static_cache_is_not_attended_to(llama: PreTrainedModel, backend: str) -> None:
    found, ids = [], random_ids(1, 12)
    for one in ("eager", backend):
        with use(llama, one), torch.inference_mode():
            memory = StaticCache(config=llama.config, max_cache_len=32)
            first = forward(llama, ids, memory)
            found.append(torch.cat([first, forward(llama, ids[:, :1], memory)], dim=1))
    assert (found[0] - found[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("backend", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_to_its_own_rounding(llama: PreTrainedModel, backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, generator=generator) for heads in (4, 2, 2))
    exact = attend("eager", q.double(), k.double(), v.double())
    made = attend(backend, q.to(dtype), k.to(dtype), v.to(dtype))
    assert made.dtype == dtype
    assert (made.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["auto", "math", "flash", "tiled"])
@pytest.mark.parametrize(("tokens", "keys"), [(20, 20), (5, 20), (1, 20)])
def test_attention_without_a_model_is_causal_to_the_end(backend: str, tokens: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, tokens, 8, generator=generator)
    k, v = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    wanted = attend("eager", q, k, v)
    assert wanted.shape == (2, tokens, 6, 8)
    assert (attend(backend, q, k, v) - wanted).abs().max() < 1e-6
    k[:, :, -1], v[:, :, -1] = 100.0, 100.0  # seen by the last query alone
    assert torch.equal(attend(backend, q, k, v)[:, :-1], attend(backend, q, k, v.clone())[:, :-1])
    assert (attend(backend, q, k, v)[:, -1] - wanted[:, -1]).abs().max() > 0.1


def test_attention_without_a_model_has_no_flash_attn() -> None:
    with pytest.raises(UsageError, match="no backend flash-attn: choose auto, eager"):
        attend("flash-attn", *torch.zeros(3, 1, 1, 1, 8))


def test_flash_runs_torchs_flash_kernel_and_math_does_not(llama: PreTrainedModel) -> None:
    ran = {}
    for backend in ("math", "flash"):
        with use(llama, backend), torch.profiler.profile() as profile, torch.inference_mode():
            llama(random_ids(1, 8), use_cache=False)
        ran[backend] = {event.key for event in profile.key_averages()}
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernel in ran["flash"] and kernel not in ran["math"]
    assert "aten::_scaled_dot_product_attention_math" in ran["math"] - ran["flash"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "phi3", "opt", "gpt2", "gpt_neox"])
def test_auto_is_what_transformers_chose(make_model: MakeModel, name: str) -> None:
    model = make_model(name)
    chosen = model.config._attn_implementation
    with use(model, "tiled"):
        assert model.config._attn_implementation == "packlight_tiled"
        set_backend(model, "auto")
        assert model.config._attn_implementation == chosen == "sdpa"
    assert model.config._attn_implementation == chosen


def test_auto_of_a_model_with_soft_caps_is_eager(make_model: MakeModel) -> None:
    model = make_model(CAPPED)
    with use(model, "auto"):
        assert model.config._attn_implementation == "eager"


def test_use_gives_the_model_back_as_it_was_also_after_an_error(llama: PreTrainedModel) -> None:
    with use(llama, "eager"):
        with pytest.raises(ZeroDivisionError), use(llama, "flash"):
            raise ZeroDivisionError
        assert llama.config._attn_implementation == "eager"
        with pytest.raises(UsageError):
            set_backend(llama, "flash-attn")
        assert llama.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "sdpa"


def test_what_is_saved_does_not_name_a_backend(llama: PreTrainedModel, tmp_path: Path) -> None:
    with use(llama, "flash"):
        llama.config.save_pretrained(tmp_path)
    assert "packlight" not in (tmp_path / "config.json").read_text()


def test_a_part_that_keeps_its_own_attention_is_a_refusal(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(llama), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UsageError, match=r"flash does not take LlamaForCausalLM, of which a part keeps sdpa: use auto"):
        set_backend(llama, "flash")


def test_a_class_with_its_own_attention_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llama), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UsageError, match="not written against transformers' AttentionInterface: use auto"):
        set_backend(llama, "eager")
    set_backend(llama, "auto")


def test_flex_refuses_a_class_that_says_it_cannot(make_model: MakeModel) -> None:
    with pytest.raises(
        UsageError, match=r"flex does not take GPT2LMHeadModel, .*_supports_flex_attn = False: use auto"
    ):
        set_backend(make_model("gpt2"), "flex")


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_soft_caps_are_refused(make_model: MakeModel, backend: str) -> None:
    with pytest.raises(UsageError, match=rf"{backend} does not take scores that are soft-capped at 50: use eager"):
        set_backend(make_model(CAPPED), backend)


@pytest.mark.parametrize("backend", FAST)
def test_output_attentions_is_refused_when_it_is_asked_for(llama: PreTrainedModel, backend: str) -> None:
    message = f"{backend} does not take output_attentions, .*: use eager"
    with use(llama, backend), pytest.raises(UsageError, match=message):
        llama(random_ids(1, 4), output_attentions=True)
    with use(llama, "eager"):
        llama.config.output_attentions = True
        try:
            with pytest.raises(UsageError, match=message):
                set_backend(llama, backend)
        finally:
            llama.config.output_attentions = False


@pytest.mark.parametrize("backend", ["flash", "flex", "tiled"])
def test_dropout_in_training_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(llama.config, "attention_dropout", 0.1)
    monkeypatch.setattr(llama, "training", True)
    with pytest.raises(UsageError, match=f"{backend} does not take dropout of 0.1.*: use eager"):
        set_backend(llama, backend)


def test_dropout_of_one_call_is_refused() -> None:
    q, layer = torch.randn(1, 2, 4, 8), torch.nn.Module()
    with pytest.raises(UsageError, match=r"dropout of 0\.5 on a CPU"):
        attention_forward.flash(layer, q, q, q, None, dropout=0.5)


def test_flash_attn_is_refused_on_a_cpu(llama: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="flash-attn does not take the device cpu, only cuda: use flash"):
        set_backend(llama, "flash-attn")


def test_sinks_are_refused_by_the_model(llama: PreTrainedModel) -> None:
    llama.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    try:
        for backend in ("math", "flash", "flex", "tiled"):
            with pytest.raises(UsageError, match=f"{backend} does not take attention sinks.*: use eager"):
                set_backend(llama, backend)
    finally:
        del llama.model.layers[0].self_attn.sinks


def test_what_torch_itself_refuses_is_told_in_its_words() -> None:
    """Strides that no fused kernel takes, which no config tells of."""
    q = torch.randn(1, 2, 8, 4).transpose(2, 3)
    k = torch.randn(1, 2, 4, 8)
    assert torch._fused_sdp_choice(q, k, k) == SDPBackend.MATH.value
    with pytest.raises(UsageError, match=r"flash does not take this call \(.*stride.*\): use auto or math"):
        attention_forward.flash(torch.nn.Module(), q, k, k, None)


def test_a_backend_that_does_not_exist_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="no attention backend 'sdpa': choose one of auto, eager, math, flash"):
        set_backend(llama, "sdpa")


def test_backends_are_named_once_each() -> None:
    assert tuple(backend.name for backend in backends()) == BACKEND_NAMES
    assert len(set(BACKEND_NAMES)) == len(BACKEND_NAMES)
    assert all(backend.summary and "\n" not in backend.summary for backend in backends())


def test_a_missing_package_is_named(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.runtime.attention_case.find_spec", lambda name: None)
    monkeypatch.setattr(type(llama), "device", torch.device("cuda"))
    monkeypatch.setattr(type(llama), "dtype", torch.bfloat16)
    with pytest.raises(MissingExtraError, match=r"flash-attn needs flash-attn, .*packlight\[flash-attn\]"):
        set_backend(llama, "flash-attn")


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", ["llama", CAPPED])
def test_flex_computes_what_eager_does(make_model: MakeModel, name: str) -> None:
    model, ids = make_model(name), random_ids(2, 40)
    found = []
    for one in ("eager", "flex"):
        with use(model, one), torch.inference_mode():
            found.append(model(ids, use_cache=False).logits)
    assert (found[0] - found[1]).abs().max() < TOLERANCE


@pytest.mark.slow
@compiles
def test_what_flex_cannot_compile_is_refused_or_right(llama: PreTrainedModel) -> None:
    """Decoding a left-padded batch on a CPU makes torch 2.13 write C++ that does not compile; never a wrong answer."""
    torch.compiler.reset()
    with use(llama, "eager"):
        wanted = padded_run(llama)
    with use(llama, "flex"):
        try:
            made = padded_run(llama)
        except UsageError as error:
            assert "flex does not take this call, which torch" in str(error) and str(error).endswith(": use auto")
        else:
            assert (wanted - made).abs().max() < TOLERANCE
