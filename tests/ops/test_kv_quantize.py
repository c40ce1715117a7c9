"""Keys and values in few bits: the error is half a step at most, along the axis that each is quantized on."""

from __future__ import annotations

import pytest
import torch

from packlight.ops.kv_quantize import (
    KVCodes,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)

GROUP = 32
HALF = 2.0**-10
"""Rounding of a scale and a least value to float16, relative."""


def states(tokens: int = 64, width: int = 64) -> torch.Tensor:
    """Two sequences of three heads, one channel fifty times as large as the others."""
    x = torch.randn(2, 3, tokens, width, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 50
    return x


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_are_off_by_half_a_step_of_their_channel(bits: int) -> None:
    keys = states()
    kept = quantize_keys(keys, bits, GROUP)
    found = dequantize_keys(kept, bits, torch.float32)
    groups = keys.unflatten(2, (-1, GROUP))
    step = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / (2**bits - 1)
    bound = (step / 2 + groups.abs().amax(3, keepdim=True) * HALF).expand_as(groups).flatten(2, 3)
    assert ((found - keys).abs() <= bound).all()
    assert kept.codes.dtype == torch.uint8 and kept.codes.shape == (2, 3, 2, GROUP, 64 * bits // 8)
    assert kept.scale.shape == kept.least.shape == (2, 3, 2, 1, 64) and kept.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [8, 4])
def test_values_are_off_by_half_a_step_of_their_token(bits: int) -> None:
    values = states()
    kept = quantize_values(values, bits, GROUP)
    found = dequantize_values(kept, bits, torch.float32)
    groups = values.unflatten(3, (-1, GROUP))
    step = (groups.amax(4, keepdim=True) - groups.amin(4, keepdim=True)) / (2**bits - 1)
    bound = (step / 2 + groups.abs().amax(4, keepdim=True) * HALF).expand_as(groups).flatten(3)
    assert ((found - values).abs() <= bound).all()
    assert kept.codes.shape == (2, 3, 64, 2, GROUP * bits // 8)


def test_a_large_channel_harms_keys_less_along_tokens() -> None:
    """What KIVI found: with outlier channels, quantizing keys per token loses what per channel keeps."""
    keys = states()
    small = [place for place in range(64) if place != 5]
    per_channel = dequantize_keys(quantize_keys(keys, 4, GROUP), 4, torch.float32)
    per_token = dequantize_values(quantize_values(keys, 4, GROUP), 4, torch.float32)
    errors = [float((found - keys)[..., small].norm()) for found in (per_channel, per_token)]
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("constant", [0.0, -3.25, 1000.0])
def test_a_constant_group_comes_back_as_it_was(constant: float) -> None:
    keys = torch.full((1, 1, GROUP, 32), constant)
    assert torch.equal(dequantize_keys(quantize_keys(keys, 4, GROUP), 4, torch.float32), keys)


def test_codes_of_four_bits_are_those_that_were_packed() -> None:
    codes = torch.randint(0, 16, (1, 1, 4, 2, GROUP), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    one, zero = torch.ones(1, 1, 4, 2, 1, dtype=torch.float16), torch.zeros(1, 1, 4, 2, 1, dtype=torch.float16)
    found = dequantize_values(KVCodes(packed, one, zero), 4, torch.float32)
    assert torch.equal(found, codes.flatten(3).float())
