"""The way on the demo model: what the plan said against what was measured, in one run.

For bfloat16, int8 and int4: bytes on disk (exact), peak memory (within 10 %), decode speed (within 25 %), and the
seconds that quantizing took. Beside it, the seconds to open the demo's GGUF file, ours from an empty cache against
transformers' own path. Rounds are interleaved: every round probes the machine and then measures every subject once;
medians are reported. The last line of stdout is one JSON object; `--ledger FILE` also writes the rows of evidence.

    python benchmarks/way.py [--rounds 5] [--context 1024] [--ledger evidence/way.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from packlight import evidence
from packlight.checkpoint.demo import demo_file
from packlight.checkpoint.open import open_checkpoint
from packlight.compress.registry import build
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.footprint import footprint
from packlight.measure.hardware import calibrate
from packlight.measure.size import disk_size
from packlight.pipeline import Silent, predictions, quantize
from packlight.spec import Budget, Precision

SUBJECTS = {
    "bfloat16": {"method": "cast", "dtype": "bfloat16"},
    "int8": {"method": "rtn", "bits": 8, "group_size": None},
    "int8 with embeddings": {"method": "rtn", "bits": 8, "group_size": None, "embeddings": 8},
    "int4": {"method": "rtn", "bits": 4, "group_size": 32},
    "int4 with embeddings": {"method": "rtn", "bits": 4, "group_size": 32, "embeddings": 4},
}
LIMITS = {"disk_bytes": 0.0, "peak_bytes": 0.10, "decode_tps": 0.25}
"""Largest share by which a measurement may differ from its prediction."""
KERNELS = ("float32", "bfloat16", "int8", "int4")

OPEN_OURS = """
import sys, time
from packlight.checkpoint.open import open_checkpoint
from packlight.runtime.load import load_model
from packlight.runtime.tokenizer import load_tokenizer
start = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
load_tokenizer(checkpoint)
load_model(checkpoint)
print(time.perf_counter() - start)
"""
OPEN_TRANSFORMERS = """
import sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
start = time.perf_counter()
path = Path(sys.argv[1])
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = open_rows(Path(scratch)) + subject_rows(Path(scratch), given.rounds, given.context)
    if given.ledger:
        given.ledger.unlink(missing_ok=True)
        evidence.append(given.ledger, evidence.stamped(rows, hardware(is_probed=False).threads))
    print(json.dumps(summary(rows)))


def open_rows(scratch: Path) -> list[Measurement]:
    """Seconds from the GGUF file to a loaded model and tokenizer, imports not counted."""
    path = str(demo_file())
    environment = {**os.environ, "PACKLIGHT_CACHE": str(scratch / "empty")}
    ours = timed(OPEN_OURS, path, environment)
    theirs = timed(OPEN_TRANSFORMERS, path, dict(os.environ))
    print(f"open the GGUF: packlight {ours:.1f} s from an empty cache, transformers {theirs:.1f} s", file=sys.stderr)
    return [
        Measurement("open_s", ours, "s", "packlight", n=1, note="GGUF to loaded model and tokenizer, empty cache"),
        Measurement("open_s", theirs, "s", "transformers", n=1, note="GGUF to loaded model and tokenizer"),
    ]


def timed(source: str, path: str, environment: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", source, path], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"opening {path} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def subject_rows(scratch: Path, rounds: int, context: int) -> list[Measurement]:
    rows = []
    original = open_checkpoint("demo")
    artifacts = {}
    for name, options in SUBJECTS.items():
        out, step = scratch / name.replace(" ", "-"), build(dict(options))
        start = time.perf_counter()
        made = quantize("demo", out, step, Silent())
        rows.append(Measurement("quantize_and_prove_s", time.perf_counter() - start, "s", name, n=1))
        rows += [rename(row, name) for row in made.rows if row.name in ("job_s", "job_peak_bytes")]
        artifacts[name] = open_checkpoint(str(out))
        claimed = next(row for row in made.rows if row.name == "disk_bytes" and row.subject == "packed").predicted
        rows.append(Measurement("disk_bytes", disk_size(artifacts[name]), "bytes", name, predicted=claimed))
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    claims: dict[tuple[str, str], list[float]] = defaultdict(list)
    budget = Budget(context=context)
    subjects = {"float32 (original)": original, **artifacts}
    for number in range(rounds):
        machine = calibrate(hardware(), KERNELS)
        for name, checkpoint in subjects.items():
            precision = checkpoint.spec.stored or Precision(checkpoint.spec.dtype)
            for row in footprint(checkpoint.path, context, threads=machine.threads).rows(name):
                measured[row.name, name].append(float(row.value or 0))
            for row_name, value in predictions(checkpoint.spec, precision, budget, machine).items():
                claims[row_name, name].append(value)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for (row_name, name), values in measured.items():
        unit = "bytes" if row_name.endswith("_bytes") else "s" if row_name.endswith("_s") else "tokens/s"
        predicted = statistics.median(claims[row_name, name]) if (row_name, name) in claims else None
        spread = (max(values) - min(values)) / 2
        note = f"context {context}; median of the rounds, half their range"
        rows.append(
            Measurement(row_name, statistics.median(values), unit, name, predicted, spread, len(values), note=note)
        )
    return rows


def rename(row: Measurement, subject: str) -> Measurement:
    return Measurement(row.name, row.value, row.unit, subject, predicted=row.predicted, n=1)


def summary(rows: list[Measurement]) -> dict[str, object]:
    """The rows by subject, and which promises they keep."""
    subjects: dict[str, dict[str, object]] = defaultdict(dict)
    kept = True
    for row in rows:
        assert isinstance(row.value, int | float)
        entry: dict[str, object] = {"measured": row.value}
        if row.predicted is not None:
            off = row.value / row.predicted - 1
            entry |= {"predicted": row.predicted, "off": round(off, 4)}
            if row.name in LIMITS:
                entry["within"] = abs(off) <= LIMITS[row.name]
                kept = kept and bool(entry["within"])
        subjects[row.subject][row.name] = entry
    return {"benchmark": "way", "all_within": kept, "subjects": subjects}


if __name__ == "__main__":
    main()
