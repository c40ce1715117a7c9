"""Quality against a straightforward computation in float64 with transformers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.contracts.artifacts import make_artifact
from tests.runtime.architectures import save_architecture
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError
from packlight.measure.quality import POSITIONS, Quality, evaluate, evaluate_reference
from packlight.runtime.load import load_model

# Of different lengths; two are longer than the positions that are worked on at once.
WINDOWS = [
    torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (2, 50, POSITIONS + 1, POSITIONS + 50)
]
FLOAT32 = 1e-4
"""Relative: logits of about ten in float32 carry errors of about 1e-5, and a perplexity as much relative to itself."""


def quiet() -> None:
    return None


@pytest.fixture(scope="module")
def original(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(tied=False)


@pytest.fixture(scope="module")
def changed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on its matrices."""
    directory = tmp_path_factory.mktemp("changed") / "model"
    model = AutoModelForCausalLM.from_pretrained(original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def log_probs(model: PreTrainedModel, windows: list[list[int]]) -> list[torch.Tensor]:
    """(positions, vocab) float64 of every position that predicts one."""
    return [torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1) for ids in windows]


def in_float64(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    return model


def losses(found: list[torch.Tensor]) -> list[torch.Tensor]:
    return [-p[torch.arange(len(p)), torch.tensor(ids[1:])] for p, ids in zip(found, WINDOWS, strict=True)]


def mean_and_error(values: list[torch.Tensor]) -> tuple[float, float]:
    """Over all positions; the standard error of the mean from the windows' means."""
    means = [float(window.mean()) for window in values]
    return float(torch.cat(values).mean()), statistics.stdev(means) / math.sqrt(len(means))


def test_perplexity_is_that_of_the_formula(original: Path) -> None:
    quality, _ = evaluate_reference(load_model(open_checkpoint(original)), WINDOWS, quiet)
    loss, error = mean_and_error(losses(log_probs(in_float64(original), WINDOWS)))
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=FLOAT32)
    assert quality.perplexity_stderr == pytest.approx(math.exp(loss) * error, rel=FLOAT32)
    assert quality.num_tokens == sum(len(ids) - 1 for ids in WINDOWS)
    assert (quality.kl, quality.kl_stderr, quality.top1, quality.top1_stderr) == (0, 0, 1, 0)


def test_kl_and_top1_are_those_of_the_formulas(original: Path, changed: Path) -> None:
    _, reference = evaluate_reference(load_model(open_checkpoint(original)), WINDOWS, quiet)
    quality = evaluate(load_model(open_checkpoint(changed)), WINDOWS, reference, quiet)
    p, q = log_probs(in_float64(original), WINDOWS), log_probs(in_float64(changed), WINDOWS)
    kl, kl_error = mean_and_error([(a.exp() * (a - b)).sum(dim=-1) for a, b in zip(p, q, strict=True)])
    top1, top1_error = mean_and_error([(a.argmax(-1) == b.argmax(-1)).double() for a, b in zip(p, q, strict=True)])
    loss, error = mean_and_error(losses(q))
    assert kl > 0.05 and 0.1 < top1 < 0.95  # there is something to measure
    back, _ = mean_and_error([(b.exp() * (b - a)).sum(dim=-1) for a, b in zip(p, q, strict=True)])
    assert back != pytest.approx(kl, rel=10 * FLOAT32)  # and the other direction would not pass for this one
    assert quality.kl == pytest.approx(kl, rel=FLOAT32)
    assert quality.kl_stderr == pytest.approx(kl_error, rel=1e-3)  # a difference of like means
    assert quality.top1 == pytest.approx(top1) and quality.top1_stderr == pytest.approx(top1_error)
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=FLOAT32)
    assert quality.perplexity_stderr == pytest.approx(math.exp(loss) * error, rel=FLOAT32)


def test_a_model_is_no_distance_from_itself(original: Path) -> None:
    model = load_model(open_checkpoint(original))
    first, reference = evaluate_reference(model, WINDOWS, quiet)
    assert evaluate(load_model(open_checkpoint(original)), WINDOWS, reference, quiet) == first


def test_a_packed_model_is_measured_by_its_own_head(original: Path, tmp_path: Path) -> None:
    directory = make_artifact(original, tmp_path / "out", bits=4, embeddings=4)
    packed = load_model(open_checkpoint(directory))
    _, reference = evaluate_reference(load_model(open_checkpoint(original)), WINDOWS, quiet)
    quality = evaluate(packed, WINDOWS, reference, quiet)
    p, q = log_probs(in_float64(original), WINDOWS), log_probs(packed, WINDOWS)
    kl, _ = mean_and_error([(a.exp() * (a - b)).sum(dim=-1) for a, b in zip(p, q, strict=True)])
    # The head gets some rows at a time here and all at once there, so bfloat16 sums may round differently.
    assert quality.kl == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("name", ["gemma2", "opt"])
def test_what_an_architecture_does_to_its_logits_is_done(name: str, tmp_path: Path) -> None:
    """Gemma 2 caps them; OPT keeps its blocks one level deeper."""
    save_architecture(name, tmp_path / name)
    windows = [ids[:60] for ids in WINDOWS]
    quality, _ = evaluate_reference(load_model(open_checkpoint(tmp_path / name)), windows, quiet)
    found = log_probs(in_float64(tmp_path / name), windows)
    values = [-p[torch.arange(len(p)), torch.tensor(ids[1:])] for p, ids in zip(found, windows, strict=True)]
    assert quality.perplexity == pytest.approx(math.exp(mean_and_error(values)[0]), rel=FLOAT32)


def test_a_head_that_is_not_understood_is_refused(original: Path) -> None:
    model = load_model(open_checkpoint(original))
    forward = model.forward

    def halved(*arguments: object, **options: object) -> object:
        out = forward(*arguments, **options)
        out.logits = out.logits / 2
        return out

    model.forward = halved
    with pytest.raises(CheckpointError, match="LlamaForCausalLM changes its logits in a way"):
        evaluate_reference(model, WINDOWS, quiet)


def test_other_vocabularies_are_refused(original: Path) -> None:
    _, reference = evaluate_reference(load_model(open_checkpoint(original)), WINDOWS, quiet)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    other = LlamaForCausalLM(config).eval()
    with pytest.raises(CheckpointError, match="the vocabularies have 64 and 256 tokens"):
        evaluate(other, [[1, 2, 3]], reference, quiet)


def test_one_window_has_no_standard_error_and_every_window_a_tick(original: Path) -> None:
    model, ticks = load_model(open_checkpoint(original)), []
    quality, reference = evaluate_reference(model, WINDOWS[1:2], lambda: ticks.append("reference"))
    assert quality.perplexity_stderr == 0
    _, reference = evaluate_reference(model, WINDOWS, lambda: ticks.append("reference"))
    evaluate(model, WINDOWS, reference, lambda: ticks.append("subject"))
    assert ticks == ["reference"] * (1 + len(WINDOWS)) + ["subject"] * len(WINDOWS)


def test_rows_carry_the_errors_and_the_text() -> None:
    rows = {row.name: row for row in Quality(9.0, 0.5, 0.1, 0.01, 0.9, 0.02, 510).rows("packed", "a text")}
    assert {name: (row.value, row.spread, row.unit) for name, row in rows.items()} == {
        "perplexity": (9.0, 0.5, "1"),
        "kl": (0.1, 0.01, "nats"),
        "top1": (0.9, 0.02, "1"),
    }
    assert {(row.subject, row.n, row.note) for row in rows.values()} == {("packed", 510, "a text")}
