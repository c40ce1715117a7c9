"""The estimate of what rounding costs, against gradients of the whole model and against what it really costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import save_llama
from transformers import OPTConfig, OPTForCausalLM

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress import sensitivity as under_test
from packlight.compress.calibration import CalibrationText, prepare
from packlight.compress.sensitivity import known_losses, sensitivity
from packlight.compress.sweep import SEED, Sweep, draw, guide, num_sweeps, read_guide
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


def test_the_gradient_is_that_of_the_whole_model(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Block by block, with inputs kept and blocks run again, it is what autograd finds through the whole model."""
    sweep = Sweep(checkpoint, calibration.windows, calibration.batch)
    sweep.forward(lambda: None)
    sweep.head()
    at_top = sweep.gradient.clone()
    for _ in sweep.back(lambda name, x, gradient: None, lambda: None):
        pass
    model = load_model(checkpoint)
    embedded = model.get_input_embeddings()(torch.tensor(calibration.windows)).detach().requires_grad_()
    model.model.norm = torch.nn.Identity()  # the gradient starts in front of it
    top = model.model(inputs_embeds=embedded).last_hidden_state
    (wanted,) = torch.autograd.grad(top, embedded, at_top)
    torch.testing.assert_close(sweep.gradient, wanted, rtol=1e-3, atol=1e-6)
    assert float(wanted.abs().max()) > 0


def test_the_gradient_starts_at_drawn_labels(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Its mean over many draws is zero, as that of every score; one draw is not."""
    many = [calibration.windows[0]] * 200
    sweep = Sweep(checkpoint, many, batch=200)
    sweep.forward(lambda: None)
    sweep.head()
    one, mean = sweep.gradient[0].norm(), sweep.gradient.mean(dim=0).norm()
    assert mean < 0.2 * one  # 1 / sqrt(200) = 0.07


def test_a_guide_says_how_much_each_token_matters(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    """The same whatever the batch and however many windows are swept together, but for rounding."""
    ticks: list[int] = []
    guide(checkpoint, calibration, tmp_path / "a", lambda: ticks.append(1))
    assert len(ticks) == num_sweeps(len(calibration.windows)) * (2 * checkpoint.spec.num_layers + 1)
    found = read_guide(tmp_path / "a").tokens
    blocks = {f"model.layers.{place}" for place in range(checkpoint.spec.num_layers)}
    assert found.keys() == {tensor.name for tensor in checkpoint.spec.quantizable} | blocks
    assert all(weights.shape == (12, 64) and bool((weights >= 0).all()) for weights in found.values())
    guide(checkpoint, replace(calibration, batch=3), tmp_path / "b", lambda: None)
    other = read_guide(tmp_path / "b").tokens
    for name, weights in found.items():
        torch.testing.assert_close(other[name], weights, rtol=1e-2, atol=1e-6)


def test_the_second_time_comes_from_the_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    text = prepare(checkpoint, CalibrationText(windows=3, window=32))
    first = known_losses(checkpoint, text, GRIDS, GRIDS, "bfloat16", lambda stages: lambda: None)
    monkeypatch.setattr(under_test, "sensitivity", lambda *arguments, **options: pytest.fail("done again"))
    assert known_losses(checkpoint, text, GRIDS, GRIDS, "bfloat16", lambda stages: lambda: None) == first
    with pytest.raises(pytest.fail.Exception, match="done again"):
        known_losses(checkpoint, text, GRIDS[:1], GRIDS, "bfloat16", lambda stages: lambda: None)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_guide_has_the_second_moments_of_the_two_ends(
    is_tied: bool, calibration: Calibration, tmp_path: Path
) -> None:
    """Against one pass of the whole model: what enters the head by how open each prediction is, and the gradients of
    the same labels at the looked-up rows."""
    checkpoint = open_checkpoint(save_llama(tmp_path / "model", tie_word_embeddings=is_tied))
    # The row of the padding token is zero, where a norm's gradient is boundless.
    calibration = Calibration([[token or 1 for token in window] for window in calibration.windows[:8]], batch=5)
    guide(checkpoint, calibration, tmp_path / "guide", lambda: None)
    ends = read_guide(tmp_path / "guide").ends
    assert ends.keys() == {"model.embed_tokens.weight"} | (set() if is_tied else {"lm_head.weight"})
    model = load_model(checkpoint).float()
    entered: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    rows = model.get_input_embeddings()(torch.tensor(calibration.windows)).detach().requires_grad_()
    log_p = torch.log_softmax(model(inputs_embeds=rows, use_cache=False).logits, dim=-1)
    x, p = entered[0].reshape(-1, entered[0].shape[-1]), log_p.detach().exp().reshape(-1, log_p.shape[-1])
    head = x.T @ (x * (1 - p.square().sum(dim=-1, keepdim=True)))
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.stack([draw(window.exp(), generator) for window in log_p.detach()])
    (gradient,) = torch.autograd.grad(log_p.gather(-1, drawn).sum(), rows)
    looked_up = gradient.reshape(-1, gradient.shape[-1])
    wanted = {"model.embed_tokens.weight": looked_up.T @ looked_up + (head if is_tied else 0), "lm_head.weight": head}
    for name, moment in ends.items():
        torch.testing.assert_close(moment, wanted[name], rtol=1e-3, atol=1e-3 * float(moment.abs().max()))


def test_ends_of_another_width_than_the_blocks_have_no_moments(tmp_path: Path) -> None:
    """OPT can look its rows up in a narrower space; a guide says nothing of them, and all of the rest."""
    config = OPTConfig(
        hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    guide(checkpoint, Calibration([[5, 6, 7, 8]]), tmp_path / "guide", lambda: None)
    found = read_guide(tmp_path / "guide")
    assert found.ends == {}
    assert {tensor.name for tensor in checkpoint.spec.quantizable} <= found.tokens.keys()


def test_labels_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    labels = draw(p.expand(20_000, 6), torch.Generator().manual_seed(0))
    assert labels.shape == (20_000, 1)
    often = labels.reshape(-1).bincount(minlength=6) / 20_000
    torch.testing.assert_close(often, p, atol=0.02, rtol=0)
    assert bool((often[p == 0] == 0).all())
