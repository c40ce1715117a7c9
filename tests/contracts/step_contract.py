"""What every compression method promises, tested once for all: subclass `StepContract` and give it a step."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.artifacts import make_artifact, proof_distance
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress import run as compress
from packlight.compress.influence import influences
from packlight.compress.registry import METHODS, build, method_class
from packlight.compress.step import Step
from packlight.compress.sweep import guide, read_guide
from packlight.compress.walk import Calibration, WalkResult
from packlight.errors import UsageError
from packlight.evidence import Measurement
from packlight.measure.proof import MAX_KL
from packlight.pipeline import Silent, quantize
from packlight.plan.layout import layout_of, tensor_layout
from packlight.plan.memory import disk_bytes

PROOF_IDS = list(b"Well, Prince, so Genoa and Lucca are now just family estates")
WINDOWS = [list(b"of the Buonapartes. But I warn y"), list(b"if you don't tell me that this m")]


class NoTensors(TorchDispatchMode):
    """Fails the test at any operation on a tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} ran")


def refuse_to_open(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"{arguments[0]} was opened")


def drive(step: Step, checkpoint: Checkpoint, work: Path, result: WalkResult) -> Iterator[Measurement]:
    calibration = None if step.reading is None else Calibration(WINDOWS, keeps_targets=step.reading.keeps_targets)
    if calibration is not None and step.reading is not None and step.reading.weighs_tokens:
        file = work.with_suffix(".guide")
        guide(checkpoint, calibration, file, lambda: None)
        calibration = dataclasses.replace(calibration, guide=read_guide(file))
    if calibration is not None and step.reading is not None and step.reading.ranks_blocks:
        calibration = dataclasses.replace(calibration, influences=influences(checkpoint, calibration, lambda: None))
    return compress.run(step, checkpoint, work, layout_of(step.precision), PROOF_IDS, calibration, result)


