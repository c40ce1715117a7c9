"""The block formats of ggml and their exact de-quantization to float32. No torch.

Simple formats are read by numpy here; K, IQ and ternary ones by the `gguf` package. A block of 32 weights holds
codes q and, in float16, a scale d and (in the _1 formats) a minimum m: w = d * (q - zero) or w = d * q + m
(https://github.com/ggml-org/ggml, ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Blocks de-quantized at once: their float32 intermediates stay in the processor's cache.
_CHUNK_BLOCKS = 1 << 13


@dataclass(frozen=True)
class GgmlType:
    """A storage format: `block_bytes` bytes hold `block_elements` weights that follow each other in a row."""

    id: int
    name: str
    block_elements: int
    block_bytes: int

    @property
    def plain_dtype(self) -> str | None:
        """The torch dtype name of a format that is not quantized, else None."""
        return _PLAIN.get(self.name)


_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

GGML_TYPES: Mapping[int, GgmlType] = {
    id: GgmlType(id, name, elements, nbytes)
    for id, name, elements, nbytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
}


def dequantize(data: Array, kind: GgmlType) -> Array:
    """Stored bytes, uint8 of shape (blocks * block_bytes,), to float32 of shape (blocks * block_elements,)."""
    blocks = data.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_elements), dtype=np.float32)
    decode = _DECODERS.get(kind.name) or _package_decoder(kind)
    step = max(1, _CHUNK_BLOCKS * 32 // kind.block_elements)
    for start in range(0, len(blocks), step):
        decode(blocks[start : start + step], out[start : start + step])
    return out.reshape(-1)


def _f32(blocks: Array, out: Array) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Array, out: Array) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Array, out: Array) -> None:
    out.view(np.uint32)[:] = blocks.view("<u2").astype(np.uint32) << 16


def _q4_0(blocks: Array, out: Array) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Array, out: Array) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Array, out: Array) -> None:
    _nibbles(blocks[:, 6:], out)
    out += _fifth_bits(blocks[:, 2:6])
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Array, out: Array) -> None:
    _nibbles(blocks[:, 8:], out)
    out += _fifth_bits(blocks[:, 4:8])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: Array, out: Array) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at byte `at` of every block, as float32 of shape (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Array, out: Array) -> None:
    """(blocks, 16) bytes to (blocks, 32) codes: low halves first, then high halves."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _fifth_bits(packed: Array) -> Array:
    """(blocks, 4) bytes, one bit for each of 32 codes, to (blocks, 32) of 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _package_decoder(kind: GgmlType) -> Callable[[Array, Array], None]:
    # The package takes a quarter of a second to import; only these formats pay for it.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_by_package

    def decode(blocks: Array, out: Array) -> None:
        out[:] = dequantize_by_package(blocks, GGMLQuantizationType(kind.id))

    return decode


_DECODERS: Mapping[str, Callable[[Array, Array], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
