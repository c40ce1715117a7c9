"""Proof that a saved artifact is the model that was computed.

`record` writes what the model said before it was saved: the most probable tokens after the last positions of a prompt,
from the tensors that were in memory. `prove` loads the artifact in fresh processes, once with packlight's runtime and
once with stock transformers, and compares. Nothing is called saved before that. Artifacts in packlight's own layout
are loaded by transformers with packlight imported, and the rows say so; all others, by transformers alone.

Besides, `record` keeps a hash of every tensor, de-quantized, and `prove` compares those of what is read back.

The distance is the KL divergence restricted to the recorded tokens, sum p (log p - log q) in nats, as a mean over
positions. Loading the same numbers gives differences of rounding only; a wrong nibble order, a lost zero point or a
fallback to another precision gives far more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from packlight.checkpoint.masked import masked_names, read_masked
from packlight.checkpoint.open import Checkpoint, open_checkpoint
from packlight.checkpoint.packed import packed_names, read_quantized
from packlight.checkpoint.stored import OWN_METHOD
from packlight.checkpoint.tensors import read_tensor
from packlight.errors import MeasurementError, ProofError
from packlight.evidence import Measurement
from packlight.measure import child
from packlight.ops.grid import tensor_digest
from packlight.runtime.complete import complete
from packlight.runtime.load import load_model
from packlight.runtime.packed import PackedEmbedding, PackedLinear
from packlight.runtime.sampling import Sampling

PROOF_NAME = "proof.json"
POSITIONS = 16
RECORDED = 32
MAX_KL = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
"""Largest mean distance that counts as the same model, by the compute dtype: rounding differs between kernels."""
GREEDY_TOKENS = 16


def record(path: Path, ids: list[int], logits: torch.Tensor, digests: Mapping[str, str]) -> None:
    """Write `proof.json` into an artifact.

    Args:
        ids: the prompt.
        logits: (tokens, vocab) float32, computed from the tensors that were written.
        digests: `ops.grid.tensor_digest` of those tensors, de-quantized, by name.
    """
    log_probs = torch.log_softmax(logits[-POSITIONS:], dim=-1)
    top = log_probs.topk(min(RECORDED, log_probs.shape[-1]), dim=-1)
    proof = {
        "ids": ids,
        "top_ids": top.indices.tolist(),
        "top_log_probs": [[round(value, 5) for value in row] for row in top.values.tolist()],
        "digests": dict(sorted(digests.items())),
    }
    (path / PROOF_NAME).write_text(json.dumps(proof) + "\n", encoding="utf-8")


def prove(path: Path, is_portable: bool = True) -> Iterator[Measurement]:
    """Load the artifact back in fresh processes and compare; yields one row per check that held.

    Args:
        path: the artifact.
        is_portable: whether stock transformers alone is expected to load it.

    Raises:
        ProofError: no proof is recorded, a loading failed, or an answer differs by more than rounding.
    """
    proof = read_proof(path)
    checkpoint = open_checkpoint(str(path))
    limit = MAX_KL[checkpoint.spec.dtype]
    asked = {
        "path": str(path),
        "ids": proof["ids"],
        "top_ids": proof["top_ids"],
        "max_tokens": GREEDY_TOKENS,
    }
    ours = _ask(["-m", "packlight.measure.proof"], asked, "packlight's runtime")
    yield _compare("proof_runtime_kl", proof, ours, limit, "packlight's runtime")
    yield _compare_digests(proof, ours["digests"])
    yield Measurement("packed_modules", ours["packed_modules"], "1", "packed", note=f"kernels: {ours['kernels']}")
    is_own = _is_own(checkpoint)
    if not (is_portable or is_own):
        yield Measurement(
            "proof_transformers_kl", None, "nats", "packed", note="the installed transformers cannot load this"
        )
        return
    loader, imports = "stock transformers", {}
    if is_own:
        loader, imports = "transformers with packlight imported", {"imports": ["packlight"]}
    stock = _ask(["-P", child.script("stock_load.py")], asked | imports, loader)
    if stock["imported"] and not is_own:
        raise ProofError("the process that was to use stock transformers alone imported packlight")
    row = _compare("proof_transformers_kl", proof, stock, limit, loader)
    yield replace(row, note=f"{row.note}; with packlight imported") if is_own else row
    same = sum(a == b for a, b in zip(ours["tokens"], stock["tokens"], strict=True))
    yield Measurement(
        "greedy_agreement",
        same / len(stock["tokens"]),
        "1",
        "packed",
        n=len(stock["tokens"]),
        note=f"greedy tokens of {loader} and of packlight's runtime; they part at near ties",
    )


def read_proof(path: Path) -> dict[str, Any]:
    """The recorded proof. Raises ProofError where there is none."""
    file = path / PROOF_NAME
    if not file.is_file():
        raise ProofError(f"{path} holds no {PROOF_NAME}: only artifacts that packlight saved can be proved")
    try:
        proof: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProofError(f"{file} is damaged ({error}): make the artifact again") from error
    return proof


def distance(proof: dict[str, Any], log_probs: list[list[float]]) -> float:
    """Mean over positions of sum p (log p - log q) over the recorded tokens, in nats.

    Args:
        log_probs: of the recorded tokens at each position, as a loaded model gives them.
    """
    p = torch.tensor(proof["top_log_probs"], dtype=torch.float64)  # (positions, recorded)
    q = torch.tensor(log_probs, dtype=torch.float64)
    # Over a part of the vocabulary the sum alone can be negative; with q - p it is a divergence again.
    return float((p.exp() * (p - q) - p.exp() + q.exp()).sum(dim=-1).mean())


def _is_own(checkpoint: Checkpoint) -> bool:
    """Whether it has packlight's own layout."""
    quantization = checkpoint.config.get("quantization_config") or {}
    return bool(quantization.get("quant_method") == OWN_METHOD)


