"""A job's work directory: alone, resumed by the same request only, and nothing left behind by a refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from packlight.checkpoint import save
from packlight.checkpoint.open import open_checkpoint
from packlight.errors import CheckpointError, TargetError
from packlight.spec import Grid, ModelSpec, Precision, TensorSpec

ASKED = {"steps": [{"method": "rtn", "bits": 4}], "source": {"name": "tiny", "sha256": "00"}}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def left_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def work_until_killed(target: Path, asked: dict[str, Any]) -> None:
    """Leave what a kill leaves: a work directory with one finished block."""
    with pytest.raises(KeyboardInterrupt), save.job(target, asked, 0) as work:
        work.blocks.mkdir(exist_ok=True)
        (work.blocks / "0000.safetensors").write_text("done")
        raise KeyboardInterrupt


def test_a_fresh_job_works_beside_its_target_and_publishes_by_renaming(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with save.job(target, ASKED, 0) as work:
        assert work.partial == tmp_path / ".out.partial"
        assert json.loads((work.partial / "job.json").read_text()) == ASKED
        work.artifact.mkdir()
        (work.artifact / "config.json").write_text("{}")
        assert not target.exists()
        save.publish(work)
    assert left_in(tmp_path) == ["out", "out/config.json"]


def test_the_same_request_goes_on(tmp_path: Path) -> None:
    work_until_killed(tmp_path / "out", ASKED)
    with save.job(tmp_path / "out", dict(reversed(ASKED.items())), 0) as work:
        assert (work.blocks / "0000.safetensors").read_text() == "done"


@pytest.mark.parametrize("change", [{"steps": []}, {"source": {"name": "tiny", "sha256": "01"}}, {"more": 1}])
def test_another_request_starts_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    work_until_killed(tmp_path / "out", ASKED)
    (tmp_path / ".out.partial" / "evidence.jsonl").write_text("old rows\n")
    with save.job(tmp_path / "out", ASKED | change, 0) as work:
        assert left_in(work.partial) == ["job.json", "lock"]
        assert json.loads((work.partial / "job.json").read_text()) == ASKED | change


def test_a_kill_before_the_note_is_whole_starts_anew(tmp_path: Path) -> None:
    work_until_killed(tmp_path / "out", ASKED)
    note = tmp_path / ".out.partial" / "job.json"
    note.write_text(note.read_text()[:20])
    with save.job(tmp_path / "out", ASKED, 0) as work:
        assert left_in(work.partial) == ["job.json", "lock"]


HOLD = """
import sys
from pathlib import Path
from packlight.checkpoint import save
with save.job(Path(sys.argv[1]), {}, 0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_work_on_one_target(tmp_path: Path) -> None:
    target = tmp_path / "out"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with held:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        with (
            pytest.raises(TargetError, match=r"another process is making .*out: wait for it"),
            save.job(target, ASKED, 0),
        ):
            raise AssertionError("two processes hold one job")
        assert json.loads((tmp_path / ".out.partial" / "job.json").read_text()) == {}  # the first one's, untouched
        held.kill()
    with save.job(target, {}, 0) as work:  # the lock went with the process
        assert work.partial.is_dir()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_exists_is_not_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with (
        pytest.raises(TargetError, match=r"out exists already: choose another --out"),
        save.job(tmp_path / "out", {}, 0),
    ):
        raise AssertionError("the target was taken")
    assert left_in(tmp_path) == ["out"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with save.job(tmp_path / "a" / "b" / "out", ASKED, 0) as work:
        work.artifact.mkdir()
        save.publish(work)
    assert left_in(tmp_path) == ["a", "a/b", "a/b/out"]


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5_000_000, 5_000_000))
    wanted = r"has 5 MB free and the job writes 6 MB: free some space"
    with pytest.raises(TargetError, match=wanted), save.job(tmp_path / "a" / "out", ASKED, 6_000_000):
        raise AssertionError("there is no space")
    assert left_in(tmp_path) == []
    with save.job(tmp_path / "a" / "out", ASKED, 5_000_000):
        pass


def test_a_parent_that_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    with pytest.raises(TargetError), save.job(tmp_path / "mine" / "new" / "out", ASKED, 1):
        raise AssertionError("there is no space")
    assert left_in(tmp_path) == ["mine"]


def test_a_directory_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with (
        pytest.raises(TargetError, match=r"cannot be written: choose another --out"),
        save.job(tmp_path / "out", {}, 0),
    ):
        raise AssertionError("it cannot be written")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("target", ["out", "a/b/out"])
def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        wanted = r"cannot be written \(Read-only file system\): choose another --out"
        with pytest.raises(TargetError, match=wanted), save.job(tmp_path / target, {}, 0):
            raise AssertionError("it cannot be written")
    assert left_in(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(TargetError, match=r"cannot be written \(.*\): choose another"),
        save.job(tmp_path / "file" / "out", {}, 0),
    ):
        raise AssertionError("it cannot be written")
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (errno.ENOSPC, "the disk of .*out is full: free some space and give the same command again to go on"),
        (errno.EDQUOT, "the disk of .*out is full"),
        (errno.EROFS, r"out cannot be written \(Read-only file system\)"),
        (errno.EACCES, r"out cannot be written \(Permission denied\)"),
    ],
)
def test_a_disk_that_fails_on_the_way_keeps_what_is_done(tmp_path: Path, number: int, wanted: str) -> None:
    with pytest.raises(TargetError, match=wanted), save.job(tmp_path / "out", ASKED, 0) as work:
        work.blocks.mkdir()
        raise OSError(number, os.strerror(number))
    assert left_in(tmp_path) == [f".out.partial{end}" for end in ("", "/blocks", "/job.json", "/lock")]


