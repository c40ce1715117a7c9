"""The study of flash attention: real points in processes of their own, the fitted exponents, and going on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.driver import assert_one_sentence, call

from packlight.evidence import LEDGER_NAME, read
from packlight.lab import flash_attention as lab
from packlight.lab.exponent import fit_exponent
from packlight.lab.flash_attention_report import markdown, plot
from packlight.measure import attention_cost
from packlight.measure.attention_cost import LayerShape, layer_cost


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    sizes = [512, 1024, 2048, 4096]
    found = fit_exponent(sizes, [3.0 * size**power for size in sizes])
    assert found.value == pytest.approx(power) and found.stderr == pytest.approx(0, abs=1e-6)
    assert found.factor == pytest.approx(3.0, rel=1e-6) and found.n == 4


def test_noise_shows_in_the_exponent_s_error() -> None:
    sizes = [512, 1024, 2048, 4096]
    noisy = fit_exponent(sizes, [size**2 * factor for size, factor in zip(sizes, (1, 1.2, 0.9, 1.1), strict=True)])
    assert noisy.stderr is not None and 0.02 < noisy.stderr < 0.3
    assert abs(noisy.value - 2) < 3 * noisy.stderr
    assert fit_exponent(sizes[:2], [1.0, 4.0]).stderr is None


def test_eager_scores_are_memory_and_flash_has_none() -> None:
    """Real processes: scores of 1024 tokens are 4 heads x 1024^2 x 4 bytes = 17 MB."""
    shape = LayerShape(4, 2, 32)
    eager, flash = (layer_cost(backend, 1024, shape, threads=1) for backend in ("eager", "flash"))
    assert eager.extra_bytes > 4 * 1024**2 * 4
    assert flash.extra_bytes < 4 * 1024**2 * 4 / 2
    assert eager.seconds > 0 and flash.repeats >= 1


def in_this_process(arguments: Any, request: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """Stands for the child: its numbers are those of a law, so that the fits are known."""
    tokens = request.get("tokens") or len(request["ids"])
    power = 2 if request["backend"] == "eager" else 1
    return {
        "seconds": 1e-6 * tokens**power,
        "seconds_spread": 0.0,
        "extra_bytes": 10.0 * tokens**power,
        "extra_bytes_spread": 0.0,
        "repeats": 3,
        "first_token": 7 if request["kind"] == "model" else None,
    }


@pytest.fixture
def study(tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The words of a command, whose points take no time."""
    monkeypatch.setattr(attention_cost.child, "ask", in_this_process)
    monkeypatch.setattr(lab, "SYSTEM_PROMPT", "Be brief.")
    return [
        *("lab", "flash-attention", tiny_model_dir(), "--lengths", "64,128,256", "--prompt-repeats", "1,5,10"),
        *("--out", tmp_path / "flash", "--threads", 1, "-q"),
    ]


def test_exponents_of_time_and_memory_are_fitted(study: list[object], tmp_path: Path) -> None:
    ended = call(*study)
    assert ended.code == 0, ended.err
    rows = read(tmp_path / "flash" / LEDGER_NAME)
    fitted = [(backend, fit.value) for _, level, backend, fit in lab.exponents(rows) if level in ("layer", "model")]
    assert len(fitted) == 8  # time and memory of two backends, alone and in the model
    for backend, value in fitted:
        assert value == pytest.approx(2 if backend == "eager" else 1)
    assert (tmp_path / "flash" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "flash" / "table.md").read_text() == markdown(rows)


def test_the_same_command_goes_on_and_measures_nothing_twice(study: list[object], tmp_path: Path) -> None:
    ledger = tmp_path / "flash" / LEDGER_NAME
    assert call(*study).code == 0
    whole = ledger.read_text()
    assert call(*study).code == 0
    assert ledger.read_text() == whole
    lines = whole.splitlines(keepends=True)
    ledger.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])  # a kill in the middle of a line
    assert call(*study).code == 0
    values = [
        sorted((row["name"], row["subject"], row["value"]) for row in map(json.loads, text.splitlines()))
        for text in (whole, ledger.read_text())
    ]
    assert set(map(tuple, values[0])) == set(map(tuple, values[1]))


def test_another_study_is_not_mixed_in(study: list[object]) -> None:
    assert call(*study).code == 0
    assert_one_sentence(call(*study, "--dtype", "bfloat16"), says="holds a study of")


def test_json_is_one_document(study: list[object]) -> None:
    document = json.loads(call(*study, "--json").out)
    assert document["threads"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lengths", "64,300"], "300"),
        (["--lengths", "a"], "--lengths takes numbers"),
        (["--prompt-repeats", "0"], ""),
        (["--backends", "eager,fast"], "--backends has no 'fast'"),
        (["--dtype", "int8"], "--dtype is one of"),
    ],
)
def test_bad_words(tiny_model_dir: Callable[..., Path], tmp_path: Path, words: list[str], says: str) -> None:
    ended = call("lab", "flash-attention", tiny_model_dir(), "--out", tmp_path / "out", *words)
    assert_one_sentence(ended, says=says)
    assert ended.code == 2


def test_counted_traffic_follows_the_papers_law() -> None:
    """FlashAttention moves N^2 d^2 / M elements: twice the tokens, four times as many, and far fewer than standard."""
    small, large = (lab.traffic(64, tokens, 100_000) for tokens in (2048, 4096))
    growth = {name: math.log2(large[name].total / small[name].total) for name in small}
    assert growth["standard"] == pytest.approx(2, abs=0.1)
    assert large["standard"].total > 3 * min(large["flash-1"].total, large["tiled"].total)


def test_a_plot_of_nothing_is_refused_or_drawn(tmp_path: Path) -> None:
    plot([], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
