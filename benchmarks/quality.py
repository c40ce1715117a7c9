"""What the methods make of a model at the same bytes, beside each other and beside other tools' files, on one text.

    python benchmarks/quality.py [MODEL] [--data FILE] [--calibration FILE] [--part grids|sizes] [--peers ROWS.json]
                                 [--ledger evidence/quality-demo.jsonl]

MODEL is `demo` and the texts are the bundled ones where they are not given. Two parts. `grids`: round to nearest, GPTQ
and learned rounding on uniform grids of 4, 3 and 2 bits. `sizes`: for files of given sizes, every matrix on a grid of
its own, beside the best uniform recipe that is no larger. Artifacts are kept in build/quality and rows are written as
they come, so that a run that was cut short goes on. Perplexity and KL divergence are measured on `--data`, which
nothing was calibrated on; `--data self` is text that the model makes up, from another seed than that of a calibration.
`--peers` takes rows that `benchmarks/peers` has measured on the same tokens (`--windows FILE` writes those); a file of
a peer wins where it has the lower KL at no more bytes. The last line of stdout is one JSON object: every claim, whether
it holds, and all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from packlight import evidence, pipeline
from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.compress.calibration import SEED, CalibrationText, parse_data, prepare
from packlight.compress.choice import lessened
from packlight.compress.registry import build
from packlight.compress.sensitivity import Losses, known_losses
from packlight.evidence import Measurement
from packlight.measure.bandwidth import hardware
from packlight.measure.quality import Reference, evaluate, evaluate_reference
from packlight.measure.size import disk_size
from packlight.plan.allocate import allocate, options_for, stored_bytes
from packlight.plan.layout import artifact_bytes
from packlight.plan.recipes import fits
from packlight.runtime.complete import sample_windows
from packlight.runtime.load import load_model
from packlight.spec import Grid, Precision

WORK = Path("build/quality")
_SMALL = [Grid(bits, group, False, 6) for bits in (2, 3, 4, 5, 6, 7) for group in (32, 64)]
DISK_GRIDS = (*_SMALL, Grid(8, None, False), Grid(8, 64, False, 6))
END_GRIDS = (*(Grid(bits, 32, False, 6) for bits in (3, 4, 5, 6, 7)), Grid(8, None, False), Grid(8, 64, False, 6))
UNIFORM_TRIED = 1
"""Uniform recipes that are made for each size, the most promising by their estimated losses."""
OWN_GRID = "Q4_1"
"""A peer's format that is the grid on which the demo model was published: it reproduces it and proves nothing."""


@dataclass(frozen=True)
class Subject:
    """One artifact to make: the name says the method and the recipe."""

    name: str
    step: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", help="FILE or self")
    parser.add_argument("--calibration", help="FILE or self")
    parser.add_argument("--part", choices=("grids", "sizes"), action="append")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", nargs="+", default=["64", "row"])
    parser.add_argument("--symmetric", action="store_true", help="grids without zero points")
    parser.add_argument("--learned", type=int, nargs="*", default=[3, 2], help="widths that learned rounding runs at")
    parser.add_argument("--sizes", type=float, nargs="+", default=[60, 75, 88.2, 93.5, 105.5, 138.4], help="MB")
    parser.add_argument("--learned-below", type=float, default=70.0, help="MB: sizes that learned rounding fills too")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=Path, help="write the token ids of --data there, for the peers")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model)
    window = min(512, checkpoint.spec.max_context)
    cut, name = evaluation_windows(checkpoint, given.data, window, given.tokens)
    if given.windows:
        given.windows.write_text(json.dumps(cut), encoding="utf-8")
    calibration = CalibrationText(parse_data(given.calibration), given.calibration_windows)
    bench = Bench(given.model, checkpoint, cut, name, calibration, given.ledger)
    parts = given.part or ["grids", "sizes"]
    claims: list[dict[str, Any]] = []
    if "grids" in parts:
        claims += bench.grids(given.bits, given.groups, given.learned, given.symmetric)
    if "sizes" in parts:
        peers = json.loads(given.peers.read_text(encoding="utf-8")) if given.peers else []
        claims += bench.sizes(given.sizes, given.learned_below, peers)
    print(json.dumps({"model": given.model, "text": bench.note, "claims": claims, "rows": bench.table}))


