"""What GPTQ's choices cost in time and memory, and what they buy in quality.

    python benchmarks/gptq_cost.py [MODEL] [--data FILE] [--calibration FILE] [--windows 128] [--group-size 64]
                                   [--ledger evidence/gptq-cost.jsonl]

MODEL is `demo` and the texts are the bundled ones where they are not given. Each variant is one `packlight quantize` at
4 bits, in a process of its own that finds nothing in the cache but the converted model, under the clock from start to
end with the proof on save; its peak is the process's resident set, interpreter and libraries included. KL divergence is
measured afterwards on `--data`. Artifacts stay in build/gptq-cost; a variant whose artifact is there is passed over.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from packlight import evidence
from packlight.checkpoint.cache import cache_root
from packlight.checkpoint.open import open_checkpoint
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.quality import evaluate, evaluate_reference
from packlight.pipeline import Yardstick, evaluation_windows
from packlight.runtime.load import load_model

WORK = Path("build/gptq-cost")
VARIANTS = {
    "plain, one pass a block": {"guided": "false", "true_sequential": "false"},
    "plain, true-sequential": {"guided": "false"},
    "guided, one pass a block": {"true_sequential": "false"},
    "guided, true-sequential": {},
}
POLL_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(threads := hardware(is_probed=False).threads)
    checkpoint = open_checkpoint(given.model)  # converted before the first clock starts
    cut, note = evaluation_windows(checkpoint, Yardstick(given.data))
    _, reference = evaluate_reference(load_model(checkpoint), cut, lambda: None)
    table: dict[str, dict[str, object]] = {}
    for variant, options in VARIANTS.items():
        subject = f"gptq, {given.windows} windows, {variant}"
        out = WORK / Path(given.model).stem / subject.replace(", ", "-").replace(" ", "-")
        if out.exists():
            continue
        words = ["--windows", str(given.windows), "--group-size", str(given.group_size)]
        words += [] if given.calibration is None else ["--data", str(given.calibration)]
        for name, value in options.items():
            words += ["--option", f"{name}={value}"]
        rows = timed(given.model, out, words, subject)
        rows += evaluate(load_model(open_checkpoint(out)), cut, reference, lambda: None).rows(subject, note)
        if given.ledger:
            evidence.append(given.ledger, evidence.stamped(rows, threads))
        table[subject] = {row.name: row.value for row in rows}
    print(json.dumps(table))


def timed(model: str, out: Path, options: list[str], subject: str) -> list[Measurement]:
    """One run of the command line in a fresh cache: seconds and peak resident set."""
    cache = WORK / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    for kept in ("demo", "converted"):
        if (cache_root() / kept).exists():
            (cache / kept).symlink_to((cache_root() / kept).resolve())
    words = [sys.executable, "-m", "packlight", "quantize", model, "--out", str(out), "--method", "gptq", "--bits", "4"]
    words += ["--asymmetric", *options]
    start, peak = time.monotonic(), 0
    child = subprocess.Popen(words, env={**os.environ, "PACKLIGHT_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, high_water_bytes(child.pid))
        time.sleep(POLL_S)
    taken = time.monotonic() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}")
    return [
        Measurement("wall_s", taken, "s", subject, note="one run, the whole command, proof on save included"),
        Measurement("peak_rss_bytes", peak, "bytes", subject, note="of the process, its base included"),
    ]


def high_water_bytes(pid: int) -> int:
    """Largest resident set of a process so far, since it last reset that; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
