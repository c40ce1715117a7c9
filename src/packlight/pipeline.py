"""The way: open -> plan -> measure -> compress -> measure -> save -> prove. Read this first.

This is the only file that knows the order of the rooms. `fit` goes the whole way from a budget; `quantize` goes it
with a method that the user chose, `prune` with one that sets weights to zero or takes structures out; `evaluate` and
`prove` are single stations of it. Every station appends its rows to the ledger of the job as they arrive, and a job
that was cut short passes over the stations whose rows are there.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from packlight import evidence
from packlight.checkpoint import save
from packlight.checkpoint.open import Checkpoint, open_checkpoint, short_name
from packlight.checkpoint.tensors import check_architecture, has_nan
from packlight.compress import run as compress
from packlight.compress.calibration import CalibrationText, Prepared, prepare
from packlight.compress.choice import (
    choose,
    fits_whole,
    predictions,
    promise,
    refuse_out_of_reach,
    spent,
    step_options,
    weigh,
)
from packlight.compress.influence import INFLUENCES_NAME, known_influences
from packlight.compress.prune.share import counted, needs_counts
from packlight.compress.registry import build
from packlight.compress.step import Step
from packlight.compress.sweep import known_guide
from packlight.compress.walk import Calibration, WalkResult
from packlight.errors import CheckpointError, ProofError, UsageError
from packlight.evidence import LEDGER_NAME, Ledger, Measurement
from packlight.measure import proof
from packlight.measure.bandwidth import hardware as find_hardware
from packlight.measure.footprint import footprint
from packlight.measure.hardware import KERNELS, calibrate
from packlight.measure.memory import current_bytes, flush, peak_bytes
from packlight.measure.package_proof import prove_package
from packlight.measure.quality import Reference, evaluate_reference
from packlight.measure.quality import evaluate as compare
from packlight.measure.size import disk_size, size_rows
from packlight.measure.text import load_text, windows
from packlight.plan.allocate import Allocation, least_precision
from packlight.plan.layout import Layout, artifact_bytes, check_layout, layout_of, tensor_layout
from packlight.plan.memory import disk_bytes, stream_bytes
from packlight.plan.recipes import (
    judge,
    loads_in_transformers,
)
from packlight.report.card import model_card
from packlight.runtime.allocator import weights_apart
from packlight.runtime.bitsandbytes import check_loader, load_with
from packlight.runtime.compiled import compile_body_
from packlight.runtime.complete import SAMPLED_TOGETHER
from packlight.runtime.loader import split_loader
from packlight.runtime.package import is_package
from packlight.runtime.tokenizer import load_tokenizer
from packlight.spec import FLOAT_DTYPES, Budget, Hardware, Precision, format_size

PROOF_TOKENS = 64
FIT_WINDOWS = 16
"""Windows of calibration text that `fit` takes: an eighth of what `quantize` takes, for most of the gain."""
PRUNE_CONTEXT = 512
"""Tokens in the cache where `prune` measures memory and speed."""
SPARE_BYTES = 10_000_000
"""Kept free beside the weights: tokenizer, ledger, card."""
ORIGINAL, PACKED = "original", "packed"

Tick = Callable[[], None]


class Watcher(Protocol):
    """Whoever shows progress. `stage` announces work of `total` steps and returns what to call after each."""

    def stage(self, label: str, total: int) -> Tick: ...

    def say(self, line: str) -> None: ...


class Silent:
    """Shows nothing."""

    def stage(self, label: str, total: int) -> Tick:
        return lambda: None

    def say(self, line: str) -> None:
        return None


@dataclass(frozen=True)
class Yardstick:
    """What quality is measured on: the same for every subject of one comparison.

    Args:
        data: text file; None for the bundled text.
        window: tokens per window.
        tokens: tokens in all, at most.
    """

    data: Path | None = None
    window: int = 512
    tokens: int = 8192


@dataclass(frozen=True)
class Made:
    """A finished artifact: where it is, what its ledger says, and whether it keeps what was promised."""

    path: Path
    rows: list[Measurement]
    missed: tuple[str, ...] = ()

    @property
    def is_promise_kept(self) -> bool:
        return not self.missed

    @property
    def text(self) -> str | None:
        """The text that quality was measured on, and its windows."""
        return next((row.note for row in self.rows if row.name == "perplexity"), None)


@dataclass(frozen=True)
class Compared:
    """Rows of `evaluate`, one list for each model, and the text they were measured on."""

    text: str
    num_tokens: int
    context: int
    rows: list[list[Measurement]]


@dataclass(frozen=True)
class Strategy:
    """How `fit` spends a budget.

    Args:
        method: what rounds the weights.
        is_uniform: one grid for all blocks, from shapes alone, which stock transformers loads; otherwise every matrix
            gets a grid of its own, by what it costs the model.
        calibration: text for the method, and for what matrices cost.
    """

    method: str = "gptq"
    is_uniform: bool = False
    calibration: CalibrationText = field(default_factory=lambda: CalibrationText(windows=FIT_WINDOWS))


def fit(
    model: str,
    out: Path,
    budget: Budget,
    yardstick: Yardstick,
    watcher: Watcher,
    threads: int | None = None,
    strategy: Strategy | None = None,
) -> Made:
    """Find the best recipe for a budget, apply it, measure the result and say whether it fits.

    Args:
        model: anything `open_checkpoint` takes, not yet quantized.
        out: the artifact's directory; one made earlier by the same request is returned as it is.
        strategy: how the budget is spent; default: every matrix on a grid of its own, by GPTQ.

    Raises:
        BudgetError: no recipe meets the budget; nothing is written.
        UsageError: bad input, or a target that cannot be written.
    """
    strategy = strategy or Strategy()
    checkpoint = _open(model)
    asked = asdict(budget) | {"method": strategy.method, "uniform": strategy.is_uniform}
    compress.check_dense(checkpoint)
    method = build({"method": strategy.method})
    if method.precision.linear is None:
        raise UsageError(f"{method.name} puts no weight on a grid: fit takes a method that quantizes, such as gptq")
    cut, note = evaluation_windows(checkpoint, yardstick)
    text = prepare(checkpoint, strategy.calibration, method.reading)
    request = _request(checkpoint) | {"asked": asked, "text": note, "calibration": text.asked()}
    if save.made_earlier(out, request):
        watcher.say(f"{out} was made by the same request: nothing to do")
        return _judged(out, evidence.read(out / LEDGER_NAME), budget)
    save.refuse_existing(out)
    # What is out of reach whatever the speed is said before the seconds that a probe takes.
    spec, untimed = checkpoint.spec, replace(budget, min_tps=None)
    unprobed = find_hardware(threads, is_probed=False)
    if strategy.is_uniform or fits_whole(spec, untimed, unprobed):
        choose(spec, untimed, unprobed)
    else:
        refuse_out_of_reach(spec, untimed, unprobed)
    machine = probe(watcher, threads)
    is_uniform = strategy.is_uniform or fits_whole(spec, budget, machine)
    allocation: Allocation | None = None
    if is_uniform:
        precision = choose(spec, budget, machine).precision
    else:
        compress.check_modules(checkpoint, least_precision(spec))
        start = partial(watcher.stage, "what every matrix costs on every grid")
        precision, allocation = weigh(checkpoint, text, budget, machine, method, start)
    watcher.say(f"chose {precision}: {promise(judge(spec, precision, budget, machine))}")
    step = build(step_options(precision, spec, strategy.method))

    def measure(packed: Checkpoint, ledger: Ledger) -> None:
        if allocation is not None and not ledger.has("predicted_kl", PACKED):
            ledger.add(spent(allocation))
        _measure_pair(checkpoint, packed, budget, machine, ledger, watcher)
        predicted = None if allocation is None else allocation.loss
        _quality_pair(checkpoint, packed, cut, note, ledger, watcher, predicted)

    read = None if step.reading is None else text
    rows = _make(checkpoint, step, out, request, layout_of(step.precision), read, measure, watcher)
    return _judged(out, rows, budget)


def quantize(
    model: str,
    out: Path,
    step: Step,
    watcher: Watcher,
    layout: Layout | None = None,
    calibration: CalibrationText | None = None,
) -> Made:
    """Apply one step and prove the result: bytes, errors per block, the job's own cost; `evaluate` measures quality.

    Args:
        layout: of the artifact; default: the widest-read one that holds the step's precision.
        calibration: for the steps that read inputs; default: the bundled text.

    Raises:
        UsageError: bad input, a step that does not suit the model, or a target that cannot be written.
        ProofError: the artifact does not load back as what was computed.
    """
    checkpoint = _open(model)
    layout = layout or layout_of(step.precision)
    check_layout(step.precision, layout)
    compress.check(step, checkpoint)
    return _apply_chosen(checkpoint, out, step, layout, calibration, lambda packed, ledger: None, watcher)


def prune(
    model: str,
    out: Path,
    step: Step,
    watcher: Watcher,
    calibration: CalibrationText | None = None,
    threads: int | None = None,
) -> Made:
    """Set weights to zero or take structures out, and say what that saved: bytes, peak memory and speed are measured
    before and after.

    Zeros of a global count are shared out among the matrices first; `evaluate` measures quality.

    Args:
        calibration: for the steps that read inputs; default: the bundled text.

    Raises:
        UsageError: bad input, a step that does not suit the model, or a target that cannot be written.
        ProofError: the artifact does not load back as what was computed.
    """
    checkpoint = _open(model)
    compress.check_dense(checkpoint)
    if needs_counts(step):
        compress.check_modules(checkpoint, step.precision)
        step = counted(step, checkpoint, watcher.stage("how the matrices share the zeros", 2))
    compress.check(step, checkpoint)
    budget = Budget(context=min(PRUNE_CONTEXT, checkpoint.spec.max_context))
    machine = find_hardware(threads, is_probed=False)

    def measure(packed: Checkpoint, ledger: Ledger) -> None:
        _measure_pair(checkpoint, packed, budget, machine, ledger, watcher)

    return _apply_chosen(checkpoint, out, step, layout_of(step.precision), calibration, measure, watcher)


def evaluate(
    models: Sequence[str],
    yardstick: Yardstick,
    watcher: Watcher,
    threads: int | None = None,
    is_compiled: bool = False,
) -> Compared:
    """Measure any number of checkpoints on the same tokens; the first is the reference for KL and top-1.

    Memory and speed are those of one user with a cache of one window. A model may name a loader that quantizes it on
    the fly, as in `demo@bnb-nf4`; its bytes are those in memory.

    Args:
        is_compiled: compile each model for the windows of the text first; speed and memory stay those of eager models.

    Raises:
        UsageError: bad input, no C++ compiler where one is needed, or models whose vocabularies differ.
        MissingExtraError: a loader's library is absent.
    """
    sources = [split_loader(model) for model in models]
    opened = [_open(source) for source, _ in sources]
    for checkpoint, (_, loader) in zip(opened, sources, strict=True):
        check_loader(checkpoint, loader)
    for model, checkpoint in zip(models, opened, strict=True):
        if checkpoint.spec.vocab_size != opened[0].spec.vocab_size:
            raise CheckpointError(
                f"the vocabularies of {models[0]} and {model} have {opened[0].spec.vocab_size} and "
                f"{checkpoint.spec.vocab_size} tokens: only models with the same tokenizer can be compared"
            )
    longest = min(checkpoint.spec.max_context for checkpoint in opened)
    cut, note = evaluation_windows(opened[0], replace(yardstick, window=min(yardstick.window, longest)))
    watcher.say(f"text: {note}")
    rows: list[list[Measurement]] = []
    reference: Reference | None = None
    for model, checkpoint, (_, loader) in zip(models, opened, sources, strict=True):
        # Quality first: what is wrong with a checkpoint shows when it is loaded, here in a sentence of its own.
        quality, reference = _quality(checkpoint, model, cut, note, reference, watcher, loader, is_compiled)
        tick = watcher.stage(f"speed and memory of {model}", 1)
        measured = footprint(checkpoint.path, len(cut[0]), threads=threads, loader=loader)
        tick()
        size = size_rows(checkpoint, model)
        if loader is not None:
            size = measured.state_rows(model, checkpoint.spec.num_params)
        made = [*size, *measured.rows(model), *quality]
        rows.append(evidence.stamped(made, torch.get_num_threads()))
    return Compared(note, len(cut) * len(cut[0]), len(cut[0]), rows)


def prove(path: Path) -> list[Measurement]:
    """Load an artifact back in fresh processes and compare it with what was recorded when it was saved.

    Raises:
        ProofError: it is not the model that was computed.
    """
    if is_package(path):
        return evidence.stamped(prove_package(path), torch.get_num_threads())
    checkpoint = _open(str(path))
    precision = checkpoint.spec.stored or Precision(checkpoint.spec.dtype)
    claimed = [row for row in evidence.read(path / LEDGER_NAME) if row.name == "disk_bytes" and row.subject == PACKED]
    size = disk_size(checkpoint)
    if claimed and claimed[-1].value != size:
        raise ProofError(f"the weights of {path} are {size} bytes and were saved as {claimed[-1].value}")
    rows = [Measurement("disk_bytes", size, "bytes", PACKED)]
    rows += proof.prove(path, loads_in_transformers(precision, checkpoint.spec))
    return evidence.stamped(rows, torch.get_num_threads())


def probe(watcher: Watcher, threads: int | None = None) -> Hardware:
    """This machine, with the rates of every kernel."""
    tick = watcher.stage("probing this machine", len(KERNELS) + 1)
    machine = find_hardware(threads)
    tick()
    return calibrate(machine, KERNELS, tick)


def _apply_chosen(
    checkpoint: Checkpoint,
    out: Path,
    step: Step,
    layout: Layout,
    calibration: CalibrationText | None,
    measure: Callable[[Checkpoint, Ledger], None],
    watcher: Watcher,
) -> Made:
    """One step that was chosen by hand, unless the same request has been fulfilled already."""
    compress.check_modules(checkpoint, step.precision)
    text = _prepare(checkpoint, step, calibration)
    request = _request(checkpoint) | {"layout": layout, "steps": [step.to_dict()]} | _text_asked(text)
    if save.made_earlier(out, request):
        watcher.say(f"{out} was made by the same request: nothing to do")
        return Made(out, evidence.read(out / LEDGER_NAME))
    save.refuse_existing(out)
    return Made(out, _make(checkpoint, step, out, request, layout, text, measure, watcher))


def _make(
    checkpoint: Checkpoint,
    step: Step,
    out: Path,
    request: dict[str, Any],
    layout: Layout,
    text: Prepared | None,
    measure: Callable[[Checkpoint, Ledger], None],
    watcher: Watcher,
) -> list[Measurement]:
    """Compress, write, measure, prove and publish; returns the ledger's rows."""
    spec, precision = checkpoint.spec, step.precision
    result = step.reshaped(spec)
    recipe = {**request, "steps": [step.to_dict()]}
    needed = 2 * disk_bytes(result, precision, layout).total + SPARE_BYTES
    if text is not None and text.size.on_disk:
        needed += stream_bytes(spec, text.size)
    with save.job(out, recipe, needed) as work:
        ledger = Ledger(work.partial / LEDGER_NAME, torch.get_num_threads())
        _compress(checkpoint, step, work, recipe, layout, text, ledger, watcher)
        packed = open_checkpoint(work.artifact)
        if not ledger.has("disk_bytes", PACKED):
            ledger.add(size_rows(checkpoint, ORIGINAL))
            ledger.add(step.measure(spec, packed))
            ledger.add(size_rows(packed, PACKED, artifact_bytes(result, precision, layout)))
        measure(packed, ledger)
        if not ledger.has("proof_runtime_kl", PACKED):
            tick = watcher.stage("proving the artifact in fresh processes", 1)
            ledger.add(proof.prove(work.artifact, loads_in_transformers(precision, spec)))
            tick()
        name, text_of = short_name(checkpoint.source), save.recipe_text(recipe)
        card = model_card(name, ledger.rows, text_of, layout == "packlight" and precision.is_own)
        (work.artifact / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(ledger.path, work.artifact / LEDGER_NAME)
        save.publish(work)
    return ledger.rows


def _compress(
    checkpoint: Checkpoint,
    step: Step,
    work: save.Job,
    recipe: Mapping[str, Any],
    layout: Layout,
    text: Prepared | None,
    ledger: Ledger,
    watcher: Watcher,
) -> None:
    """All blocks, then the artifact's files without ledger and card. Finished blocks are not done again."""
    if (work.artifact / proof.PROOF_NAME).exists():
        return
    ids = _proof_ids(checkpoint)
    result = WalkResult()
    blocks = checkpoint.spec.num_layers + 2
    claim = step.plan(checkpoint.spec, None if text is None else text.size)
    if text is not None:
        place = "on disk" if text.size.on_disk else "in memory"
        states = format_size(stream_bytes(checkpoint.spec, text.size))
        watcher.say(f"calibration: {text.note}; {states} of hidden states, {place}")
    cost = f"{format_size(claim.peak_bytes)} of memory and {60 * claim.minutes:.0f} s"
    watcher.say(f"the job itself is planned to take {cost}, {blocks} blocks one by one")
    is_fresh = not compress.block_files(work.blocks)
    flush()
    base, start = current_bytes(), time.monotonic()
    calibration = None if text is None else _calibration(step, text, work, ledger, watcher)
    tick = watcher.stage(f"compressing block by block ({step.name})", blocks)
    for _ in compress.block_files(work.blocks):
        tick()
    # Without calibration nothing large is allocated but weights; with it, mapping every block of memory takes too long.
    with weights_apart() if calibration is None else nullcontext():
        for row in compress.run(step, checkpoint, work.blocks, layout, ids, calibration, result):
            # A job that was cut short while a block was written did that block again, to the same row.
            if not ledger.has(row.name, row.subject):
                ledger.add([row])
            tick()
    stored = tensor_layout(step.reshaped(checkpoint.spec), step.precision, layout)
    reconfigured = step.reconfigured(checkpoint.config, compress.removed_blocks(work.blocks))
    config = save.artifact_config(reconfigured, checkpoint.spec, step.precision, layout)
    save.write_artifact(work, checkpoint, stored, compress.block_reader(work.blocks), config, recipe)
    assert result.proof_logits is not None
    if is_fresh:  # a job that goes on did only a part of the work
        taken_s, peak = time.monotonic() - start, peak_bytes() - base
        ledger.add([Measurement("job_peak_bytes", peak, "bytes", PACKED, predicted=claim.peak_bytes)])
        ledger.add([Measurement("job_s", taken_s, "s", PACKED, predicted=60 * claim.minutes)])
    proof.record(work.artifact, ids, result.proof_logits, compress.digests(work.blocks))


def _prepare(checkpoint: Checkpoint, step: Step, calibration: CalibrationText | None) -> Prepared | None:
    """The calibration text of a step that reads inputs."""
    if step.reading is None:
        return None
    return prepare(checkpoint, calibration or CalibrationText(), step.reading)


def _text_asked(text: Prepared | None) -> dict[str, Any]:
    """What a recipe says about the calibration text."""
    return {} if text is None else {"calibration": text.asked()}


def _calibration(step: Step, text: Prepared, work: save.Job, ledger: Ledger, watcher: Watcher) -> Calibration:
    tick: Tick = lambda: None  # noqa: E731 - only the model's own text takes time
    if text.windows is None:
        tick = watcher.stage("making up calibration text", math.ceil(text.size.windows / SAMPLED_TOGETHER))
    calibration, row = text.ready(work.partial, tick)
    if not ledger.has(row.name, PACKED):
        ledger.add([row])
    if step.reading is not None and step.reading.ranks_blocks:
        start = partial(watcher.stage, "what each block does to the text")
        found = known_influences(text.checkpoint, calibration, work.partial / INFLUENCES_NAME, start)
        return replace(calibration, influences=found)
    if step.reading is None or not step.reading.weighs_tokens:
        return calibration
    start = partial(watcher.stage, "which tokens matter to which matrix")
    return replace(calibration, guide=known_guide(text.checkpoint, calibration, start))


def _measure_pair(
    original: Checkpoint, packed: Checkpoint, budget: Budget, machine: Hardware, ledger: Ledger, watcher: Watcher
) -> None:
    """Peak memory and speed of both, each in a child process, beside what the plan had said."""
    for subject, checkpoint in ((ORIGINAL, original), (PACKED, packed)):
        if ledger.has("peak_bytes", subject):
            continue
        tick = watcher.stage(f"speed and memory of the {subject}", 1)
        measured = footprint(checkpoint.path, budget.context, budget.users, threads=machine.threads)
        claims: dict[str, float] = {}
        if checkpoint.spec.stored is not None or checkpoint.spec.dtype in FLOAT_DTYPES:  # of float64 nothing is claimed
            precision = checkpoint.spec.stored or Precision(checkpoint.spec.dtype)
            claims = predictions(checkpoint.spec, precision, budget, machine)
        ledger.add(replace(row, predicted=claims.get(row.name)) for row in measured.rows(subject))
        tick()


def _quality_pair(
    original: Checkpoint,
    packed: Checkpoint,
    cut: list[list[int]],
    note: str,
    ledger: Ledger,
    watcher: Watcher,
    predicted_kl: float | None = None,
) -> None:
    if ledger.has("kl", PACKED):
        return
    rows, reference = _quality(original, ORIGINAL, cut, note, None, watcher)
    ledger.add(rows)
    rows, _ = _quality(packed, PACKED, cut, note, reference, watcher)
    ledger.add(replace(row, predicted=predicted_kl) if row.name == "kl" else row for row in rows)


def _quality(
    checkpoint: Checkpoint,
    subject: str,
    cut: list[list[int]],
    note: str,
    reference: Reference | None,
    watcher: Watcher,
    loader: str | None = None,
    is_compiled: bool = False,
) -> tuple[list[Measurement], Reference]:
    if damaged := next((name for name, entry in checkpoint.index.items() if has_nan(entry)), None):
        raise CheckpointError(f"{checkpoint.source} holds a NaN or an infinity in {damaged}: download it again")
    tick = watcher.stage(f"quality of {subject}", len(cut))
    model = load_with(checkpoint, loader)
    if is_compiled:
        compile_body_(model, len(cut[0]))
    if reference is None:
        quality, reference = evaluate_reference(model, cut, tick)
    else:
        quality = compare(model, cut, reference, tick)
    return list(quality.rows(subject, note)), reference


def _judged(path: Path, rows: list[Measurement], budget: Budget) -> Made:
    """Hold the measured result against what was asked."""
    found = {row.name: row.value for row in rows if row.subject == PACKED and isinstance(row.value, int | float)}
    before = {row.name: row.value for row in rows if row.subject == ORIGINAL and isinstance(row.value, int | float)}
    missed = []
    if budget.memory_bytes is not None and found["peak_bytes"] > budget.memory_bytes:
        missed.append(
            f"it needs {format_size(found['peak_bytes'])} and {format_size(budget.memory_bytes)} were allowed"
        )
    if budget.min_tps is not None and found["decode_tps"] < budget.min_tps:
        missed.append(f"it decodes {found['decode_tps']:.3g} tokens/s and {budget.min_tps:g} were asked for")
    loss = 100 * (found["perplexity"] / before["perplexity"] - 1)
    if budget.max_loss_pct is not None and loss > budget.max_loss_pct:
        missed.append(f"its perplexity is {loss:.3g} % higher and {budget.max_loss_pct:g} % were allowed")
    return Made(path, rows, tuple(missed))


def _open(model: str) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    check_architecture(checkpoint.config)
    return checkpoint


def _request(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a recipe says about where it starts from."""
    source = {"name": short_name(checkpoint.source), "sha256": save.content_hash(checkpoint)}
    return {"packlight": version("packlight"), "source": source}


def evaluation_windows(checkpoint: Checkpoint, yardstick: Yardstick) -> tuple[list[list[int]], str]:
    """The windows that quality is measured on, and the line that describes them."""
    text = load_text(yardstick.data)
    window = min(yardstick.window, checkpoint.spec.max_context)
    # verbose=False: a text is longer than the model's context, and is cut into windows here
    ids = load_tokenizer(checkpoint)(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    cut = windows(ids, window, yardstick.tokens)
    tokens = len(cut) * window
    return cut, f"{text.name} (sha256 {text.sha256[:12]}), {tokens} tokens in {len(cut)} windows of {window}"


def _proof_ids(checkpoint: Checkpoint) -> list[int]:
    """The start of the bundled text as the model's own tokens."""
    opening = load_text().content[: 16 * PROOF_TOKENS]
    ids = load_tokenizer(checkpoint)(opening, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids[: min(PROOF_TOKENS, checkpoint.spec.max_context)])