def test_another_failure_of_the_system_is_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), save.job(tmp_path / "out", ASKED, 0):
        (tmp_path / "absent").read_text()


def test_input_at_fault_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), save.job(tmp_path / "a" / "b" / "out", ASKED, 0) as work:
        work.blocks.mkdir()
        raise CheckpointError("a weight is not finite")
    assert left_in(tmp_path) == []


def test_discard_removes_the_work_and_nothing_else(tmp_path: Path) -> None:
    save.discard(tmp_path / "out")
    work_until_killed(tmp_path / "out", ASKED)
    work_until_killed(tmp_path / "other", ASKED)
    save.discard(tmp_path / "out")
    assert (tmp_path / ".other.partial").is_dir() and not (tmp_path / ".out.partial").exists()


def test_an_artifact_knows_what_it_was_made_by(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert not save.made_earlier(target, ASKED)
    target.mkdir()
    assert not save.made_earlier(target, ASKED)
    (target / save.RECIPE_NAME).write_text(save.recipe_text({**ASKED, "extra": [None, 1.5]}))
    assert save.made_earlier(target, ASKED)
    assert not save.made_earlier(target, ASKED | {"steps": []})
    assert not save.made_earlier(target, ASKED | {"more": 1})
    (target / save.RECIPE_NAME).write_text("- a list\n")
    assert not save.made_earlier(target, ASKED)


def test_a_recipe_keeps_its_order(tmp_path: Path) -> None:
    recipe = {
        "packlight": "1",
        "source": {"sha256": "f", "name": "é"},
        "steps": [{"method": "rtn", "group_size": None}],
    }
    found = yaml.safe_load(save.recipe_text(recipe))
    assert found == recipe and list(found) == list(recipe)


def test_the_content_decides_the_hash(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_model_dir(tied=True)
    there = tmp_path / "elsewhere"
    shutil.copytree(original, there)
    found = save.content_hash(open_checkpoint(original))
    assert save.content_hash(open_checkpoint(there)) == found
    weights = there / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert save.content_hash(open_checkpoint(there)) != found
    shutil.copyfile(original / "model.safetensors", weights)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert save.content_hash(open_checkpoint(there)) != found


def spec(*, is_tied: bool) -> ModelSpec:
    tensors = [
        TensorSpec("model.embed_tokens.weight", (100, 64), "bfloat16", "embedding"),
        TensorSpec("model.layers.0.mlp.up_proj.weight", (96, 64), "bfloat16", "linear"),
        TensorSpec("model.norm.weight", (64,), "bfloat16", "other"),
    ]
    if not is_tied:
        tensors.append(TensorSpec("lm_head.weight", (100, 64), "bfloat16", "head"))
    return ModelSpec(
        "made", "LlamaForCausalLM", "llama", "bfloat16", 64, 96, 1, 4, 4, 16, 100, 256, is_tied, tuple(tensors)
    )


@pytest.mark.parametrize(
    ("precision", "is_tied", "targets", "ignore", "is_dequantized"),
    [
        (Precision("bfloat16", Grid(4, 32)), True, [["Linear"]], ["lm_head"], False),
        (Precision("bfloat16", Grid(4, 32)), False, [["Linear"]], ["lm_head"], False),
        (Precision("bfloat16", Grid(4, 32, False)), False, [["Linear"]], ["lm_head"], True),
        (
            Precision("bfloat16", Grid(8), Grid(8)),
            False,
            [["Linear", "model.embed_tokens", "lm_head"]],
            [],
            True,
        ),
        (
            Precision("bfloat16", Grid(4, 32), Grid(8)),
            False,
            [["Linear"], ["model.embed_tokens", "lm_head"]],
            [],
            False,
        ),
    ],
)
def test_the_config_says_what_is_quantized(
    precision: Precision, is_tied: bool, targets: list[list[str]], ignore: list[str], is_dequantized: bool
) -> None:
    config = {"model_type": "llama", "torch_dtype": "float32", "_name_or_path": "/home/me/model"}
    made = save.artifact_config(config, spec(is_tied=is_tied), precision, "pack-quantized")
    assert set(made) == {"model_type", "dtype", "quantization_config"}
    assert made["dtype"] == "bfloat16"
    quantization = made["quantization_config"]
    assert [group["targets"] for group in quantization["config_groups"].values()] == targets
    assert quantization["ignore"] == ignore
    assert quantization.get("dequantize", False) is is_dequantized
    grids = [group["weights"] for group in quantization["config_groups"].values()]
    wanted = [grid for grid in dict.fromkeys((precision.linear, precision.embedding)) if grid is not None]
    assert [(g["num_bits"], g["group_size"], g["symmetric"]) for g in grids] == [
        (grid.bits, grid.group_size, grid.symmetric) for grid in wanted
    ]


def test_a_cast_model_has_no_quantization_config() -> None:
    made = save.artifact_config({"quantization_config": {}}, spec(is_tied=True), Precision("float16"), "pack-quantized")
    assert made == {"dtype": "float16"}
