"""bitsandbytes through transformers, on the CPU: NF4, NF4 with double quantization, and LLM.int8().

NF4 weights are de-quantized by bitsandbytes into a float32 copy of the original, since its own CPU kernel computes in
bfloat16 and would add its rounding to that of the weights. LLM.int8() runs as it is, for it quantizes activations too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

PEER = f"bitsandbytes {bitsandbytes.__version__}"
REST = "rest 16 bits (evaluated in float32)"


def measure(reference: Reference, model: Path, formats: list[str] | None = None) -> Iterator[Row]:
    """Rows of the formats, all of them by default; `model` is the directory of the original."""
    recipes = _recipes(model)
    yield from measure_all(reference, PEER, {name: recipes[name] for name in formats or recipes})


def _recipes(model: Path) -> dict[str, Recipe]:
    return {
        "nf4": partial(_nf4, model, double=False),
        "nf4-double": partial(_nf4, model, double=True),
        "int8": partial(_int8, model),
    }


def _load(directory: Path, config: BitsAndBytesConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.eval()
    return model


@torch.inference_mode()
def _nf4(directory: Path, *, double: bool) -> Subject:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    original = load_original(directory)
    quantized = _load(directory, config)
    size = rest_bytes(original)
    for name, linear in block_linears(original).items():
        module: Any = quantized.base_model.get_submodule(name)
        weight, state = module.weight, module.weight.quant_state
        size += weight.numel() * weight.element_size() + state.absmax.numel() * state.absmax.element_size()
        if state.nested:
            size += 4 * state.state2.absmax.numel() + 4  # float32 per block of absmax, and one float32 offset
        linear.weight.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, state))
    scales = "8-bit absmax per 64 + float32 per 256 absmax" if double else "float32 absmax per 64"
    return Subject(torch_logits(original), size, f"4 bits + {scales}; {REST}")


def _int8(directory: Path) -> Subject:
    quantized = _load(directory, BitsAndBytesConfig(load_in_8bit=True))
    original = load_original(directory)
    size = rest_bytes(original)
    for linear in block_linears(original).values():
        size += linear.weight.numel() + 4 * linear.out_features
    note = f"8 bits + float32 per row; activations in 8 bits too, outliers above 6 apart; {REST}"
    return Subject(torch_logits(quantized), size, note)


def main() -> None:
    options = parser(__doc__).parse_args()
    write(measure(start(options), options.model, chosen(options, _recipes(options.model))), options.out)


if __name__ == "__main__":
    main()
