"""De-quantization is that of the gguf package, bit for bit, for every format."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference

from packlight.checkpoint.ggml import GGML_TYPES, GgmlType, dequantize


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_blocks_decode_as_in_the_gguf_package(kind: GgmlType) -> None:
    theirs = GGMLQuantizationType(kind.id)
    assert theirs.name == kind.name
    assert GGML_QUANT_SIZES[theirs] == (kind.block_elements, kind.block_bytes)
    blocks = np.random.default_rng(0).integers(0, 256, (8200 if kind.block_elements == 32 else 100, kind.block_bytes))
    blocks = blocks.astype(np.uint8)
    with np.errstate(all="ignore"):  # random scales hold infinities
        ours = dequantize(blocks.reshape(-1), kind)
        expected = reference(blocks, theirs).reshape(-1)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


def test_a_block_by_hand() -> None:
    block = np.concatenate([np.array([0.5, -1.0], "<f2").view(np.uint8), np.full(16, 0x2F, np.uint8)])
    kind = next(kind for kind in GGML_TYPES.values() if kind.name == "Q4_1")
    np.testing.assert_array_equal(dequantize(block, kind), [15 * 0.5 - 1.0] * 16 + [2 * 0.5 - 1.0] * 16)
