"""What half of the weights is worth: magnitude, Wanda and SparseGPT side by side; and what whole structures are.

    python benchmarks/pruning.py [MODEL] [--name NAME] [--data FILE] [--calibration FILE] [--windows 64] [--window 256]
                                 [--tokens 16384] [--structured] [--only WORD...] [--speed]
                                 [--ledger evidence/pruning.jsonl]

MODEL is `demo` and the texts are the bundled ones where they are not given; `--calibration self` calibrates on text
that the model made up, and `--data self` tests on such text of another seed: for a model of children's stories, whose
perplexity on an encyclopedia says little. Every subject is one artifact, made in float32 and stored without its zeros,
under build/pruning; one that is there is not made again. `--structured` takes whole blocks and MLP channels out
instead, a fifth and two fifths of them, in the dtype of the original. Perplexity and KL divergence to the original are
measured on the same windows for all. `--speed` measures memory and decode speed of the original and of the pruned model
in turns, three times, each in a process of its own. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from packlight import evidence
from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress.calibration import CalibrationText, parse_data
from packlight.compress.prune.share import counted, needs_counts
from packlight.compress.registry import build
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.footprint import footprint
from packlight.measure.quality import evaluate, evaluate_reference
from packlight.measure.size import disk_size
from packlight.pipeline import Silent, Yardstick, evaluation_windows, quantize
from packlight.plan.layout import artifact_bytes
from packlight.runtime.complete import sample_windows
from packlight.runtime.load import load_model

WORK = Path("build/pruning")
DTYPE = "float32"
HALF = [
    {"method": "magnitude", "scope": "layer"},
    {"method": "magnitude", "scope": "global"},
    {"method": "wanda", "scope": "row"},
    {"method": "sparsegpt", "scope": "layer"},
    {"method": "magnitude", "scope": "2:4"},
    {"method": "wanda", "scope": "2:4"},
    {"method": "sparsegpt", "scope": "2:4"},
]
"""Every subject has half of its weights left, counted as each method was published, and by 2:4."""
STRUCTURED = [
    {"method": method, "sparsity": sparsity, **options}
    for sparsity in (0.2, 0.4)
    for method, options in (
        ("blocks", {}),
        ("flap", {"score": "wanda", "repair": "none"}),
        ("flap", {"repair": "none"}),
        ("flap", {"repair": "bias"}),
        ("flap", {"repair": "least-squares"}),
        ("flap", {"repair": "affine"}),
    )
]
"""Whole blocks, and channels by two scores and with every repair."""
ANOTHER_SEED = 1
"""Calibration text that a model makes up is drawn with seed 0."""
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--name")
    parser.add_argument("--data")
    parser.add_argument("--calibration")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--structured", action="store_true", help="blocks and channels instead of half the weights")
    parser.add_argument("--only", nargs="+", default=[""], help="subjects whose name holds one of these")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(threads := hardware(is_probed=False).threads)
    checkpoint = open_checkpoint(given.model)
    name = given.name or Path(given.model).stem
    cut, note = test_windows(checkpoint, given.data, given.window, given.tokens)
    text = CalibrationText(parse_data(given.calibration), given.windows, given.window)
    of, on = (words(given.calibration, "text"), words(given.data, "text"))
    table: dict[str, dict[str, object]] = {}

    def keep(rows: list[Measurement]) -> None:
        if given.ledger:
            evidence.append(given.ledger, evidence.stamped(rows, threads))
        for row in rows:
            table.setdefault(row.subject, {})[row.name] = row.value

    quality, reference = evaluate_reference(load_model(checkpoint), cut, lambda: None)
    keep(quality.rows(f"{name} on {on}: original", note))
    print(f"{name} on {on}: original: {quality.perplexity:.3f}", flush=True)
    for options in STRUCTURED if given.structured else HALF:
        subject = f"{name} on {on}: {called(options)}"
        if not any(word in subject for word in given.only):
            continue
        if options["method"] != "magnitude":
            subject += f", calibrated on {of}"
        out = WORK / subject.replace(": ", "-").replace(", ", "-").replace(" ", "-")
        rows = made(checkpoint, given.model, out, options, text, subject)
        found = evaluate(load_model(open_checkpoint(out)), cut, reference, lambda: None)
        keep([*rows, *found.rows(subject, note)])
        print(f"{subject}: {found.perplexity:.3f}", flush=True)
        if given.speed:
            keep(in_turns(checkpoint, out, f"{name}: original", subject, given.window))
    print(json.dumps(table))


def called(options: dict[str, Any]) -> str:
    """A method as a subject names it: `wanda 2:4`, `flap 20% wanda none`."""
    if "scope" in options:
        return f"{options['method']} {options['scope']}"
    rest = [str(value) for name, value in options.items() if name not in ("method", "sparsity")]
    return " ".join([options["method"], f"{100 * options['sparsity']:g}%", *rest])


def words(given: str | None, default: str) -> str:
    """What a text is called in a subject."""
    return {None: f"the bundled {default}", "self": "its own text"}.get(given) or Path(given or "").name.split(".")[0]


def test_windows(checkpoint: Checkpoint, data: str | None, window: int, tokens: int) -> tuple[list[list[int]], str]:
    """The windows that quality is measured on, and the line that describes them."""
    if data != "self":
        return evaluation_windows(checkpoint, Yardstick(None if data is None else Path(data), window, tokens))
    count = tokens // window
    cut = sample_windows(load_model(checkpoint), count, window, ANOTHER_SEED, lambda: None)
    return (
        cut,
        f"text made up by the model, seed {ANOTHER_SEED}, {count * window} tokens in {count} windows of {window}",
    )


def made(
    checkpoint: Checkpoint, model: str, out: Path, options: dict[str, Any], text: CalibrationText, subject: str
) -> list[Measurement]:
    """Make one artifact, if it is not there; how much of it is gone, and its bytes beside the planned ones and those of
    the whole model."""
    stored = {"dtype": DTYPE, "storage": "bitmask"} if "scope" in options else {"dtype": checkpoint.spec.dtype}
    step = build({**options, **stored})
    if needs_counts(step):
        step = counted(step, checkpoint, lambda: None)
    if not out.exists():
        quantize(model, out, step, Silent(), calibration=text)
    packed, spec = open_checkpoint(out), checkpoint.spec
    shown = ("sparsity", "dense_bytes", "removed", "whole_bytes")
    rows = [replace(row, subject=subject) for row in step.measure(spec, packed) if row.name in shown]
    planned = artifact_bytes(step.reshaped(spec), step.precision)
    rows.append(Measurement("disk_bytes", disk_size(packed), "bytes", subject, predicted=planned))
    return rows


def in_turns(original: Checkpoint, pruned: Path, first: str, second: str, context: int) -> list[Measurement]:
    """Memory and speed of both in turns, so that what else the machine does meets both: medians, half the ranges."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for _ in range(TURNS):
        for subject, path in ((first, original.path), (second, pruned)):
            for row in footprint(path, context).rows(subject):
                found.setdefault((subject, row.name), []).append(row)
    return [median_of(rows) for (_, name), rows in found.items() if name in ("peak_bytes", "prefill_tps", "decode_tps")]


def median_of(rows: list[Measurement]) -> Measurement:
    """One row for several turns."""
    values = sorted(float(row.value) for row in rows if isinstance(row.value, int | float))
    half = (values[-1] - values[0]) / 2
    note = f"median of {len(values)} processes, in turns with the other model; half the range"
    return replace(rows[0], value=statistics.median(values), spread=half, n=len(values), note=note)


if __name__ == "__main__":
    main()