def _ask(arguments: list[str], asked: dict[str, Any], loader: str) -> dict[str, Any]:
    try:
        return child.ask(arguments, asked)
    except MeasurementError as error:
        raise ProofError(f"{loader} does not load {asked['path']}: {error}") from error


def _compare(name: str, proof: dict[str, Any], answer: dict[str, Any], limit: float, loader: str) -> Measurement:
    found = distance(proof, answer["log_probs"])
    if not found <= limit:  # also true for NaN
        raise ProofError(
            f"the artifact as {loader} loads it is not the model that was computed: "
            f"they differ by {found:.2g} nats, and rounding explains at most {limit:g}"
        )
    return Measurement(name, found, "nats", "packed", n=len(answer["log_probs"]), note=f"limit {limit:g}")


def _compare_digests(proof: dict[str, Any], found: dict[str, str]) -> Measurement:
    """Logits do not see a change of one code in millions; the de-quantized tensors themselves do."""
    other = sorted(name for name, digest in proof["digests"].items() if found.get(name) != digest)
    if other:
        raise ProofError(f"{len(other)} tensors of the artifact are not those that were computed, such as {other[0]}")
    return Measurement("proof_tensors", len(found), "1", "packed", note="de-quantized tensors equal bit for bit")


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Of every logical tensor as it is read back from the files, de-quantized."""
    packed, masked = packed_names(checkpoint.index), masked_names(checkpoint.index)
    parts = {part for matrix in packed.values() for part in matrix.names}
    parts |= {part for matrix in masked.values() for part in matrix}
    found = {f"{base}.weight": tensor_digest(read_quantized(checkpoint, base).dequantize()) for base in packed}
    found |= {f"{base}.weight": tensor_digest(read_masked(checkpoint, base)) for base in masked}
    for name, entry in checkpoint.index.items():
        if name not in parts:
            found[name] = tensor_digest(read_tensor(entry))
    return found


def _answer(path: str, ids: list[int], top_ids: list[list[int]], max_tokens: int) -> dict[str, Any]:
    checkpoint: Checkpoint = open_checkpoint(path)
    model = load_model(checkpoint)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -len(top_ids) :].float()
    tokens = list(complete(model, ids, Sampling(max_tokens=max_tokens)))
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    kernels = sorted({module.kernel for module in packed if isinstance(module, PackedLinear)})
    return {
        "log_probs": torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(top_ids)).tolist(),
        "tokens": tokens,
        "digests": _digests(checkpoint),
        "packed_modules": len(packed),
        "kernels": ", ".join(kernels),
    }


if __name__ == "__main__":
    child.answer(_answer(**child.request()))
