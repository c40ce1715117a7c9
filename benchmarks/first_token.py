"""Seconds from the start of a process to its first token: a compiled package, torch.compile, and eager.

    python benchmarks/first_token.py [MODEL] [--package DIR] [--context 1024] [--dtype D] [--runs 3]
                                     [--ledger evidence/compiled.jsonl]

MODEL is `demo` where it is not given. The package is made in build/first-token where none is given, and what that took
is in the ledger too. Every run is a process of its own; torch.compile finds nothing in its cache and runs once, the
others `--runs` times, by turns. All continue one prompt greedily. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from packlight import evidence
from packlight.checkpoint.open import open_checkpoint
from packlight.evidence import LEDGER_NAME, Measurement
from packlight.export.compiled import Compiled
from packlight.measure.bandwidth import hardware
from packlight.measure.first_token import Way, first_token, first_token_rows
from packlight.measure.package_proof import SUBJECT
from packlight.measure.text import load_text

WORK = Path("build/first-token")
SUBJECTS: dict[Way, str] = {"package": SUBJECT, "compiled": "torch.compile, cold", "eager": "eager"}
PROMPT_CHARACTERS, TOKENS = 320, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--package", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    threads = hardware(is_probed=False).threads
    package = given.package or make_package(given.model, given.context, given.dtype, threads)
    made = [row for row in evidence.read(package / LEDGER_NAME) if row.name in ("export_s", "compile_s", "disk_bytes")]
    prompt = load_text().content[:PROMPT_CHARACTERS]
    answers: dict[Way, list[dict[str, Any]]] = {way: [] for way in SUBJECTS}
    for turn in range(given.runs):
        for way in SUBJECTS:
            if way == "compiled" and turn > 0:
                continue
            model = package if way == "package" else given.model
            answers[way].append(first_token(way, model, prompt, TOKENS, given.context, given.dtype, threads))
            print(way, round(answers[way][-1]["first_token_s"], 2), "s", flush=True)
    rows = [row for way, subject in SUBJECTS.items() for row in first_token_rows(subject, answers[way])]
    seconds = {way: rows[3 * place].value for place, way in enumerate(SUBJECTS)}
    same = all(run["tokens"] == answers["eager"][0]["tokens"] for runs in answers.values() for run in runs)
    rows.append(Measurement("same_tokens", same, "1", SUBJECTS["package"], n=TOKENS, note="greedy, in all runs"))
    if given.ledger:
        evidence.append(given.ledger, made + evidence.stamped(rows, threads))
    sooner = {way: round(seconds[way] / seconds["package"], 1) for way in ("compiled", "eager")}  # type: ignore[operator]
    print(json.dumps({"first_token_s": seconds, "times_sooner_than": sooner, "same_tokens": same}))


def make_package(model: str, context: int, dtype: str | None, threads: int) -> Path:
    """A package made anew."""
    torch.set_num_threads(threads)
    shutil.rmtree(WORK, ignore_errors=True)
    Compiled(context=context, dtype=dtype).write(open_checkpoint(model), WORK, announce)
    return WORK


def announce(label: str, total: int) -> Any:
    print(f"{label} ...", flush=True)
    return lambda: None


if __name__ == "__main__":
    main()
