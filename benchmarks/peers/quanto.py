"""optimum-quanto, weights only: qint8 per row, qint4 and qint2 in the groups that it chooses for the width of a row.

Its weights are de-quantized into a float32 copy of the original. The head stays as it is: it shares its weights with
the embedding, which quanto does not quantize.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.common import (
    Recipe,
    Reference,
    Row,
    Subject,
    block_linears,
    chosen,
    load_original,
    measure_all,
    parser,
    rest_bytes,
    start,
    torch_logits,
    write,
)
from optimum.quanto import freeze, qint2, qint4, qint8, quantize

PEER = f"optimum-quanto {version('optimum-quanto')}"


def measure(reference: Reference, model: Path, formats: list[str] | None = None) -> Iterator[Row]:
    """Rows of the formats, all of them by default; `model` is the directory of the original."""
    recipes = _recipes(model)
    yield from measure_all(reference, PEER, {name: recipes[name] for name in formats or recipes})


def _recipes(model: Path) -> dict[str, Recipe]:
    return {kind.name: partial(_quantize, model, kind) for kind in (qint8, qint4, qint2)}


@torch.inference_mode()
def _quantize(directory: Path, kind: Any) -> Subject:
    original, quantized = load_original(directory), load_original(directory)
    quantize(quantized, weights=kind, exclude="lm_head")
    freeze(quantized)
    size = rest_bytes(original)
    groups = set()
    for name, linear in block_linears(original).items():
        module: Any = quantized.base_model.get_submodule(name)
        weight = module.weight
        size += kind.bits * linear.weight.numel() // 8 + 2 * weight._scale.numel()
        if kind.bits < 8:
            size += 2 * weight._shift.numel()
            groups.add(module.weight_group_size)
        linear.weight.copy_(weight.dequantize())
    scales = f"scale and shift in 16 bits per {sorted(groups)} weights" if groups else "scale in 16 bits per row"
    note = f"{kind.bits} bits + {scales}; rest 16 bits (both evaluated in float32)"
    return Subject(torch_logits(original), size, note)


def main() -> None:
    options = parser(__doc__).parse_args()
    write(measure(start(options), options.model, chosen(options, _recipes(options.model))), options.out)


if __name__ == "__main__":
    main()
