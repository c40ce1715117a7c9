"""Proof that a compiled package is the model that it was made from, as `measure/proof.py` proves a checkpoint.

Both graphs take part: the prompt graph computes the first part of the recorded prompt, the token graph the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from packlight.errors import MeasurementError, ProofError
from packlight.evidence import Measurement
from packlight.measure import child
from packlight.measure.proof import GREEDY_TOKENS, MAX_KL, distance, read_proof, record
from packlight.runtime.complete import complete
from packlight.runtime.package import check_hashes, check_machine, read_package
from packlight.runtime.package_decoder import this_machine
from packlight.runtime.sampling import Sampling

SUBJECT = "compiled package"


@torch.inference_mode()
def record_model(directory: Path, model: PreTrainedModel, ids: list[int]) -> list[int]:
    """Write `proof.json` from the model in memory; returns what it goes on with after the prompt, greedily."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()  # (tokens, vocab)
    record(directory, ids, logits, {})
    return list(complete(model, ids, Sampling(max_tokens=GREEDY_TOKENS)))


def prove_package(path: Path, tokens: list[int] | None = None) -> Iterator[Measurement]:
    """Check every file of a package, load it in a fresh process and compare; yields one row per check that held.

    Args:
        path: the package.
        tokens: what the original goes on with after the recorded prompt, where it is known.

    Raises:
        CheckpointError: a file is missing or changed, or the package does not fit this machine.
        ProofError: it does not load, or it answers differently by more than rounding.
    """
    package, proof = read_package(path), read_proof(path)
    check_machine(package, this_machine())
    check_hashes(package)
    yield Measurement("proof_files", len(package.files), "1", SUBJECT, note="sizes and SHA-256 are as recorded")
    room = package.context - len(proof["ids"])
    asked = {
        "path": str(path),
        "ids": proof["ids"],
        "top_ids": proof["top_ids"],
        "max_tokens": min(GREEDY_TOKENS, room + 1) if tokens is None else len(tokens),
    }
    try:
        answer = child.ask(["-m", "packlight.measure.package_child"], asked)
    except MeasurementError as error:
        raise ProofError(f"{path} does not load in a fresh process: {error}") from error
    if answer["imported"]:
        raise ProofError(f"the process that was to load {path} without model code imported transformers")
    found, limit = distance(proof, answer["log_probs"]), MAX_KL[package.dtype]
    if not found <= limit:  # also true for NaN
        raise ProofError(
            f"{path} is not the model that it was made from: they differ by {found:.2g} nats, and rounding explains "
            f"at most {limit:g}"
        )
    positions = len(answer["log_probs"])
    yield Measurement("proof_package_kl", found, "nats", SUBJECT, n=positions, note=f"limit {limit:g}")
    if tokens is not None:
        same = sum(a == b for a, b in zip(tokens, answer["tokens"], strict=True)) / len(tokens)
        note = "greedy tokens of the package and of the model that it was made from; they part at near ties"
        yield Measurement("greedy_agreement", same, "1", SUBJECT, n=len(tokens), note=note)
    note = "in a fresh process: torch imported, package checked and loaded"
    yield Measurement("load_s", answer["load_s"], "s", SUBJECT, n=1, note=note)
    note = f"the same, and a prompt of {len(proof['ids']) - positions + 1} tokens"
    yield Measurement("first_token_s", answer["first_token_s"], "s", SUBJECT, n=1, note=note)