def digests(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def places(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Inode and time of change: a file that was written again, even with the same bytes, has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def bad_value(field: dataclasses.Field[Any]) -> Any:
    """A value that no range allows, by the field's type; None where every value of the type is one."""
    if "bool" in str(field.type):
        return None
    return "nonsense" if "str" in str(field.type) else -1


class StepContract:
    """The promises of `compress.step.Step` on a small model of `num_blocks` blocks, the two ends included."""

    @pytest.fixture
    def step(self) -> Step:
        raise NotImplementedError

    @pytest.fixture
    def original(self, tiny_model_dir: Any) -> Path:
        directory: Path = tiny_model_dir(tied=True)
        return directory

    @pytest.fixture
    def checkpoint(self, original: Path) -> Checkpoint:
        return open_checkpoint(original)

    @pytest.fixture
    def num_blocks(self, checkpoint: Checkpoint) -> int:
        return checkpoint.spec.num_layers + 2

    def test_it_is_its_hyper_parameters_and_they_are_frozen(self, step: Step) -> None:
        assert dataclasses.is_dataclass(step)
        for field in dataclasses.fields(step):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(step, field.name, getattr(step, field.name))
        assert hash(step) == hash(dataclasses.replace(step)) and step == dataclasses.replace(step)

    def test_construction_does_no_work(self, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
        made = step.to_dict()
        method_class(step.name)  # importing the method may open files
        monkeypatch.setattr(builtins, "open", refuse_to_open)
        monkeypatch.setattr(Path, "open", refuse_to_open)
        with NoTensors():
            assert build(made) == step

    def test_bad_values_are_refused_when_it_is_built(self, step: Step) -> None:
        for field in dataclasses.fields(step):  # type: ignore[arg-type]
            if (value := bad_value(field)) is not None:
                with pytest.raises(UsageError):
                    build({**step.to_dict(), field.name: value})

    def test_unknown_options_are_refused_with_those_that_are_known(self, step: Step) -> None:
        with pytest.raises(UsageError, match="it takes") as caught:
            build({**step.to_dict(), "no_such_option": 1})
        assert all(field.name in str(caught.value) for field in dataclasses.fields(step))  # type: ignore[arg-type]

    def test_a_recipe_gives_the_same_step(self, step: Step) -> None:
        made = step.to_dict()
        assert next(iter(made)) == "method" and made["method"] in METHODS
        assert build(json.loads(json.dumps(made))) == step

    def test_it_needs_and_breaks_traits(self, step: Step) -> None:
        assert isinstance(step.needs, frozenset) and isinstance(step.breaks, frozenset)
        is_quantized = step.precision.linear is not None or step.precision.embedding is not None
        assert ("dense" in step.breaks) is is_quantized

    def test_the_claim_needs_no_weights_and_is_exact(self, step: Step, original: Path, tmp_path: Path) -> None:
        shutil.copytree(original, tmp_path / "copy")
        spec = open_checkpoint(tmp_path / "copy").spec
        for weights in (tmp_path / "copy").glob("*.safetensors"):
            weights.unlink()
        claim = step.plan(spec)
        assert claim.precision == step.precision
        assert claim.peak_bytes > 0 and claim.minutes > 0
        artifact = open_checkpoint(make_artifact(original, tmp_path / "out", **step.to_dict()))
        assert claim.disk_bytes == sum(entry.nbytes for entry in artifact.index.values())
        result = step.reshaped(spec)
        assert claim.disk_bytes == disk_bytes(result, step.precision).total
        stored = {name: (entry.dtype, entry.shape) for name, entry in artifact.index.items()}
        assert stored == {part.name: (part.dtype, part.shape) for part in tensor_layout(result, step.precision)}
        rows = list(step.measure(spec, artifact))
        assert rows and all(row.value == row.predicted for row in rows if row.predicted is not None)

    def test_one_row_and_one_file_for_every_block(
        self, step: Step, checkpoint: Checkpoint, num_blocks: int, tmp_path: Path
    ) -> None:
        result = WalkResult()
        rows = list(drive(step, checkpoint, tmp_path, result))
        assert len(rows) == num_blocks == len({row.subject for row in rows})
        assert all(isinstance(row.value, int | float) for row in rows)
        assert len(compress.block_files(tmp_path)) == num_blocks
        assert result.proof_logits is not None
        assert result.proof_logits.shape == (len(PROOF_IDS), checkpoint.spec.vocab_size)
        assert result.proof_logits.dtype == torch.float32

    def test_the_result_is_the_same_every_time(self, step: Step, checkpoint: Checkpoint, tmp_path: Path) -> None:
        first, second = WalkResult(), WalkResult()
        rows = [list(drive(step, checkpoint, tmp_path / name, r)) for name, r in (("a", first), ("b", second))]
        assert rows[0] == rows[1]
        found = [digests(compress.block_files(tmp_path / name)) for name in "ab"]
        assert found[0] == found[1]
        assert first.proof_logits is not None and second.proof_logits is not None
        assert torch.equal(first.proof_logits, second.proof_logits)

    def test_a_run_that_was_cut_short_goes_on(
        self, step: Step, checkpoint: Checkpoint, num_blocks: int, tmp_path: Path
    ) -> None:
        whole = WalkResult()
        all_rows = list(drive(step, checkpoint, tmp_path / "whole", whole))
        wanted = digests(compress.block_files(tmp_path / "whole"))
        for taken in range(1, num_blocks + 1):
            work, result = tmp_path / str(taken), WalkResult()
            started = drive(step, checkpoint, work, WalkResult())
            list(itertools.islice(started, taken))
            started.close()  # type: ignore[attr-defined]
            finished = compress.block_files(work)
            assert len(finished) == taken - 1  # a row comes before its block is stored
            before = places(finished)
            rows = list(drive(step, checkpoint, work, result))
            assert rows == all_rows[len(finished) :]
            assert places(finished) == before
            assert digests(compress.block_files(work)) == wanted
            assert result.proof_logits is not None and whole.proof_logits is not None
            assert torch.equal(result.proof_logits, whole.proof_logits)

    def test_a_finished_run_does_nothing_more(self, step: Step, checkpoint: Checkpoint, tmp_path: Path) -> None:
        first, second = WalkResult(), WalkResult()
        list(drive(step, checkpoint, tmp_path, first))
        before = places(compress.block_files(tmp_path))
        assert list(drive(step, checkpoint, tmp_path, second)) == []
        assert places(compress.block_files(tmp_path)) == before
        assert first.proof_logits is not None and second.proof_logits is not None
        assert torch.equal(first.proof_logits, second.proof_logits)

    def test_the_artifact_computes_what_the_walk_computed(self, step: Step, original: Path, tmp_path: Path) -> None:
        directory = make_artifact(original, tmp_path / "out", **step.to_dict())
        assert proof_distance(directory)[0] <= MAX_KL[step.precision.dtype]

    def test_the_original_is_left_alone(self, step: Step, original: Path, tmp_path: Path) -> None:
        files = [path for path in original.rglob("*") if path.is_file()]
        before = digests(files), places(files)
        make_artifact(original, tmp_path / "out", **step.to_dict())
        assert sorted(path for path in original.rglob("*") if path.is_file()) == sorted(files)
        assert (digests(files), places(files)) == before

    def test_what_it_needs_is_checked_before_any_weight_is_read(
        self, step: Step, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantized = make_artifact(original, tmp_path / "quantized", method="rtn")
        monkeypatch.setattr("packlight.checkpoint.tensors._read_into", refuse_to_open)
        if "dense" not in step.needs:
            compress.check(step, open_checkpoint(quantized))
            return
        with pytest.raises(UsageError, match=r"is already quantized \(int4-g32-sym\): start from the original"):
            quantize(str(quantized), tmp_path / "a" / "out", step, Silent())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized"]
