"""LLM.int8(): 8-bit matrix multiplication that keeps the few columns with large activations in 16 bit.

Vector-wise quantization (Dettmers et al., arXiv 2208.07339, section 3.1) gives every token x_t and every output row w_o
its own scale and multiplies integers,

    x8 = round(127 x / c_x),   w8 = round(127 w / c_w),   y ~= c_x c_w^T / 127^2 * (x8 w8^T),   c = max|.| of the row.

One activation of 60 leaves the other values of its token two or three codes. Mixed-precision decomposition
(section 3.2) therefore takes out the columns O = {i: |x_ti| >= alpha for some token t}, alpha = 6:

    y = x[:, O] w[:, O]^T  +  c_x c_w^T / 127^2 * (x8[:, ~O] w8[:, ~O]^T),   c_x over the columns ~O.

This is the plain reference, to be compared with, not a fast kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from packlight.errors import UsageError

ALPHA = 6.0
"""The magnitude from which on an activation is an outlier, in the activations' own units."""
LARGEST = 127
"""The largest code: absmax quantization is symmetric and leaves -128 out."""


@dataclass(frozen=True)
class Int8Rows:
    """A matrix whose rows are quantized by their largest magnitude: value = code * absmax / 127.

    Args:
        codes: int8 (rows, cols), in [-127, 127].
        absmax: float32 (rows,), positive; 1 for a row of zeros.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    def columns(self, which: torch.Tensor) -> torch.Tensor:
        """Some columns as float32 (rows, number of them)."""
        return self.codes[:, which].float() * (self.absmax / LARGEST).unsqueeze(1)


def to_int8(rows: torch.Tensor) -> Int8Rows:
    """Absmax quantization of each row of a floating point matrix (rows, cols), of which a token is one (section 2)."""
    values = rows.float()
    absmax = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(len(values))  # (rows,)
    absmax = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    # The quotient first: 127 x overflows for the largest floats. It is at most 1, so no code leaves the range.
    return Int8Rows((values / absmax.unsqueeze(1) * LARGEST).round_().to(torch.int8), absmax)


def vectorwise(x: torch.Tensor, weight: torch.Tensor | Int8Rows) -> torch.Tensor:
    """x W^T with both factors in int8 and sums in int32, scaled by the outer product of the rows' scales.

    Args:
        x: floating point (..., in_features).
        weight: floating point (out_features, in_features), or the same quantized once and for all by `to_int8`.

    Returns:
        (..., out_features) in the dtype of `x`.

    Raises:
        UsageError: the shapes do not belong together.
    """
    tokens, stored = _flat(x, weight), _stored(weight)
    return _int8_product(tokens, stored.codes, stored.absmax).to(x.dtype).reshape(*x.shape[:-1], len(stored.codes))


def llm_int8(x: torch.Tensor, weight: torch.Tensor | Int8Rows, alpha: float = ALPHA) -> torch.Tensor:
    """x W^T by mixed-precision decomposition; the outlier columns are found anew in every call.

    Args:
        x: floating point (..., in_features).
        weight: floating point (out_features, in_features): outlier columns are multiplied by the exact weights, as in
            the paper; or `Int8Rows`: they are multiplied by the decoded int8 weights, as in its deployed form, which
            keeps no other copy.
        alpha: a column of `x` is an outlier where some token's magnitude is at least this. 0 makes every column one
            (the product in the dtype of `x`), infinity none (`vectorwise`).

    Returns:
        (..., out_features) in the dtype of `x`, in which the outlier columns are multiplied too.

    Raises:
        UsageError: the shapes do not belong together, or alpha is negative or no number.
    """
    if not alpha >= 0:
        raise UsageError(f"alpha is the magnitude of an outlier, 0 or more, not {alpha}")
    tokens, stored = _flat(x, weight), _stored(weight)
    is_outlier = outlier_columns(tokens, alpha)
    exact = stored.columns(is_outlier) if isinstance(weight, Int8Rows) else weight[:, is_outlier]
    rest = ~is_outlier
    product = _int8_product(tokens[:, rest], stored.codes[:, rest], stored.absmax)
    if bool(is_outlier.any()):
        product += (tokens[:, is_outlier] @ exact.to(x.dtype).T).float()
    return product.to(x.dtype).reshape(*x.shape[:-1], len(stored.codes))


def outlier_columns(x: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """Which columns of (tokens, in_features) hold a magnitude of at least alpha, bool (in_features,)."""
    return (x.abs() >= alpha).any(dim=0)


def _int8_product(tokens: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """float32 (tokens, out_features) of floating point tokens and int8 weights. int32 holds 133000 columns."""
    quantized = to_int8(tokens)
    sums = quantized.codes.int() @ codes.int().T  # (tokens, out_features)
    return sums.float() * torch.outer(quantized.absmax / LARGEST, absmax / LARGEST)


def _stored(weight: torch.Tensor | Int8Rows) -> Int8Rows:
    return weight if isinstance(weight, Int8Rows) else to_int8(weight)


def _flat(x: torch.Tensor, weight: torch.Tensor | Int8Rows) -> torch.Tensor:
    """`x` as (tokens, in_features)."""
    shape = (weight.codes if isinstance(weight, Int8Rows) else weight).shape
    if x.ndim == 0 or len(shape) != 2 or x.shape[-1] != shape[1]:
        raise UsageError(
            f"activations {tuple(x.shape)} and weights {tuple(shape)} do not multiply: "
            "their last dimensions are to be equal"
        )
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
