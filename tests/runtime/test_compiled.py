"""torch.compile in fixed shapes: two graphs and no third, the plain path's logits, and a compiler that is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import UsageError
from packlight.runtime.compiled import CompiledDecoder, compile_body_
from packlight.runtime.fixed_forward import eager_decoder
from packlight.runtime.fixed_shapes import Shapes
from packlight.runtime.load import load_model

SHAPES = Shapes(batch=1, context=64, chunk=16)


def check_against_eager(directory: Path, backend: str) -> None:
    """Compile, then answer prompts of many lengths with recompilation forbidden."""
    torch.compiler.reset()
    counters.clear()
    compiled = CompiledDecoder(load_model(open_checkpoint(directory)), SHAPES, backend)
    plain = eager_decoder(load_model(open_checkpoint(directory)), SHAPES)
    assert compiled.warm_up() > 0
    assert counters["stats"]["unique_graphs"] == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 2, 15, 16, 17, 33, 60):
            ids = torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(length))
            logits = plain.prefill(ids)
            torch.testing.assert_close(compiled.prefill(ids), logits, rtol=1e-4, atol=1e-4)
            token = logits.argmax(dim=-1, keepdim=True)
            for _ in range(3):
                torch.testing.assert_close(compiled.step(token), plain.step(token), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2


def test_no_request_makes_a_third_graph(tiny_model_dir: Callable[..., Path]) -> None:
    check_against_eager(tiny_model_dir(tied=True), backend="eager")


@pytest.mark.slow
def test_compiled_code_computes_what_the_plain_path_computes(tiny_model_dir: Callable[..., Path]) -> None:
    check_against_eager(tiny_model_dir(tied=True), backend="inductor")


def test_a_missing_compiler_is_named_with_its_remedy(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(open_checkpoint(tiny_model_dir(tied=True)))
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UsageError, match=r"needs a C\+\+ compiler and none was found: install one"),
    ):
        CompiledDecoder(model, SHAPES)


def test_a_body_is_compiled_for_one_length_and_left_alone_for_others(tiny_model_dir: Callable[..., Path]) -> None:
    torch.compiler.reset()
    counters.clear()
    plain = load_model(open_checkpoint(tiny_model_dir(tied=True)))
    model = load_model(open_checkpoint(tiny_model_dir(tied=True)))
    compile_body_(model, 20, backend="eager")
    for tokens, graphs in ((7, 0), (20, 1), (20, 1), (8, 1)):
        ids = torch.randint(1, 256, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.inference_mode():
            torch.testing.assert_close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        assert counters["stats"]["unique_graphs"] == graphs


def test_a_torch_that_lies_behind_a_space_is_refused(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", "/with space/torch/__init__.py")
    with pytest.raises(UsageError, match="does not quote paths, and /with space/torch has a space in it"):
        CompiledDecoder(load_model(open_checkpoint(tiny_model_dir(tied=True))), SHAPES)