def evaluation_windows(
    checkpoint: Checkpoint, data: str | None, window: int, tokens: int
) -> tuple[list[list[int]], str]:
    """Token ids to measure on, and what they are."""
    if data == "self":
        made = sample_windows(load_model(checkpoint), max(1, tokens // window), window, SEED + 1, lambda: None)
        return made, f"text made up by the model, seed {SEED + 1}, {len(made)} windows of {window} tokens"
    return pipeline.evaluation_windows(
        checkpoint, pipeline.Yardstick(None if data is None else Path(data), window, tokens)
    )


class Bench:
    """One model on one text."""

    def __init__(
        self,
        model: str,
        checkpoint: Checkpoint,
        cut: list[list[int]],
        note: str,
        calibration: CalibrationText,
        ledger: Path | None,
    ) -> None:
        self.model, self.checkpoint, self.cut = model, checkpoint, cut
        self.calibration, self.ledger = calibration, ledger
        self.note = note
        self.table: dict[str, dict[str, float]] = {}
        self._reference: Reference | None = None

    def grids(
        self, widths: list[int], groups: list[str], learned: list[int], is_symmetric: bool
    ) -> list[dict[str, Any]]:
        """Uniform grids, embedding and head left alone."""
        claims = []
        for bits in widths:
            for group in groups:
                size = None if group == "row" else int(group)
                grid = Grid(bits, size, symmetric=is_symmetric)
                if not fits(Precision(linear=grid), self.checkpoint.spec):
                    continue
                common = {"bits": bits, "group_size": size, "symmetric": is_symmetric}
                found = {
                    name: self.measure(Subject(f"{name} {grid}", {"method": method, **common, **options}))
                    for name, method, options in (
                        ("rtn", "rtn", {}),
                        ("rtn-mse", "rtn", {"clip": "mse"}),
                        ("gptq-plain", "gptq", {"guided": False}),
                        ("gptq", "gptq", {}),
                        *([("learned", "learned", {})] if bits in learned else []),
                    )
                }
                claims.append(lower(f"gptq below rtn on {grid}", found["gptq"], found["rtn"]))
                claims.append(lower(f"gptq below rtn-mse on {grid}", found["gptq"], found["rtn-mse"]))
                claims.append(lower(f"weighted tokens below plain gptq on {grid}", found["gptq"], found["gptq-plain"]))
                if "learned" in found:
                    claims.append(lower(f"learned below gptq on {grid}", found["learned"], found["gptq"]))
        return claims

    def sizes(self, sizes: list[float], learned_below: float, peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Files of given sizes in MB: a grid for every matrix, beside the best uniform recipe and the peers."""
        claims, found = [], []
        self.record(peer_rows(peers))
        for size in sizes:
            made = self.measure(Subject(f"allocated {size:g} MB", self.allocated(size * 1e6, "gptq")))
            uniform = self.uniform(size * 1e6)
            if uniform is not None:
                claims.append(lower(f"allocation below the best uniform recipe at {size:g} MB", made, uniform))
            if size < learned_below:
                learned = self.measure(Subject(f"learned {size:g} MB", self.allocated(size * 1e6, "learned")))
                claims.append(lower(f"learned below gptq at {size:g} MB", learned, made))
                made = min(made, learned, key=lambda row: row["kl"])
            found.append(made)
            rivals = [r for r in peers if r["kl"] is not None and not r["format"].startswith(OWN_GRID)]
            smaller = [row for row in rivals if row["bytes"] <= 1.001 * size * 1e6]
            if smaller:
                best = min(smaller, key=lambda row: row["kl"])
                claims.append(lower(f"below {best['peer']} {best['format']} at {size:g} MB", made, best))
            files = [row for row in rivals if row["peer"].startswith("llama.cpp")]
            if files and size * 1e6 < min(row["bytes"] for row in files):
                least = min(files, key=lambda row: row["bytes"])
                what = f"llama.cpp's smallest file, {least['format']} at {least['bytes'] / 1e6:.1f} MB"
                claims.append(lower(f"{size:g} MB below {what}", made, least))
        for rival in peers:
            no_larger = [row for row in found if rival["kl"] is not None and row["bytes"] <= rival["bytes"]]
            if no_larger and not rival["peer"].startswith("llama.cpp"):
                best = min(no_larger, key=lambda row: row["kl"])
                what = f"{rival['peer'].partition(' ')[0]} {rival['format']}"
                claims.append(lower(f"{best['bytes'] / 1e6:.1f} MB below {what}", best, rival))
        return claims

    def allocated(self, most: float, method: str) -> dict[str, Any]:
        """The step that fills `most` bytes on disk."""
        spec = self.checkpoint.spec
        options = options_for(spec, self.losses(method), stored_bytes)
        alone = sum(stored_bytes(t, Precision()) for t in spec.tensors if t.name not in options)
        room = most - alone
        while True:
            found = allocate(options, room)
            if found is None:
                raise SystemExit(f"{most / 1e6:g} MB is less than the smallest grids take")
            precision = Precision.of("bfloat16", found.grids, spec.tensors)
            excess = artifact_bytes(spec, precision, "packlight") - most
            if excess <= 0:
                return pipeline.step_options(precision, spec, method)
            room -= excess  # the header

    def losses(self, method: str) -> Losses:
        """What every matrix is expected to cost on every grid when a method has rounded it."""
        text = prepare(self.checkpoint, self.calibration)
        nearest = known_losses(self.checkpoint, text, DISK_GRIDS, END_GRIDS, "bfloat16", lambda stages: lambda: None)
        return lessened(nearest, build({"method": method}), self.checkpoint.spec)

    def uniform(self, most: float) -> dict[str, float] | None:
        """The best of the uniform recipes that take no more than `most` bytes: one grid for the blocks, one for the
        ends. The most promising by their estimated losses are made, and the one with the lowest KL is taken."""
        spec = self.checkpoint.spec
        losses = self.losses("gptq")
        tried = []
        for inner in DISK_GRIDS:
            for end in END_GRIDS:
                precision = Precision("bfloat16", inner, end)
                if fits(precision, spec) and artifact_bytes(spec, precision, "packlight") <= most:
                    loss = sum(losses[t.name][str(precision.grid_of(t))] for t in spec.tensors if t.name in losses)
                    tried.append((loss, precision))
        tried.sort(key=lambda pair: pair[0])
        found = [
            self.measure(Subject(f"uniform {precision}", pipeline.step_options(precision, spec, "gptq")))
            for _, precision in tried[:UNIFORM_TRIED]
        ]
        return min(found, key=lambda row: row["kl"], default=None)

    def measure(self, subject: Subject) -> dict[str, float]:
        """Make an artifact, or find it made, and compare it with the original; one line on stderr."""
        if subject.name in self.table:
            return self.table[subject.name]
        step = build(subject.step)
        out = WORK / Path(self.model).stem / subject.name.replace(" ", "-")
        out.parent.mkdir(parents=True, exist_ok=True)
        # Every artifact is compared with the original below; the two processes of a proof would add nothing.
        with patch.object(pipeline.proof, "prove", lambda *arguments: iter(())):
            made = pipeline.quantize(self.model, out, step, pipeline.Silent(), None, self.calibration)
        tick = lambda: None  # noqa: E731
        if self._reference is None:
            _, self._reference = evaluate_reference(load_model(self.checkpoint), self.cut, tick)
        artifact = open_checkpoint(out)
        found = evaluate(load_model(artifact), self.cut, self._reference, tick)
        seconds = next((row.value for row in made.rows if row.name == "job_s"), None)
        size = disk_size(artifact)
        rows = [Measurement("disk_bytes", size, "bytes", subject.name), *found.rows(subject.name, self.note)]
        if isinstance(seconds, int | float):
            rows.append(Measurement("job_s", seconds, "s", subject.name))
        self.record(rows)
        row = {"bytes": size, "kl": found.kl, "kl_stderr": found.kl_stderr, "perplexity": found.perplexity}
        self.table[subject.name] = row
        print(f"{subject.name}: {size / 1e6:.1f} MB, KL {found.kl:.4f}, ppl {found.perplexity:.2f}", file=sys.stderr)
        return row

    def record(self, rows: list[Measurement]) -> None:
        """Write rows to the ledger, in place of older ones of the same names and subjects."""
        if self.ledger is None:
            return
        known = {(row.name, row.subject) for row in rows}
        kept = [row for row in evidence.read(self.ledger) if (row.name, row.subject) not in known]
        half = self.ledger.with_suffix(".part")
        half.unlink(missing_ok=True)
        evidence.append(half, kept + evidence.stamped(rows, hardware(is_probed=False).threads))
        half.replace(self.ledger)


def peer_rows(peers: list[dict[str, Any]]) -> list[Measurement]:
    """What `benchmarks/peers` measured on the same tokens, as rows of evidence."""
    rows = []
    for peer in peers:
        subject = f"{peer['peer'].partition(' ')[0]} {peer['format']}"
        for name, unit in (("disk_bytes", "bytes"), ("kl", "nats"), ("perplexity", "1"), ("top1", "1")):
            key = "bytes" if name == "disk_bytes" else name
            spread = peer["kl_stderr"] if name == "kl" else None
            rows.append(
                Measurement(name, peer[key], unit, subject, spread=spread, note=f"{peer['peer']}: {peer['note']}")
            )
    return rows


def lower(claim: str, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """One claim, that the first has the lower KL divergence, and whether it holds."""
    return {"claim": claim, "holds": bool(mine["kl"] < theirs["kl"]), "kl": mine["kl"], "against": theirs["kl"]}


if __name__ == "__main__":
    torch.set_num_threads(hardware(is_probed=False).threads)
    main()
