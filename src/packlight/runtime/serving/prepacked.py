"""Dense float32 linears in the layout that oneDNN multiplies fastest, made once when a model is loaded.

A batch of 2 to 32 tokens, what a server decodes, is where a plain row-major matrix is slowest: torch hands it to MKL,
which lays it out again in every call. The packed matrix replaces the plain one; only where the head shares its weights
with the embedding do both stay. Every row of a product is the same to the last bit whatever the other rows are, so that
an answer does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


class PrepackedLinear(nn.Module):
    """A linear layer over oneDNN's layout of a float32 matrix (out_features, in_features)."""

    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        with torch.inference_mode():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), both float32."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def can_prepack() -> bool:
    """Whether this build of torch has oneDNN's packed products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prepack_(model: PreTrainedModel) -> int:
    """Pack every plain float32 linear on the CPU, in place; returns their number. Others stay as they are."""
    if not can_prepack():
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
    ]
    for parent, name, child in found:
        setattr(parent, name, PrepackedLinear(child))
    return len(found)
