"""Keys and values in few bits: keys per channel over groups of tokens, values per token over groups of channels.

Keys have a few channels that are large in every token, values have none (KIVI, arXiv 2402.02750, section 3); so each is
quantized along the axis on which its values are alike:

    code = round((x - least) / scale),  scale = (most - least) / (2^bits - 1),  x ~ code * scale + least

`least` and `scale` are kept in float16 and the codes are chosen for them as they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVCodes:
    """A byte holds one code of 8 bits, or two of 4 bits, the even place in its lower half; the others are float16."""

    codes: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes, self.scale, self.least


def quantize_keys(keys: torch.Tensor, bits: int, group: int) -> KVCodes:
    """keys (..., tokens, head_dim), tokens a multiple of `group`.

    Returns:
        codes (..., tokens / group, group, head_dim * bits / 8), scale and least (..., tokens / group, 1, head_dim).
    """
    return _quantize(keys.unflatten(-2, (-1, group)), bits, dim=-2)


def dequantize_keys(kept: KVCodes, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., tokens, head_dim)."""
    return _dequantize(kept, bits, dtype).flatten(-3, -2)


def quantize_values(values: torch.Tensor, bits: int, group: int) -> KVCodes:
    """values (..., tokens, head_dim), head_dim a multiple of `group`.

    Returns:
        codes (..., tokens, head_dim / group, group * bits / 8), scale and least (..., tokens, head_dim / group, 1).
    """
    return _quantize(values.unflatten(-1, (-1, group)), bits, dim=-1)


def dequantize_values(kept: KVCodes, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., tokens, head_dim)."""
    return _dequantize(kept, bits, dtype).flatten(-2)


def _quantize(x: torch.Tensor, bits: int, dim: int) -> KVCodes:
    steps = 2**bits - 1
    x = x.float()
    least = x.amin(dim=dim, keepdim=True).half()
    scale = ((x.amax(dim=dim, keepdim=True) - least.float()) / steps).half()
    codes = (x - least.float()).div_(scale.float().clamp_min(torch.finfo(torch.float16).tiny)).round_().clamp_(0, steps)
    codes = codes.to(torch.uint8)
    return KVCodes(codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4, scale, least)


def _dequantize(kept: KVCodes, bits: int, dtype: torch.dtype) -> torch.Tensor:
    codes = kept.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return torch.addcmul(kept.least.to(dtype), codes.to(dtype), kept.scale.to(dtype))
