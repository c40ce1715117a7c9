"""Where an artifact may go, and where it may not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.cli.conftest import save_llama
from tests.cli.driver import assert_one_sentence, assert_refused, call, listing

from packlight.checkpoint import save

pytestmark = pytest.mark.usefixtures("stand_ins")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def line(model: object, out: object) -> list[object]:
    return ["quantize", model, "-q", "--out", out]


def fit(model: object, out: object) -> list[object]:
    return ["fit", model, "-q", "--memory", "1GB", "--context", 64, "--window", 32, "--tokens", 256, "--out", out]


def test_targets_that_exist(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "directory")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    for target in ("directory", "file", "link", "dangling", tiny, ".", "", "..", "/"):
        assert_refused(line(tiny, target), tmp_path, says="exists already")
        assert_refused(fit(tiny, target), tmp_path, says="exists already")


def test_targets_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file" / "out", "/proc/out", "/proc/no/out", "/sys/out", tmp_path / ("n" * 250)):
        assert_refused(line(tiny, target), tmp_path)
        assert_refused(fit(tiny, target), tmp_path)


def test_a_read_only_directory(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind an administrator, so the question itself is answered."""
    monkeypatch.setattr(save.os, "access", lambda path, mode: False)
    assert_refused(line(tiny, tmp_path / "a" / "b"), tmp_path, says="cannot be written")


def test_a_disk_with_too_little_space(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: Usage(100, 99, 1))
    assert_refused(line(tiny, tmp_path / "a" / "b"), tmp_path, says="1 B free")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_on_the_way(
    tiny: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the space that was there; with space again, the same command goes on."""
    with monkeypatch.context() as patched:
        patched.setattr(save.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
        (small_disk / "taken").write_bytes(bytes(300_000))
        ended = call(*line(tiny, small_disk / "out"))
        assert_one_sentence(ended, says="is full")
        assert not (small_disk / "out").exists()
        (small_disk / "taken").unlink()
        assert call(*line(tiny, small_disk / "out")).code == 0
    assert call(*line(tiny, tmp_path / "elsewhere")).code == 0
    assert listing(small_disk).keys() == {"out", *(f"out/{name}" for name in listing(tmp_path / "elsewhere"))}


def test_targets_that_are_fine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "model link").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    for model, target in (
        (tiny, "relative/deep/er/"),
        (tiny, tmp_path / "with space und ümläut" / "目标"),
        (tiny, "link/out"),
        ("model link", "real/other"),
        ("./models/tiny/", "models/tiny/inside"),
    ):
        ended = call(*line(model, target))
        assert ended.code == 0, ended.err
        assert (Path(target) / "config.json").is_file()
        assert not list(Path(target).parent.glob(".*partial"))
    assert call("generate", tmp_path / "with space und ümläut" / "目标", "--prompt", "hi").code == 0


def test_weights_behind_a_link(tiny: Path, out: Path) -> None:
    """As in a hub cache, where every file is a link to a blob."""
    (tiny / "model.safetensors").rename(tiny / "blob")
    (tiny / "model.safetensors").symlink_to("blob")
    assert call(*line(tiny, out)).code == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"vocab_size": 257},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"max_shard_size": "100KB"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_models_of_unusual_kinds_are_fitted(changes: dict[str, object], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", **changes)  # type: ignore[arg-type]
    for argv in (line(model, tmp_path / "quantized"), fit(model, tmp_path / "fitted")):
        ended = call(*argv)
        assert ended.code == 0, ended.err


def test_a_width_that_no_group_divides(tmp_path: Path) -> None:
    """48 columns: groups of 32 are refused with the choice that is left, and `fit` finds it alone."""
    model = save_llama(tmp_path / "model", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    assert_refused(line(model, tmp_path / "out"), tmp_path, says="choose a divisor of 48, or 'row'")
    assert call(*line(model, tmp_path / "row"), "--group-size", "row").code == 0
    assert call(*fit(model, tmp_path / "fitted")).code == 0


def test_a_tied_model_that_stores_its_head_all_the_same(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tie_word_embeddings=True)
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for bits in (None, 4):
        out = tmp_path / f"out{bits}"
        ended = call(*line(model, out), *([] if bits is None else ["--embeddings", bits]))
        assert ended.code == 0, ended.err
        shutil.rmtree(out)
