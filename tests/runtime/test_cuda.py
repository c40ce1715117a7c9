"""The runtime on a CUDA device: the tokens of transformers there, and the numbers that the CPU computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.driver import call
from tests.conftest import TinyModel
from tests.contracts.artifacts import make_artifact
from transformers import AutoModelForCausalLM, PreTrainedModel

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.plan.kv_cache import KINDS, KVCacheKind
from packlight.runtime.attention import attend, use
from packlight.runtime.bitsandbytes import load_with
from packlight.runtime.compiled import CompiledDecoder
from packlight.runtime.device import choose_device
from packlight.runtime.fixed_forward import eager_decoder
from packlight.runtime.fixed_shapes import Shapes
from packlight.runtime.generate import generate
from packlight.runtime.load import load_model
from packlight.runtime.loader import LOADERS
from packlight.runtime.model_decoder import CachedDecoder, UncachedDecoder
from packlight.runtime.packed import PackedLinear
from packlight.runtime.sampling import Sampling

CUDA = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
PROMPT = list(b"The quick brown fox jumps over the lazy dog")
PROMPTS = [PROMPT, PROMPT[:5], PROMPT[:21]]
GREEDY = Sampling(max_tokens=60)
NEAR = {"rtol": 1e-3, "atol": 1e-3}
"""Two devices add up in another order."""


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: TinyModel) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir()), device=CUDA)


@pytest.fixture(scope="module")
def on_cpu(tiny_model_dir: TinyModel) -> PreTrainedModel:
    return load_model(open_checkpoint(tiny_model_dir()))


def answers(decoder: Any, prompts: list[list[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(decoder, prompts, sampling):
        for row, token in zip(rows, tokens, strict=True):
            assert token is not None
            row.append(token.id)
    return rows


def of_transformers(directory: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory).to(CUDA).eval()
    ids = torch.tensor([prompt], device=CUDA)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY.max_tokens, **options)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def logits(decoder: Any, steps: int = 100) -> Iterator[torch.Tensor]:
    """Of a prompt and of so many fixed tokens behind it, on the CPU."""
    ids = torch.randint(1, 256, (2, len(PROMPT) + steps), generator=torch.Generator().manual_seed(3))
    yield decoder.prefill(ids[:, : len(PROMPT)]).cpu()
    for one in ids[:, len(PROMPT) :].split(1, dim=1):
        yield decoder.step(one).cpu()


def test_auto_is_the_gpu() -> None:
    assert choose_device("auto") == choose_device("cuda") == CUDA and choose_device("cpu") == "cpu"


def test_everything_is_on_the_device(tiny: PreTrainedModel) -> None:
    tensors = [*tiny.parameters(), *tiny.buffers()]
    assert {tensor.device.type for tensor in tensors} == {CUDA}


def test_greedy_tokens_are_those_of_transformers(tiny: PreTrainedModel, tiny_model_dir: TinyModel) -> None:
    found = answers(CachedDecoder(tiny, 128), [PROMPT])[0]
    assert found == of_transformers(tiny_model_dir(), PROMPT)
    assert len(set(found)) > 5


def test_a_padded_batch_is_answered_as_each_prompt_alone(tiny: PreTrainedModel, tiny_model_dir: TinyModel) -> None:
    for decoder in (CachedDecoder(tiny, 128), UncachedDecoder(tiny)):
        assert answers(decoder, PROMPTS) == [of_transformers(tiny_model_dir(), prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_computes_what_it_computes_on_a_cpu(
    tiny: PreTrainedModel, on_cpu: PreTrainedModel, kind: KVCacheKind
) -> None:
    """150 tokens: quantized caches encode a few groups of them, sliding ones forget."""
    window = 40 if kind == "sliding" else None
    there, here = (CachedDecoder(model, 150, kind, window) for model in (tiny, on_cpu))
    for found, wanted in zip(logits(there), logits(here), strict=True):
        # A code that lies between two may fall to either side.
        near = {"rtol": 0.05, "atol": 0.05} if kind.startswith("int") else NEAR
        torch.testing.assert_close(found, wanted, **near)
    assert there.cache_bytes() == here.cache_bytes() > 0


def test_where_each_cache_lies(tiny: PreTrainedModel) -> None:
    for kind in KINDS:
        decoder = CachedDecoder(tiny, 128, kind, 40 if kind == "sliding" else None)
        decoder.prefill(torch.tensor([PROMPT]))
        assert decoder.cache is not None
        keys = [layer.keys for layer in decoder.cache.layers if isinstance(layer.keys, torch.Tensor)]
        assert {each.device.type for each in keys} == {"cpu" if kind == "offloaded" else CUDA}
        assert kind != "offloaded" or all(each.is_pinned() for each in keys)


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_a_common_beginning_is_computed_once(tiny: PreTrainedModel, kind: KVCacheKind) -> None:
    batch = [[*PROMPT, 40, 41], [*PROMPT, 42]]
    decoder = CachedDecoder(tiny, 128, kind)
    found = answers(decoder, batch)
    assert decoder.reused >= len(PROMPT)
    assert found == [answers(CachedDecoder(tiny, 128), [prompt])[0] for prompt in batch]
    assert decoder.cache is not None
    if kind == "offloaded":
        assert all(layer.keys.is_pinned() for layer in decoder.cache.layers if isinstance(layer.keys, torch.Tensor))


def test_no_kernel_that_is_planned_for_each_length(tiny: PreTrainedModel) -> None:
    found = []
    handle = tiny.register_forward_pre_hook(lambda *_: found.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for decoder in (CachedDecoder(tiny, 128), UncachedDecoder(tiny)):
        answers(decoder, [PROMPT], Sampling(max_tokens=3))
    handle.remove()
    assert not any(found) and len(found) == 6 and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("backend", ["eager", "math", "tiled"])
def test_backends_compute_one_thing(tiny: PreTrainedModel, on_cpu: PreTrainedModel, backend: str) -> None:
    wanted = list(logits(CachedDecoder(on_cpu, 150)))
    with use(tiny, backend):
        for found, each in zip(logits(CachedDecoder(tiny, 150)), wanted, strict=True):
            torch.testing.assert_close(found, each, **NEAR)


@compiles
def test_flex_computes_it_too(tiny: PreTrainedModel, on_cpu: PreTrainedModel) -> None:
    wanted = list(logits(CachedDecoder(on_cpu, 150), 1))
    with use(tiny, "flex"):
        for found, each in zip(logits(CachedDecoder(tiny, 150), 1), wanted, strict=True):
            torch.testing.assert_close(found, each, **NEAR)


def test_flash_in_bfloat16_is_near_and_refuses_the_rest(tiny_model_dir: TinyModel, tiny: PreTrainedModel) -> None:
    model = load_model(open_checkpoint(tiny_model_dir()), "bfloat16", CUDA)
    wanted = list(logits(CachedDecoder(model, 150)))
    with use(model, "flash"):
        for found, each in zip(logits(CachedDecoder(model, 150)), wanted, strict=True):
            torch.testing.assert_close(found, each, rtol=0.1, atol=0.15)
        with pytest.raises(UsageError, match="dense mask on CUDA"):
            answers(CachedDecoder(model, 128), PROMPTS)
    with pytest.raises(UsageError, match="float32 on CUDA"), use(tiny, "flash"):
        pass


@pytest.mark.parametrize("tokens", [1, 77, 512])
def test_a_bare_layer(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 64, generator=generator) for heads in (9, 3, 3))
    wanted = attend("math", q, k, v)
    for backend in ("eager", "math", "flash"):
        found = attend(backend, *(each.to(CUDA, torch.bfloat16) for each in (q, k, v)))
        torch.testing.assert_close(found.float().cpu(), wanted, rtol=0.05, atol=0.03)


@compiles
def test_a_compiled_model(tiny_model_dir: TinyModel) -> None:
    torch.compiler.reset()
    shapes = Shapes(batch=1, context=128, chunk=32)
    compiled, plain = (
        make(load_model(open_checkpoint(tiny_model_dir()), device=CUDA), shapes)
        for make in (CompiledDecoder, eager_decoder)
    )
    assert compiled.warm_up() > 0
    assert answers(compiled, [PROMPT]) == answers(plain, [PROMPT]) == [of_transformers(tiny_model_dir(), PROMPT)]


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"bits": 3, "embeddings": 4}, {"bits": 4, "symmetric": False}, {"bits": 8, "embeddings": 8}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_run_on_the_reference_kernel(
    tiny_model_dir: TinyModel, tmp_path: Path, options: dict[str, Any], tied: bool, dtype: str
) -> None:
    """In bfloat16 a CPU has kernels of its own for these grids, and CUDA has none."""
    group = None if options["bits"] == 8 else 32
    artifact = make_artifact(tiny_model_dir(tied=tied), tmp_path / "out", dtype=dtype, group_size=group, **options)
    there, here = (load_model(open_checkpoint(artifact), device=device) for device in (CUDA, "cpu"))
    assert {module.kernel for module in there.modules() if isinstance(module, PackedLinear)} == {"reference"}
    near = NEAR if dtype == "float32" else {"rtol": 0.1, "atol": 0.15}
    wanted = logits(CachedDecoder(here, 150), 5)
    for found, each in zip(logits(CachedDecoder(there, 150), 5), wanted, strict=True):
        torch.testing.assert_close(found.float(), each.float(), **near)


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_of_bitsandbytes(tiny_model_dir: TinyModel, on_cpu: PreTrainedModel, loader: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_with(open_checkpoint(tiny_model_dir()), loader, "bfloat16", CUDA)
    wanted = list(logits(CachedDecoder(on_cpu, 150), 3))
    found = list(logits(CachedDecoder(model, 150), 3))
    error = max(float((one.float() - each).std() / each.std()) for one, each in zip(found, wanted, strict=True))
    assert 0.001 < error < (0.06 if loader == "bnb-int8" else 0.5)


def test_a_user_asks_for_a_device(tiny_model_dir: TinyModel) -> None:
    found = {}
    for device in ("auto", "cpu", "cuda"):
        words = ("--raw", "--max-tokens", 12, "--prompt", "The quick brown", "--json", "--device", device)
        ended = call("generate", tiny_model_dir(), *words)
        assert ended.code == 0, ended.err
        found[device] = json.loads(ended.out)["tokens"]
    assert found["auto"] == found["cpu"] == found["cuda"]
