"""HQQ, half-quadratic quantization, which needs no calibration: 4, 3 and 2 bits in groups of 64.

Its weights are de-quantized into a float32 copy of the original, with scales and zeros rounded to the 16 bits that
they are counted with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

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
from hqq.core.quantize import Quantizer

PEER = f"hqq {version('hqq')}"
GROUP = 64


def measure(reference: Reference, model: Path, formats: list[str] | None = None) -> Iterator[Row]:
    """Rows of the formats, all of them by default; `model` is the directory of the original."""
    recipes = _recipes(model)
    yield from measure_all(reference, PEER, {name: recipes[name] for name in formats or recipes})


def _recipes(model: Path) -> dict[str, Recipe]:
    return {f"{bits}-bit-g{GROUP}": partial(_quantize, model, bits) for bits in (4, 3, 2)}


@torch.inference_mode()
def _quantize(directory: Path, bits: int) -> Subject:
    model = load_original(directory)
    size = rest_bytes(model)
    for linear in block_linears(model).values():
        packed, meta = Quantizer.quantize(
            linear.weight.data, nbits=bits, group_size=GROUP, axis=1, compute_dtype=torch.float32, device="cpu"
        )
        size += packed.numel() * packed.element_size()
        for part in ("scale", "zero"):
            size += 2 * meta[part].numel()
            meta[part] = meta[part].half().float()
        linear.weight.copy_(Quantizer.dequantize(packed, meta))
    packing = " (3 bits are packed ten to an int32)" if bits == 3 else ""
    note = f"{bits} bits{packing} + scale and zero in 16 bits per {GROUP}, axis 1; rest 16 bits (evaluated in float32)"
    return Subject(torch_logits(model), size, note)


def main() -> None:
    options = parser(__doc__).parse_args()
    write(measure(start(options), options.model, chosen(options, _recipes(options.model))), options.out)


if __name__ == "__main__":
    main()
