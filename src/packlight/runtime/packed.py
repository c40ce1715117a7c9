"""Modules whose weights stay packed in memory: the linear, and the embedding that may share its codes with the head.

Which kernel serves a matrix is decided by `plan.kernels.kernel_of`, so that a plan counts the bytes that are held here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from packlight.errors import CheckpointError
from packlight.ops import packed_linear
from packlight.ops.grid import QuantizedTensor, dequantize
from packlight.ops.pack import pack, unpack
from packlight.plan.kernels import int4_group, kernel_of

Kernel = Literal["int4", "int8", "reference"]


class PackedLinear(nn.Module):
    """A linear layer over a quantized matrix of `out_features` rows and `in_features` columns.

    `kernel` names the path that runs: torch's int4 or int8 CPU kernel where the grid and the shape fit them and the
    compute dtype is bfloat16 on a CPU, else the reference, which de-quantizes some rows at a time.
    """

    bias: torch.Tensor | None
    packed: torch.Tensor
    scale_and_zero: torch.Tensor
    codes: torch.Tensor
    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.grid = weight.grid
        self.kernel = choose_kernel(weight)
        self.register_buffer("bias", bias)
        if self.kernel == "int4":
            self.group_size = int4_group(weight.grid, self.in_features) or 0
            packed, scale_and_zero = packed_linear.pack_int4(weight, self.group_size)
            self.register_buffer("packed", packed)
            self.register_buffer("scale_and_zero", scale_and_zero)
            return
        zero = weight.zero_point
        if self.kernel == "int8":
            self.register_buffer("codes", weight.codes)
            self.register_buffer("scale", weight.scale[:, 0].contiguous())
            self.register_buffer("zero_point", None if zero is None else zero[:, 0].to(weight.scale.dtype))
            return
        self.register_buffer("words", pack(weight.codes, weight.grid.bits))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype."""
        if self.kernel == "int4":
            out = packed_linear.int4(x, self.packed, self.scale_and_zero, self.group_size)
        elif self.kernel == "int8":
            out = packed_linear.int8(x, self.codes, self.scale, self.zero_point)
        else:
            out = packed_linear.reference(x, self.words, self.scale, self.zero_point, self.grid.bits)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, kernel={self.kernel}"


class PackedEmbedding(nn.Module):
    """Rows of a quantized matrix, de-quantized when they are looked up, and multiplied by `factor` where there is one.

    An 8-bit per-row table keeps its codes plain, so that a tied head can multiply by the same tensor (`head`);
    every other grid keeps packed words.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    factor: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, factor: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.grid = weight.grid
        self.is_plain = choose_kernel(weight) == "int8"
        self.register_buffer("codes", weight.codes if self.is_plain else pack(weight.codes, weight.grid.bits))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        # transformers rounds the factor to the compute dtype too
        self.register_buffer("factor", None if factor is None else torch.tensor(factor, dtype=weight.scale.dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., embedding_dim) in the dtype of the scales."""
        flat = ids.reshape(-1)
        codes = self.codes[flat]
        if not self.is_plain:
            codes = unpack(codes, self.grid.bits, self.embedding_dim)
        zero = None if self.zero_point is None else self.zero_point[flat]
        rows = dequantize(codes, self.scale[flat], zero)
        if self.factor is not None:
            rows *= self.factor
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, grid={self.grid}"


def embedding_factor(embedding: nn.Embedding) -> float | None:
    """What an architecture multiplies its looked-up rows by (Gemma's square root of the width); None for plain rows.

    Raises:
        CheckpointError: the class does something else to its rows, which a packed embedding would leave out.
    """
    if type(embedding) is nn.Embedding:
        return None
    factor = getattr(embedding, "embed_scale", None)
    if factor is None:
        raise CheckpointError(
            f"a {type(embedding).__name__} does more than look rows up: leave the embeddings of this architecture alone"
        )
    return float(factor)


def tied_head(embedding: PackedEmbedding, weight: QuantizedTensor) -> PackedLinear:
    """A head over the same matrix as `embedding`, sharing its codes wherever the two keep them in one layout."""
    head = PackedLinear(weight)
    if head.kernel == "int8":
        head.codes = embedding.codes
    elif head.kernel == "reference":
        head.words = embedding.codes
    return head


def choose_kernel(weight: QuantizedTensor) -> Kernel:
    """The kernel that will serve `weight`, from its grid, shape, dtype and device."""
    if weight.scale.dtype != torch.bfloat16 or weight.codes.device.type != "cpu":
        return "reference"
    rows, cols = weight.shape
    return kernel_of(weight.grid, rows, cols)
