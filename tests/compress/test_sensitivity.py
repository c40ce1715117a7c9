"""The estimate of what rounding costs, against gradients of the whole model and against what it really costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import save_llama

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress import sensitivity as under_test
from packlight.compress.calibration import CalibrationText, prepare
from packlight.compress.sensitivity import known_losses, sensitivity
from packlight.compress.walk import Calibration
from packlight.ops.grid import quantize
from packlight.runtime.load import load_model
from packlight.spec import Grid

GRIDS = [Grid(8, 32, False), Grid(6, 32, False), Grid(4, 32, False), Grid(3, 32, False)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("models") / "model"
    return open_checkpoint(save_llama(directory, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(torch.randint(0, 256, (12, 64), generator=generator).tolist(), batch=5)


@torch.no_grad()
def real_cost(checkpoint: Checkpoint, calibration: Calibration, name: str, grid: Grid) -> float:
    """KL divergence of the model with one matrix rounded."""
    exact, changed = load_model(checkpoint), load_model(checkpoint)
    weight = changed.get_parameter(name)
    weight.copy_(quantize(weight.data, grid, torch.float32).dequantize())
    ids = torch.tensor(calibration.windows)
    log_p, log_q = (torch.log_softmax(model(ids).logits, dim=-1) for model in (exact, changed))
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def test_the_estimate_is_near_what_rounding_costs(checkpoint: Checkpoint, calibration: Calibration) -> None:
    losses = sensitivity(checkpoint, calibration, GRIDS, GRIDS, torch.float32, clip="minmax")
    ratios = []
    for tensor in checkpoint.spec.quantizable:
        for grid in GRIDS[:2]:
            ratios.append(losses[tensor.name][str(grid)] / real_cost(checkpoint, calibration, tensor.name, grid))
    assert 0.7 < sum(ratios) / len(ratios) < 1.4, ratios
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios  # every eighth row stands for a matrix of 32 to 128


def test_fewer_bits_cost_more_and_every_matrix_is_there(checkpoint: Checkpoint, calibration: Calibration) -> None:
    losses = sensitivity(checkpoint, calibration, GRIDS, GRIDS, torch.bfloat16)
    matrices = {tensor.name for tensor in checkpoint.spec.tensors if tensor.kind != "other"}
    assert losses.keys() == matrices
    for by_grid in losses.values():
        costs = [by_grid[str(grid)] for grid in GRIDS]
        assert costs == sorted(costs)
        assert costs[0] > 0


def test_a_grid_that_fits_no_row_is_left_out(checkpoint: Checkpoint, calibration: Calibration) -> None:
    losses = sensitivity(checkpoint, calibration, [Grid(4, 128)], [Grid(8)], torch.bfloat16)
    assert losses["model.layers.0.mlp.down_proj.weight"].keys() == {"int4-g128-sym"}
    assert losses["model.layers.0.mlp.up_proj.weight"] == {}


def test_the_gradient_is_that_of_the_whole_model(
    checkpoint: Checkpoint, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pulled back through the first block is what autograd pulls back through it in the whole model."""
    seen: dict[int, torch.Tensor] = {}
    backward = under_test._backward

    def noting(run: Any, module: Any, place: int, gradient: torch.Tensor, matrices: Any) -> Any:
        seen[place + 1] = gradient.clone()
        before, found = backward(run, module, place, gradient, matrices)
        seen[place] = before.clone()
        return before, found

    monkeypatch.setattr(under_test, "_backward", noting)
    sensitivity(checkpoint, calibration, GRIDS[:1], GRIDS[:1], torch.float32)
    model = load_model(checkpoint)
    ids = torch.tensor(calibration.windows)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    (pulled_back,) = torch.autograd.grad(out[1], embeds, seen[1])
    torch.testing.assert_close(pulled_back, seen[0], rtol=1e-3, atol=1e-6)


def test_the_second_time_comes_from_the_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    text = prepare(checkpoint, CalibrationText(windows=3, window=32), 1.0)
    first = known_losses(checkpoint, text, GRIDS, GRIDS, "bfloat16", lambda: None)
    monkeypatch.setattr(under_test, "sensitivity", lambda *arguments, **options: pytest.fail("done again"))
    assert known_losses(checkpoint, text, GRIDS, GRIDS, "bfloat16", lambda: None) == first
    with pytest.raises(pytest.fail.Exception, match="done again"):
        known_losses(checkpoint, text, GRIDS[:1], GRIDS, "bfloat16", lambda: None)
